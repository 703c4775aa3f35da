// Queues shapes and batches, and says what is wrong with what the caller gave.
#include "submission.h"

#include <climits>

#include "batch_copy.h"

namespace kvbm {

void Submission::copy(const Shape& shape, cudaMemcpyKind kind) {
  if (!is_good()) return;
  const uint64_t nbytes = shape.width * shape.height * shape.depth;
  void *const to = as_pointer(shape.destination), *const from = as_pointer(shape.source);
  if (shape.depth > 1) {
    cudaMemcpy3DParms copy{};
    copy.srcPtr = make_cudaPitchedPtr(from, shape.source_pitch, shape.width, shape.source_slice / shape.source_pitch);
    copy.dstPtr = make_cudaPitchedPtr(to, shape.destination_pitch, shape.width,
                                      shape.destination_slice / shape.destination_pitch);
    copy.extent = make_cudaExtent(shape.width, shape.height, shape.depth);
    copy.kind = kind;
    keep(cudaMemcpy3DAsync(&copy, stream_), "cudaMemcpy3DAsync", nbytes);
  } else if (shape.height > 1) {
    keep(cudaMemcpy2DAsync(to, shape.destination_pitch, from, shape.source_pitch, shape.width, shape.height, kind,
                           stream_),
         "cudaMemcpy2DAsync", nbytes);
  } else {
    keep(cudaMemcpyAsync(to, from, shape.width, kind, stream_), "cudaMemcpyAsync", nbytes);
  }
}

namespace {

// Call `use` with the parts of a row between the edges of registrations.
template <class Use>
void split_row(Shape row, bool is_host_source, bool is_host_destination, Use&& use) {
  uint64_t left = row.width;
  while (left > 0) {
    row.width = left;
    if (is_host_source) row.width = nbytes_to_edge(row.source, row.width);
    if (is_host_destination) row.width = nbytes_to_edge(row.destination, row.width);
    use(row);
    left -= row.width;
    row.source += row.width;
    row.destination += row.width;
  }
}

}  // namespace

void Submission::copy_rows(const Shape& shape, cudaMemcpyKind kind, bool is_host_source, bool is_host_destination) {
  const uint64_t source = shape.source_span(), destination = shape.destination_span();
  const bool is_whole = (!is_host_source || nbytes_to_edge(shape.source, source) == source) &&
                        (!is_host_destination || nbytes_to_edge(shape.destination, destination) == destination);
  if (is_whole) {
    copy(shape, kind);
    return;
  }
  for (uint64_t z = 0; z < shape.depth; ++z) {
    for (uint64_t y = 0; y < shape.height; ++y) {
      const Shape row{shape.source + z * shape.source_slice + y * shape.source_pitch,
                      shape.destination + z * shape.destination_slice + y * shape.destination_pitch, shape.width};
      split_row(row, is_host_source, is_host_destination, [&](const Shape& part) { copy(part, kind); });
    }
  }
}

void Submission::copy_batch(const std::vector<Shape>& runs, bool is_host_source, bool is_host_destination) {
  std::vector<uint64_t> sources, destinations;
  std::vector<std::size_t> sizes;
  sources.reserve(runs.size());
  destinations.reserve(runs.size());
  sizes.reserve(runs.size());
  uint64_t nbytes = 0;
  for (const Shape& run : runs) {
    split_row(run, is_host_source, is_host_destination, [&](const Shape& part) {
      sources.push_back(part.source);
      destinations.push_back(part.destination);
      sizes.push_back(part.width);
    });
    nbytes += run.width;
  }
  keep(cudaSetDevice(device_), "cudaSetDevice", 0);  // the driver's call needs the thread's context too
  if (!is_good()) return;
  keep(memcpy_batch(destinations.data(), sources.data(), sizes.data(), sizes.size(), stream_), "cuMemcpyBatchAsync",
       nbytes);
}

const char* mistake_in_plan(const kvbm_cuda_plan& plan, bool is_source_only) {
  if (plan.num_blocks < 0) return "num_blocks is negative";
  if (plan.num_pieces < 1) return "a block needs 1 or more pieces";
  if (plan.piece_nbytes < 1) return "piece_nbytes must be 1 or more";
  if (plan.piece_nbytes > INT64_MAX / plan.num_pieces) return "a block has more bytes than 2^63";
  if (plan.num_blocks > 0 && (plan.source_blocks == nullptr || plan.source_pieces == nullptr)) return "no sources";
  if (plan.num_blocks > 0 && !is_source_only &&
      (plan.destination_blocks == nullptr || plan.destination_pieces == nullptr)) {
    return "no destinations";
  }
  return nullptr;
}

const char* mistake_in_scratch(const kvbm_cuda_options& options, uint64_t nbytes) {
  if (options.scratch == 0 || options.pinned == 0) return "this path needs scratch and pinned memory";
  if (options.scratch_nbytes < nbytes) return "scratch is smaller than scratch_nbytes says";
  if (options.scratch % 8 != 0 || options.pinned % 8 != 0) {
    return "scratch and pinned memory must be aligned to 8 bytes";
  }
  if (options.hashes != nullptr && options.checksums == nullptr) return "hashes were given, but no place for checksums";
  return nullptr;
}

const char* mistake_in_options(const kvbm_cuda_plan& plan, const kvbm_cuda_options& options) {
  if (options.path < KVBM_CUDA_PATH_MEMCPY || options.path > KVBM_CUDA_PATH_STAGED) return "no such path";
  if (options.path == KVBM_CUDA_PATH_BATCH && options.stream <= 2) return "the batched copy needs a stream of its own";
  const bool has_kernel = options.path == KVBM_CUDA_PATH_KERNEL || options.path == KVBM_CUDA_PATH_STAGED;
  if (has_kernel || options.hashes != nullptr) {
    const uint64_t nbytes = kvbm_cuda_scratch_nbytes(&plan, options.hashes != nullptr);
    if (const char* const mistake = mistake_in_scratch(options, nbytes)) return mistake;
  }
  if (options.path != KVBM_CUDA_PATH_STAGED) return nullptr;
  if ((options.source_on_device != 0) == (options.destination_on_device != 0)) {
    return "the staged path needs one side on the device and one on the host";
  }
  const uint64_t block_nbytes = static_cast<uint64_t>(plan.num_pieces * plan.piece_nbytes);
  if (options.staging == 0 || options.staging % 256 != 0) return "staging must be device memory aligned to 256 bytes";
  if (options.staging_nbytes / block_nbytes < static_cast<uint64_t>(plan.num_blocks)) {
    return "staging is smaller than the blocks";
  }
  return nullptr;
}

}  // namespace kvbm
