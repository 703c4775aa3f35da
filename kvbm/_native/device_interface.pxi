# What device.pyx calls: cuda/kvbm_cuda.h, word for word.

cdef extern from "kvbm_cuda.h" nogil:
    ctypedef struct kvbm_cuda_error:
        int code
        int device
        uint64_t nbytes
        char[64] name
        char[192] text
        char[64] call

    ctypedef struct kvbm_cuda_properties:
        char[256] name
        char[32] pci_bus_id
        uint64_t total_nbytes
        uint64_t l2_nbytes
        int major
        int minor
        int num_multiprocessors
        int num_copy_engines
        int priority_least
        int priority_greatest
        int can_map_host

    ctypedef struct kvbm_cuda_plan:
        const uint64_t* source_blocks
        const uint64_t* destination_blocks
        const uint64_t* source_pieces
        const uint64_t* destination_pieces
        int64_t num_blocks
        int64_t num_pieces
        int64_t piece_nbytes

    ctypedef struct kvbm_cuda_options:
        uint64_t stream
        int path
        int num_thread_blocks
        int source_on_device
        int destination_on_device
        uint64_t scratch
        uint64_t scratch_nbytes
        uint64_t pinned
        uint64_t staging
        uint64_t staging_nbytes
        const uint64_t* hashes
        uint64_t* checksums

    ctypedef struct kvbm_cuda_permute:
        const uint64_t* source_blocks
        const uint64_t* destination_blocks
        const uint64_t* source_regions
        const uint64_t* destination_regions
        int64_t num_blocks
        int64_t num_regions
        int64_t num_tokens
        int64_t num_heads
        int64_t head_nbytes
        int64_t source_token
        int64_t source_head
        int64_t destination_token
        int64_t destination_head

    int kvbm_cuda_device_count(int* count, kvbm_cuda_error* error)
    int kvbm_cuda_versions(int* driver, int* runtime, kvbm_cuda_error* error)
    int kvbm_cuda_get_properties(int device, kvbm_cuda_properties* properties, kvbm_cuda_error* error)
    int kvbm_cuda_has_kernels(int device, int* has, kvbm_cuda_error* error)
    int kvbm_cuda_has_batch_copy(int* has)
    int kvbm_cuda_allocate(int device, uint64_t nbytes, uint64_t* address, kvbm_cuda_error* error)
    int kvbm_cuda_free(int device, uint64_t address, kvbm_cuda_error* error)
    int kvbm_cuda_memory_info(int device, uint64_t* free_nbytes, uint64_t* total_nbytes, kvbm_cuda_error* error)
    int kvbm_cuda_register_host(int device, uint64_t address, uint64_t nbytes, kvbm_cuda_error* error)
    int kvbm_cuda_unregister_host(int device, uint64_t address, kvbm_cuda_error* error)
    int kvbm_cuda_pointer_kind(uint64_t address, int* kind, int* device, kvbm_cuda_error* error)
    int kvbm_cuda_stream_create(int device, int priority, uint64_t* stream, kvbm_cuda_error* error)
    int kvbm_cuda_stream_destroy(int device, uint64_t stream, kvbm_cuda_error* error)
    int kvbm_cuda_stream_synchronize(int device, uint64_t stream, kvbm_cuda_error* error)
    int kvbm_cuda_stream_is_idle(int device, uint64_t stream, int* is_idle, kvbm_cuda_error* error)
    int kvbm_cuda_stream_wait(int device, uint64_t stream, uint64_t event, kvbm_cuda_error* error)
    int kvbm_cuda_event_create(int device, int with_timing, uint64_t* event, kvbm_cuda_error* error)
    int kvbm_cuda_event_destroy(int device, uint64_t event, kvbm_cuda_error* error)
    int kvbm_cuda_event_record(int device, uint64_t event, uint64_t stream, kvbm_cuda_error* error)
    int kvbm_cuda_event_is_done(int device, uint64_t event, int* is_done, kvbm_cuda_error* error)
    int kvbm_cuda_event_synchronize(int device, uint64_t event, kvbm_cuda_error* error)
    int kvbm_cuda_event_elapsed(int device, uint64_t begin, uint64_t end, float* milliseconds, kvbm_cuda_error* error)
    uint64_t kvbm_cuda_scratch_nbytes(const kvbm_cuda_plan* plan, int with_checksums)
    int kvbm_cuda_copy(int device, const kvbm_cuda_plan* plan, const kvbm_cuda_options* options, kvbm_cuda_error* error)
    int kvbm_cuda_permute_copy(int device, const kvbm_cuda_permute* permute, const kvbm_cuda_options* options,
                               kvbm_cuda_error* error)
    int kvbm_cuda_checksum(int device, const kvbm_cuda_plan* plan, const kvbm_cuda_options* options,
                           kvbm_cuda_error* error)
    int kvbm_cuda_fill(int device, uint64_t address, uint64_t nbytes, uint64_t seed, uint64_t stream,
                       kvbm_cuda_error* error)
    int kvbm_cuda_delay(int device, uint64_t nanoseconds, uint64_t stream, kvbm_cuda_error* error)
    int kvbm_cuda_memcpy(int device, uint64_t destination, uint64_t source, uint64_t nbytes, uint64_t stream,
                         kvbm_cuda_error* error)
