// A small process-wide team of threads for copies that are worth splitting.
#pragma once

#include <cstddef>

namespace kvbm {

// Run `work(context)` in the calling thread and in up to `num_threads - 1` team threads, and wait for all of them.
// `work` takes its share from a counter in the context, so it may run fewer times than asked: when another caller has
// the team, or when no thread can be started, the caller does it all. `work` must not throw.
void run_in_team(void (*work)(void*), void* context, int num_threads);

}  // namespace kvbm
