/* What device.pyx includes for the simulation's steering: the simulation's own interface in its build, in the real one
 * functions of the same names that do nothing and that nobody can reach. */
#ifndef KVBM_STEERING_H
#define KVBM_STEERING_H

#ifdef KVBM_SIMULATED

#include "simulated/simulation.h"
enum { KVBM_IS_SIMULATED = 1 };

#else

#include <stdint.h>

enum { KVBM_IS_SIMULATED = 0 };

typedef struct kvbm_simulated_operation {
  char kind[64];
  uint64_t stream, nbytes, source, destination;
} kvbm_simulated_operation;

typedef struct kvbm_simulated_counts {
  uint64_t num_allocations, num_registrations, num_streams, num_events, allocated_nbytes, num_waiting;
} kvbm_simulated_counts;

static inline void kvbm_simulated_set_mode(int mode) { (void)mode; }
static inline int kvbm_simulated_mode(void) { return 0; }
static inline void kvbm_simulated_set_num_devices(int n) { (void)n; }
static inline int kvbm_simulated_num_devices(void) { return 0; }
static inline int kvbm_simulated_current_device(void) { return 0; }
static inline int kvbm_simulated_has_context(int device) { return (void)device, 0; }
static inline int kvbm_simulated_capture_mode(void) { return 0; }
static inline void kvbm_simulated_set_capturing(int is_capturing, uint64_t stream) { (void)is_capturing, (void)stream; }
static inline int kvbm_simulated_capturing(void) { return 0; }
static inline void kvbm_simulated_set_total_nbytes(uint64_t nbytes) { (void)nbytes; }
static inline uint64_t kvbm_simulated_total_nbytes(void) { return 0; }
static inline void kvbm_simulated_set_batch_copy(int version) { (void)version; }
static inline int kvbm_simulated_batch_copy(void) { return 0; }
static inline void kvbm_simulated_set_reversed(int is_reversed) { (void)is_reversed; }
static inline int kvbm_simulated_reversed(void) { return 0; }
static inline int kvbm_simulated_advance(uint64_t stream, int is_any, int n) { return (int)stream + is_any + n; }
static inline int kvbm_simulated_code(const char* name) { return (int)name[0]; }
static inline void kvbm_simulated_fail_call(const char* name, int code, uint64_t after) {
  (void)name, (void)code, (void)after;
}
static inline void kvbm_simulated_fail_operation(int code, uint64_t after) { (void)code, (void)after; }
static inline uint64_t kvbm_simulated_num_operations(void) { return 0; }
static inline uint64_t kvbm_simulated_operations(uint64_t first, uint64_t n, kvbm_simulated_operation* operations) {
  return (void)operations, first & n & 0;
}
static inline void kvbm_simulated_counts_now(kvbm_simulated_counts* counts) { (void)counts; }
static inline void kvbm_simulated_reset(void) {}

#endif
#endif
