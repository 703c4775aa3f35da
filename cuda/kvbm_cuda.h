/* The C interface of the CUDA modules. It includes no CUDA header, so whoever uses it compiles without a toolkit.
 *
 * Every function returns 0, or the CUDA error code after filling `error` (which may be NULL). Sizes are bytes. Streams
 * and events are the runtime's handles as integers; 0 is the legacy default stream. Addresses are those of unified
 * addressing, so one number names host or device memory. All calls are thread-safe and make `device` current for
 * themselves only. Two libraries keep this interface: one on the CUDA runtime, one that simulates it on the CPU.
 */
#ifndef KVBM_CUDA_H
#define KVBM_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kvbm_cuda_error {
  int code;
  int device;
  uint64_t nbytes;  /* that the call was about; 0 where that means nothing */
  char name[64];    /* cudaErrorMemoryAllocation */
  char text[192];   /* what CUDA says of it */
  char call[64];    /* cudaMalloc */
} kvbm_cuda_error;

/* -- devices ------------------------------------------------------------------------------------------------ */

typedef struct kvbm_cuda_properties {
  char name[256];
  char pci_bus_id[32]; /* 0000:3b:00.0, as in /sys/bus/pci/devices */
  uint64_t total_nbytes;
  uint64_t l2_nbytes;
  int major, minor; /* compute capability */
  int num_multiprocessors;
  int num_copy_engines;
  int priority_least, priority_greatest; /* of streams; greatest is the smaller number */
  int can_map_host;                      /* kernels may use registered host memory by its own address */
} kvbm_cuda_properties;

/* Count devices; without a driver the count is 0 and the code says why. */
int kvbm_cuda_device_count(int* count, kvbm_cuda_error* error);
int kvbm_cuda_versions(int* driver, int* runtime, kvbm_cuda_error* error); /* 13000 is 13.0; driver 0: there is none */
int kvbm_cuda_get_properties(int device, kvbm_cuda_properties* properties, kvbm_cuda_error* error);
int kvbm_cuda_has_kernels(int device, int* has, kvbm_cuda_error* error); /* code for this device is in the binary */
int kvbm_cuda_has_batch_copy(int* has);                                  /* looked up at run time */

/* -- memory ------------------------------------------------------------------------------------------------- */

enum { KVBM_CUDA_PAGEABLE = 0, KVBM_CUDA_PINNED = 1, KVBM_CUDA_DEVICE = 2, KVBM_CUDA_MANAGED = 3 };

int kvbm_cuda_allocate(int device, uint64_t nbytes, uint64_t* address, kvbm_cuda_error* error);
int kvbm_cuda_free(int device, uint64_t address, kvbm_cuda_error* error);
int kvbm_cuda_memory_info(int device, uint64_t* free_nbytes, uint64_t* total_nbytes, kvbm_cuda_error* error);
int kvbm_cuda_register_host(int device, uint64_t address, uint64_t nbytes, kvbm_cuda_error* error);
int kvbm_cuda_unregister_host(int device, uint64_t address, kvbm_cuda_error* error);
int kvbm_cuda_pointer_kind(uint64_t address, int* kind, int* device, kvbm_cuda_error* error);

/* -- streams and events ------------------------------------------------------------------------------------- */

int kvbm_cuda_stream_create(int device, int priority, uint64_t* stream, kvbm_cuda_error* error); /* non-blocking */
int kvbm_cuda_stream_destroy(int device, uint64_t stream, kvbm_cuda_error* error);
int kvbm_cuda_stream_synchronize(int device, uint64_t stream, kvbm_cuda_error* error);
int kvbm_cuda_stream_is_idle(int device, uint64_t stream, int* is_idle, kvbm_cuda_error* error);
int kvbm_cuda_stream_wait(int device, uint64_t stream, uint64_t event, kvbm_cuda_error* error);
/* Threads that wait for an event sleep; with_timing costs a little more. */
int kvbm_cuda_event_create(int device, int with_timing, uint64_t* event, kvbm_cuda_error* error);
int kvbm_cuda_event_destroy(int device, uint64_t event, kvbm_cuda_error* error);
/* Refuses a stream that captures a graph: what waits for the event would become a part of that. */
int kvbm_cuda_event_record(int device, uint64_t event, uint64_t stream, kvbm_cuda_error* error);
int kvbm_cuda_event_is_done(int device, uint64_t event, int* is_done, kvbm_cuda_error* error);
int kvbm_cuda_event_synchronize(int device, uint64_t event, kvbm_cuda_error* error);
int kvbm_cuda_event_elapsed(int device, uint64_t begin, uint64_t end, float* milliseconds, kvbm_cuda_error* error);

