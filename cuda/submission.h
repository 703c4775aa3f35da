// One submission to a stream: it queues until something fails, and knows which call that was.
#ifndef KVBM_SUBMISSION_H
#define KVBM_SUBMISSION_H

#include <new>
#include <vector>

#include "device_calls.h"
#include "shapes.h"

namespace kvbm {

constexpr int kDefaultThreadBlocks = 4;

class Submission {
 public:
  Submission(int device, const kvbm_cuda_options& options)
      : device_(device), options_(options), stream_(as_stream(options.stream)) {}

  bool is_good() const { return code_ == cudaSuccess; }
  cudaStream_t stream() const { return stream_; }
  int num_thread_blocks() const {
    return options_.num_thread_blocks > 0 ? options_.num_thread_blocks : kDefaultThreadBlocks;
  }

  void keep(cudaError_t code, const char* call, uint64_t nbytes) {
    if (!is_good() || code == cudaSuccess) return;
    code_ = code;
    call_ = call;
    nbytes_ = nbytes;
  }

  int finish(kvbm_cuda_error* error) const { return tell(code_, call_, device_, nbytes_, error); }

  void copy(const Shape& shape, cudaMemcpyKind kind);
  void copy_rows(const Shape& shape, cudaMemcpyKind kind, bool is_host_source, bool is_host_destination);
  void copy_batch(const std::vector<Shape>& runs, bool is_host_source, bool is_host_destination);
  void upload(uint64_t nbytes) {
    const cudaError_t code = cudaMemcpyAsync(as_pointer(options_.scratch), as_pointer(options_.pinned), nbytes,
                                             cudaMemcpyHostToDevice, stream_);
    keep(code, "cudaMemcpyAsync of descriptors", nbytes);
  }

 private:
  int device_;
  const kvbm_cuda_options& options_;
  cudaStream_t stream_;
  cudaError_t code_ = cudaSuccess;
  const char* call_ = "";
  uint64_t nbytes_ = 0;
};

// Run `body` on a submission with the device current. Where the host's memory ends half-way, what was
// queued still runs.
template <class Body>
int submit(int device, const char* call, const kvbm_cuda_options& options, kvbm_cuda_error* error, Body&& body) {
  const CurrentDevice current(device);
  if (current.code() != cudaSuccess) return tell(current.code(), current.call(), device, 0, error);
  try {
    Submission submission(device, options);
    body(submission);
    return submission.finish(error);
  } catch (const std::bad_alloc&) {
    return refuse(cudaErrorMemoryAllocation, "the host has no memory left for it", call, device, 0, error);
  }
}

// What is wrong with what the caller gave, or NULL.
const char* mistake_in_plan(const kvbm_cuda_plan& plan, bool is_source_only);
const char* mistake_in_scratch(const kvbm_cuda_options& options, uint64_t nbytes);
const char* mistake_in_options(const kvbm_cuda_plan& plan, const kvbm_cuda_options& options);

}  // namespace kvbm

#endif
