/* How tests steer the simulation. Counts and codes as in the runtime; nothing here waits but advance, run_all and
 * reset, which run operations. */
#ifndef KVBM_SIMULATION_H
#define KVBM_SIMULATION_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kvbm_simulated_operation {
  char kind[64]; /* memcpy, memcpy2d, memcpy3d, batch, memset, kernel:<name>, delay, record, wait */
  uint64_t stream, nbytes, source, destination;
} kvbm_simulated_operation;

typedef struct kvbm_simulated_counts {
  uint64_t num_allocations, num_registrations, num_streams, num_events, allocated_nbytes, num_waiting;
} kvbm_simulated_counts;

enum { KVBM_SIMULATED_RUNNING = 0, KVBM_SIMULATED_STEPPED = 1, KVBM_SIMULATED_HELD = 2 };

void kvbm_simulated_set_mode(int mode);
int kvbm_simulated_mode(void);
void kvbm_simulated_set_num_devices(int num_devices);
int kvbm_simulated_num_devices(void);
int kvbm_simulated_current_device(void); /* of this thread, as others in the process find it */
int kvbm_simulated_has_context(int device);
int kvbm_simulated_capture_mode(void); /* of this thread: 0 global, 1 thread-local, 2 relaxed */
/* Another thread captures a graph, in the global mode, on this stream; 0: on one that is not ours. */
void kvbm_simulated_set_capturing(int is_capturing, uint64_t stream);
int kvbm_simulated_capturing(void);
void kvbm_simulated_set_total_nbytes(uint64_t nbytes);
uint64_t kvbm_simulated_total_nbytes(void);
void kvbm_simulated_set_batch_copy(int version); /* the driver's CUDA: 0, which has none, 12 or 13 */
int kvbm_simulated_batch_copy(void);
void kvbm_simulated_set_reversed(int is_reversed);
int kvbm_simulated_reversed(void);
int kvbm_simulated_advance(uint64_t stream, int is_any, int n);
int kvbm_simulated_code(const char* name); /* of an error by its name; -1: there is none */
void kvbm_simulated_fail_call(const char* name, int code, uint64_t after);
void kvbm_simulated_fail_operation(int code, uint64_t after);
uint64_t kvbm_simulated_num_operations(void);
uint64_t kvbm_simulated_operations(uint64_t first, uint64_t n, kvbm_simulated_operation* operations);
void kvbm_simulated_counts_now(kvbm_simulated_counts* counts);
/* Forget everything: memory, streams, events, faults, errors, log, settings. */
void kvbm_simulated_reset(void);

#ifdef __cplusplus
}
#endif
#endif
