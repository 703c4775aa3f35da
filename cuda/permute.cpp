// Submissions of permutes. Scratch: source blocks, destination blocks, source regions, destination regions, u64 each.
#include <cstring>

#include "kernels.h"
#include "submission.h"

using namespace kvbm;

uint64_t kvbm_cuda_permute_scratch_nbytes(const kvbm_cuda_permute* permute) {
  return 16 * static_cast<uint64_t>(permute->num_blocks + permute->num_regions);
}

int kvbm_cuda_permute_copy(int device, const kvbm_cuda_permute* permute, const kvbm_cuda_options* options,
                           kvbm_cuda_error* error) {
  constexpr const char* kCall = "kvbm_cuda_permute_copy";
  if (const int code = check_process(kCall, device, error)) return code;
  const kvbm_cuda_permute& of = *permute;
  const char* mistake = nullptr;
  if (of.num_blocks < 0 || of.num_regions < 0) mistake = "num_blocks or num_regions is negative";
  if (of.num_tokens < 1 || of.num_heads < 1 || of.head_nbytes < 1) {
    mistake = "tokens, heads and head_nbytes must be 1 or more";
  }
  if (options->hashes != nullptr) mistake = "a permute gives no checksums";
  const bool is_empty = of.num_blocks == 0 || of.num_regions == 0;
  if (mistake == nullptr && !is_empty) {
    mistake = mistake_in_scratch(*options, kvbm_cuda_permute_scratch_nbytes(permute));
  }
  if (mistake != nullptr) return refuse(cudaErrorInvalidValue, mistake, kCall, device, 0, error);
  if (is_empty) return 0;
  uint64_t* at = reinterpret_cast<uint64_t*>(options->pinned);
  const uint64_t* there = reinterpret_cast<const uint64_t*>(options->scratch);
  const auto place = [&](const uint64_t* from, int64_t n) {
    std::memcpy(at, from, static_cast<std::size_t>(n) * 8);
    const uint64_t* const placed = there;
    at += n;
    there += n;
    return placed;
  };
  PermuteRegions regions{};
  regions.source_blocks = place(of.source_blocks, of.num_blocks);
  regions.destination_blocks = place(of.destination_blocks, of.num_blocks);
  regions.source_regions = place(of.source_regions, of.num_regions);
  regions.destination_regions = place(of.destination_regions, of.num_regions);
  regions.num_blocks = of.num_blocks;
  regions.num_regions = of.num_regions;
  regions.num_tokens = of.num_tokens;
  regions.num_heads = of.num_heads;
  regions.head_nbytes = of.head_nbytes;
  regions.source_token = of.source_token;
  regions.source_head = of.source_head;
  regions.destination_token = of.destination_token;
  regions.destination_head = of.destination_head;
  return submit(device, kCall, *options, error, [&](Submission& submission) {
    submission.upload(kvbm_cuda_permute_scratch_nbytes(permute));
    if (!submission.is_good()) return;
    submission.keep(launch_permute(regions, submission.num_thread_blocks(), submission.stream()),
                    "launch of the permute kernel", 0);
  });
}
