// The copy engine's submissions: a plan becomes calls and launches on one stream, by the path that the caller chose.
//
// Descriptors go from the submission's pinned memory to its scratch in the same stream, so nothing waits. Scratch:
//
//     source blocks | destination blocks | source pieces | destination pieces | hashes | sums | checksums     u64 each
//     num_blocks    | num_blocks         | num_pieces    | num_pieces         | 2 n    | n    | n             entries
//     |<-------------------------- uploaded -------------------------------------------->|
#include <cstring>

#include "batch_copy.h"
#include "kernels.h"
#include "submission.h"

namespace kvbm {
namespace {

// A pass over bytes that a copy engine moves is all of a submission that takes multiprocessors: wide and short it costs
// the link little. A thread block reads some 40 GB/s, so 16 times four of them read what a link moves in a fiftieth.
constexpr int kChecksumSpread = 16;

cudaMemcpyKind kind_of(bool is_from_device, bool is_to_device) {
  if (is_from_device) return is_to_device ? cudaMemcpyDeviceToDevice : cudaMemcpyDeviceToHost;
  return is_to_device ? cudaMemcpyHostToDevice : cudaMemcpyHostToHost;
}

// What the kernels are told of a plan: written to pinned memory, to be read in scratch. Pieces are cut as long as the
// runs allow.
struct Descriptors {
  CopyRuns runs{};
  Checksums sums{};
  uint64_t upload_nbytes = 0;
};

Descriptors describe(const kvbm_cuda_plan& plan, const std::vector<Run>& runs, const kvbm_cuda_options& options) {
  const uint64_t num_blocks = static_cast<uint64_t>(plan.num_blocks), nbytes = common_nbytes(runs);
  const uint64_t num_pieces = static_cast<uint64_t>(plan.num_pieces * plan.piece_nbytes) / nbytes;
  uint64_t* const pinned = reinterpret_cast<uint64_t*>(options.pinned);
  uint64_t* const scratch = reinterpret_cast<uint64_t*>(options.scratch);
  uint64_t at = 0;
  const auto place = [&](uint64_t n) {
    const uint64_t start = at;
    at += n;
    return start;
  };
  const uint64_t from = place(num_blocks), to = place(num_blocks);
  const uint64_t from_pieces = place(num_pieces), to_pieces = place(num_pieces);
  std::memcpy(pinned + from, plan.source_blocks, num_blocks * 8);
  if (plan.destination_blocks != nullptr) std::memcpy(pinned + to, plan.destination_blocks, num_blocks * 8);
  uint64_t j = 0;
  for (const Run& run : runs) {
    for (uint64_t done = 0; done < run.nbytes; done += nbytes, ++j) {
      pinned[from_pieces + j] = run.source + done;
      pinned[to_pieces + j] = run.destination + done;
    }
  }
  Descriptors made;
  made.runs.source_blocks = scratch + from;
  made.runs.destination_blocks = scratch + to;
  made.runs.source_pieces = scratch + from_pieces;
  made.runs.destination_pieces = scratch + to_pieces;
  made.runs.num_blocks = plan.num_blocks;
  made.runs.num_pieces = static_cast<int64_t>(num_pieces);
  made.runs.piece_nbytes = static_cast<int64_t>(nbytes);
  made.runs.source_is_host = options.source_on_device == 0;
  made.runs.destination_is_host = options.destination_on_device == 0;
  if (options.hashes != nullptr) {
    const uint64_t hashes = place(2 * num_blocks);
    std::memcpy(pinned + hashes, options.hashes, num_blocks * 16);
    made.sums.hashes = scratch + hashes;
    made.sums.sums = scratch + hashes + 2 * num_blocks;
    made.sums.checksums = scratch + hashes + 3 * num_blocks;
  }
  made.upload_nbytes = at * 8;
  return made;
}

void fetch_checksums(Submission& submission, const Descriptors& made, const kvbm_cuda_options& options) {
  if (!submission.is_good()) return;
  const uint64_t nbytes = static_cast<uint64_t>(made.runs.num_blocks) * 8;
  submission.keep(cudaMemcpyAsync(options.checksums, made.sums.checksums, nbytes, cudaMemcpyDeviceToHost,
                                  submission.stream()),
                  "cudaMemcpyAsync of checksums", nbytes);
}

// Copy by a kernel, with checksums where hashes were given.
void run_copy_kernel(Submission& submission, const Descriptors& made, const kvbm_cuda_options& options) {
  submission.upload(made.upload_nbytes);
  if (!submission.is_good()) return;
  const uint64_t nbytes = static_cast<uint64_t>(made.runs.num_blocks * made.runs.num_pieces * made.runs.piece_nbytes);
  if (options.hashes == nullptr) {
    submission.keep(launch_copy_runs(made.runs, submission.num_thread_blocks(), submission.stream()),
                    "launch of the copy kernel", nbytes);
    return;
  }
  submission.keep(launch_copy_checksum(made.runs, made.sums, submission.num_thread_blocks(), submission.stream()),
                  "launch of the copy kernel with checksums", nbytes);
  fetch_checksums(submission, made, options);
}

void run_checksum_kernel(Submission& submission, const Descriptors& made, const kvbm_cuda_options& options) {
  submission.upload(made.upload_nbytes);
  if (!submission.is_good()) return;
  const uint64_t nbytes = static_cast<uint64_t>(made.runs.num_blocks * made.runs.num_pieces * made.runs.piece_nbytes);
  const int num_thread_blocks = kChecksumSpread * submission.num_thread_blocks();
  submission.keep(launch_checksum(made.runs, made.sums, num_thread_blocks, submission.stream()),
                  "launch of the checksum kernel", nbytes);
  fetch_checksums(submission, made, options);
}

// Checksums of the side that lies on the device, by a kernel of their own.
void run_checksums_beside(Submission& submission, const kvbm_cuda_plan& plan, const kvbm_cuda_options& options) {
  kvbm_cuda_plan side = plan;
  kvbm_cuda_options side_options = options;
  if (!options.source_on_device && options.destination_on_device) {
    side.source_blocks = plan.destination_blocks;
    side.source_pieces = plan.destination_pieces;
    side_options.source_on_device = 1;
  }
  side.destination_blocks = nullptr;
  const Descriptors made = describe(side, join_pieces(side, true), side_options);
  run_checksum_kernel(submission, made, side_options);
}

void run_plain_copies(Submission& submission, const kvbm_cuda_plan& plan, const kvbm_cuda_options& options) {
  const bool is_host_source = !options.source_on_device, is_host_destination = !options.destination_on_device;
  const std::vector<Run> runs = join_pieces(plan, false);
  if (options.path == KVBM_CUDA_PATH_BATCH) {
    submission.copy_batch(flat_shapes(plan, runs), is_host_source, is_host_destination);
    return;
  }
  const cudaMemcpyKind kind = kind_of(!is_host_source, !is_host_destination);
  for (const Shape& shape : pitched_shapes(plan, runs)) {
    submission.copy_rows(shape, kind, is_host_source, is_host_destination);
  }
}

// Gather into dense staging and copy that to the host, or the other way round. The host side is cut as the host's
// pieces join, whatever the device's do.
void run_staged(Submission& submission, const kvbm_cuda_plan& plan, const kvbm_cuda_options& options) {
  const bool is_down = options.source_on_device != 0;
  const uint64_t block_nbytes = static_cast<uint64_t>(plan.num_pieces * plan.piece_nbytes);
  std::vector<uint64_t> dense_blocks(static_cast<std::size_t>(plan.num_blocks));
  std::vector<uint64_t> dense_pieces(static_cast<std::size_t>(plan.num_pieces));
  for (std::size_t i = 0; i < dense_blocks.size(); ++i) dense_blocks[i] = options.staging + i * block_nbytes;
  for (std::size_t j = 0; j < dense_pieces.size(); ++j) {
    dense_pieces[j] = j * static_cast<uint64_t>(plan.piece_nbytes);
  }
  kvbm_cuda_plan host = plan, inside = plan;
  (is_down ? host.source_blocks : host.destination_blocks) = dense_blocks.data();
  (is_down ? host.source_pieces : host.destination_pieces) = dense_pieces.data();
  (is_down ? inside.destination_blocks : inside.source_blocks) = dense_blocks.data();
  (is_down ? inside.destination_pieces : inside.source_pieces) = dense_pieces.data();
  kvbm_cuda_options inside_options = options;
  inside_options.source_on_device = inside_options.destination_on_device = 1;
  const Descriptors made = describe(inside, join_pieces(inside, false), inside_options);
  const auto move_host = [&] {
    const std::vector<Run> runs = join_pieces(host, false);
    const cudaMemcpyKind kind = is_down ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
    for (const Shape& shape : pitched_shapes(host, runs)) submission.copy_rows(shape, kind, !is_down, is_down);
  };
  if (!is_down) move_host();
  run_copy_kernel(submission, made, options);
  if (is_down) move_host();
}

}  // namespace
}  // namespace kvbm