/* -- copies ------------------------------------------------------------------------------------------------- */

/* Blocks that are all cut alike: piece j of block i goes from source_blocks[i] + source_pieces[j] to
 * destination_blocks[i] + destination_pieces[j]; pieces stand in the source's logical order. Host arrays, which are
 * the caller's again when the call returns. */
typedef struct kvbm_cuda_plan {
  const uint64_t* source_blocks;
  const uint64_t* destination_blocks;
  const uint64_t* source_pieces;
  const uint64_t* destination_pieces;
  int64_t num_blocks;
  int64_t num_pieces;
  int64_t piece_nbytes;
} kvbm_cuda_plan;

enum {
  KVBM_CUDA_PATH_MEMCPY = 0, /* one asynchronous copy for each run, 2-D or 3-D where pieces or blocks lie at a pitch */
  KVBM_CUDA_PATH_BATCH = 1,  /* one call of the batched copy for all runs */
  KVBM_CUDA_PATH_KERNEL = 2, /* a kernel reads or writes both sides where they are */
  KVBM_CUDA_PATH_STAGED = 3  /* gather or scatter kernel on the device, and one copy a run between staging and host */
};

/* What a submission needs beside its plan; zeroed fields mean none. */
typedef struct kvbm_cuda_options {
  uint64_t stream;
  int path;
  int num_thread_blocks;        /* of kernels at most: what they take from others; 0: 4; checksum passes take 16 times */
  int source_on_device, destination_on_device;
  uint64_t scratch;             /* device memory for descriptors and checksums: kvbm_cuda_scratch_nbytes */
  uint64_t scratch_nbytes;
  uint64_t pinned;              /* pinned host memory of as many bytes; both are the submission's until it is done */
  uint64_t staging;             /* device memory of PATH_STAGED, aligned to 256: num_blocks times a block's bytes */
  uint64_t staging_nbytes;
  const uint64_t* hashes;       /* (num_blocks, 2), host: checksums are computed on the way; NULL: they are not */
  uint64_t* checksums;          /* (num_blocks,), in `pinned` memory of its own: valid when the submission is done */
} kvbm_cuda_options;

/* Scratch that kvbm_cuda_copy needs for a plan. */
uint64_t kvbm_cuda_scratch_nbytes(const kvbm_cuda_plan* plan, int with_checksums);

/* Queue a whole plan on a stream. Runs that follow each other on both sides are joined first, and cut where one range
 * that was registered here ends and the next begins: no copy of CUDA's may reach over that. Where a call fails
 * half-way, what was queued before it still runs: wait for the stream before memory is given to others. */
int kvbm_cuda_copy(int device, const kvbm_cuda_plan* plan, const kvbm_cuda_options* options, kvbm_cuda_error* error);

/* A permute: elements of a region (tokens by heads, head_nbytes contiguous bytes each) in any strides on each side. */
typedef struct kvbm_cuda_permute {
  const uint64_t* source_blocks; /* (num_blocks,), host: address of layer 0, outer 0 of each block */
  const uint64_t* destination_blocks;
  const uint64_t* source_regions; /* (num_regions,), host: bytes to add for each (layer, outer) */
  const uint64_t* destination_regions;
  int64_t num_blocks, num_regions;
  int64_t num_tokens, num_heads, head_nbytes;
  int64_t source_token, source_head; /* strides, bytes */
  int64_t destination_token, destination_head;
} kvbm_cuda_permute;

uint64_t kvbm_cuda_permute_scratch_nbytes(const kvbm_cuda_permute* permute);
int kvbm_cuda_permute_copy(int device, const kvbm_cuda_permute* permute, const kvbm_cuda_options* options,
                           kvbm_cuda_error* error);

/* Checksums of blocks where they lie (device or pinned memory), in the order of their pieces. */
int kvbm_cuda_checksum(int device, const kvbm_cuda_plan* plan, const kvbm_cuda_options* options,
                       kvbm_cuda_error* error); /* source side of the plan only */

/* For tests and benchmarks: fill memory with bytes that follow from a seed; keep a stream busy. */
int kvbm_cuda_fill(int device, uint64_t address, uint64_t nbytes, uint64_t seed, uint64_t stream,
                   kvbm_cuda_error* error);
int kvbm_cuda_delay(int device, uint64_t nanoseconds, uint64_t stream, kvbm_cuda_error* error);
/* One plain asynchronous copy, the limit that others are measured against. */
int kvbm_cuda_memcpy(int device, uint64_t destination, uint64_t source, uint64_t nbytes, uint64_t stream,
                     kvbm_cuda_error* error);

#ifdef __cplusplus
}
#endif
#endif