using namespace kvbm;

uint64_t kvbm_cuda_scratch_nbytes(const kvbm_cuda_plan* plan, int with_checksums) {
  const uint64_t num_blocks = static_cast<uint64_t>(plan->num_blocks);
  const uint64_t num_pieces = static_cast<uint64_t>(plan->num_pieces);
  return 8 * (2 * num_blocks + 2 * num_pieces + (with_checksums != 0 ? 4 * num_blocks : 0));
}

int kvbm_cuda_copy(int device, const kvbm_cuda_plan* plan, const kvbm_cuda_options* options, kvbm_cuda_error* error) {
  constexpr const char* kCall = "kvbm_cuda_copy";
  if (const int code = check_process(kCall, device, error)) return code;
  const char* mistake = mistake_in_plan(*plan, false);
  if (mistake == nullptr && plan->num_blocks > 0) mistake = mistake_in_options(*plan, *options);
  if (mistake != nullptr) return refuse(cudaErrorInvalidValue, mistake, kCall, device, 0, error);
  if (plan->num_blocks == 0) return 0;
  if (options->path == KVBM_CUDA_PATH_BATCH && !has_batch_copy()) {
    return refuse(cudaErrorNotSupported, "this driver has no batched copy (CUDA 12.8 brought it): use another path",
                  "cuMemcpyBatchAsync", device, 0, error);
  }
  return submit(device, kCall, *options, error, [&](Submission& submission) {
    if (options->path == KVBM_CUDA_PATH_STAGED) {
      run_staged(submission, *plan, *options);
    } else if (options->path == KVBM_CUDA_PATH_KERNEL) {
      run_copy_kernel(submission, describe(*plan, join_pieces(*plan, false), *options), *options);
    } else {
      run_plain_copies(submission, *plan, *options);
      if (options->hashes != nullptr) run_checksums_beside(submission, *plan, *options);
    }
  });
}

int kvbm_cuda_checksum(int device, const kvbm_cuda_plan* plan, const kvbm_cuda_options* options,
                       kvbm_cuda_error* error) {
  constexpr const char* kCall = "kvbm_cuda_checksum";
  if (const int code = check_process(kCall, device, error)) return code;
  const char* mistake = mistake_in_plan(*plan, true);
  if (mistake == nullptr && options->hashes == nullptr) mistake = "checksums need the hashes of the blocks";
  if (mistake == nullptr && plan->num_blocks > 0) {
    mistake = mistake_in_scratch(*options, kvbm_cuda_scratch_nbytes(plan, 1));
  }
  if (mistake != nullptr) return refuse(cudaErrorInvalidValue, mistake, kCall, device, 0, error);
  if (plan->num_blocks == 0) return 0;
  return submit(device, kCall, *options, error, [&](Submission& submission) {
    kvbm_cuda_plan sources = *plan;
    sources.destination_blocks = nullptr;
    run_checksum_kernel(submission, describe(sources, join_pieces(sources, true), *options), *options);
  });
}
