// Cuts a batch into units, and a unit into pages for the kernel.
//
// A unit is a range of one block's byte stream that starts at a multiple of 4 KiB, so its chunks are whole and their
// digests add up in any order. Within a unit, runs of bytes that are contiguous on both sides are cut into pages:
//
//     stream of the block   |0    4096    8192    ...          |
//     pieces                |piece 0       |piece 1       |piece 2 ...
//     chunk across a seam               [####|##]         goes through a 4 KiB buffer
#include "copy_engine.hpp"

#include <atomic>
#include <cstring>

#include "copy_kernel.hpp"
#include "copy_threads.hpp"

namespace kvbm {
namespace {

constexpr std::size_t kUnitBytes = std::size_t{1} << 20;
constexpr std::size_t kSmallJobBytes = std::size_t{256} << 10;  // fits the cache, where plain stores are better
constexpr std::uint64_t kPrime64_1 = 0x9E3779B185EBCA87U;

std::uint64_t avalanche(std::uint64_t hash) {
  hash ^= hash >> 37;
  hash *= 0x165667919E3779F9U;
  return hash ^ (hash >> 32);
}

// Addresses arrive as integers from NumPy; the caller vouches for them.
const std::uint8_t* readable(std::uint64_t address) { return reinterpret_cast<const std::uint8_t*>(address); }
std::uint8_t* writable(std::uint64_t address) { return reinterpret_cast<std::uint8_t*>(address); }

bool is_line_aligned(const void* at) { return reinterpret_cast<std::uintptr_t>(at) % kLineBytes == 0; }

// Does pages in the order they come, kAhead pages late. What a plain copy of random blocks waits for, it has asked for
// by then: the page tables of both sides are walked when a page enters, and the head of a new run of bytes, which the
// processor's own prefetcher cannot foresee, is fetched kHeadAhead pages before its turn.
class PageQueue {
 public:
  PageQueue(const CopyJob& job, const CopyKernel& kernel, bool streams)
      : job_(job), kernel_(kernel), streams_(streams && job.destinations != nullptr) {}

  // Take one whole page that is contiguous on both sides; `destination` is null when there is nothing to copy.
  void push(std::size_t block, std::uint64_t chunk, const std::uint8_t* source, std::uint8_t* destination) {
    __builtin_prefetch(source, 0, 2);  // 2: into the second-level cache
    if (streams_) __builtin_prefetch(destination, 0, 2);
    const std::size_t turn = pushed_++;
    Page& slot = pages_[turn % kAhead];
    if (turn >= kAhead) move(slot);
    slot = {block, chunk, source, destination, source != run_end_};
    run_end_ = source + kChunkBytes;
    if (turn + kHeadAhead < kAhead) return;
    const Page& soon = pages_[(turn + kHeadAhead) % kAhead];
    if (!soon.starts_run) return;
    for (std::size_t line = 1; line < kHeadLines; ++line) __builtin_prefetch(soon.source + line * kLineBytes, 0, 2);
  }

  // Add the digest of a chunk to its block's checksum.
  void add(std::size_t block, std::uint64_t chunk, std::uint64_t digest) {
    if (block != block_) {
      publish();
      block_ = block;
    }
    sum_ += avalanche(digest + chunk * kPrime64_1);
  }

  // Do the pages that wait, and make everything visible to other threads.
  void finish() {
    const std::size_t waiting = pushed_ < kAhead ? pushed_ : kAhead;
    for (std::size_t i = pushed_ - waiting; i < pushed_; ++i) move(pages_[i % kAhead]);
    publish();
    kernel_.fence();
  }

 private:
  static constexpr std::size_t kAhead = 16;
  static constexpr std::size_t kHeadAhead = 4;
  static constexpr std::size_t kHeadLines = 16;

  struct Page {
    std::size_t block;
    std::uint64_t chunk;
    const std::uint8_t* source;
    std::uint8_t* destination;
    bool starts_run;
  };

  void move(const Page& page) {
    const bool streams = streams_ && is_line_aligned(page.destination);
    if (page.destination != nullptr && !streams) std::memcpy(page.destination, page.source, kChunkBytes);
    if (job_.checksums == nullptr) {
      if (streams) kernel_.copy_page(page.source, page.destination);
    } else {
      add(page.block, page.chunk,
          streams ? kernel_.copy_hash_page(page.source, page.destination) : kernel_.hash_page(page.source));
    }
  }

  void publish() {
    if (sum_ != 0) __atomic_fetch_add(&job_.checksums[block_], sum_, __ATOMIC_RELAXED);
    sum_ = 0;
  }

  const CopyJob& job_;
  const CopyKernel& kernel_;
  const bool streams_;
  Page pages_[kAhead];
  std::size_t pushed_ = 0;
  const std::uint8_t* run_end_ = nullptr;  // where the last page's source ends
  std::size_t block_ = 0;  // whose chunks `sum_` holds
  std::uint64_t sum_ = 0;
};

// One contiguous run of bytes on both sides; `destination` is null when there is nothing to copy.
struct Run {
  const std::uint8_t* source;
  std::uint8_t* destination;
  std::size_t nbytes;

  void skip(std::size_t count) {
    source += count;
    if (destination != nullptr) destination += count;
    nbytes -= count;
  }
};

// Call `visit(run)` for each run of bytes [start, stop) of a block's stream.
template <class Visit>
void for_each_run(const CopyJob& job, std::size_t block, std::size_t start, std::size_t stop, Visit visit) {
  std::size_t within = start % job.piece_nbytes;
  for (std::size_t piece = start / job.piece_nbytes; start < stop; ++piece, within = 0) {
    std::size_t nbytes = job.piece_nbytes - within;
    if (nbytes > stop - start) nbytes = stop - start;
    start += nbytes;
    const std::uint8_t* source = readable(job.sources[block] + job.source_pieces[piece]) + within;
    if (job.destinations == nullptr)
      visit(Run{source, nullptr, nbytes});
    else
      visit(Run{source, writable(job.destinations[block] + job.destination_pieces[piece]) + within, nbytes});
  }
}

// Copy bytes [start, stop) of a block's stream: align the destination, then whole pages, then the rest.
void copy_unit(const CopyJob& job, PageQueue& queue, std::size_t block, std::size_t start, std::size_t stop) {
  for_each_run(job, block, start, stop, [&](Run run) {
    const std::size_t head = -reinterpret_cast<std::uintptr_t>(run.destination) % kLineBytes;
    if (run.nbytes >= kChunkBytes + head) {
      std::memcpy(run.destination, run.source, head);
      run.skip(head);
      for (; run.nbytes >= kChunkBytes; run.skip(kChunkBytes)) queue.push(block, 0, run.source, run.destination);
    }
    std::memcpy(run.destination, run.source, run.nbytes);
  });
}

// Copy (or only read) bytes [start, stop) of a block's stream and add the digests of its chunks.
void sum_unit(const CopyJob& job, const CopyKernel& kernel, PageQueue& queue, std::size_t block, std::size_t start,
              std::size_t stop) {
  alignas(kLineBytes) std::uint8_t seam[kChunkBytes];
  std::size_t gathered = 0;  // bytes of the current chunk that lie in `seam`
  std::uint64_t chunk = start / kChunkBytes;
  for_each_run(job, block, start, stop, [&](Run run) {
    while (run.nbytes > 0) {
      if (gathered == 0 && run.nbytes >= kChunkBytes) {
        queue.push(block, chunk++, run.source, run.destination);
        run.skip(kChunkBytes);
        continue;
      }
      const std::size_t taken = kChunkBytes - gathered < run.nbytes ? kChunkBytes - gathered : run.nbytes;
      std::memcpy(seam + gathered, run.source, taken);
      if (run.destination != nullptr) std::memcpy(run.destination, run.source, taken);
      run.skip(taken);
      gathered += taken;
      if (gathered == kChunkBytes) {
        queue.add(block, chunk++, kernel.hash_page(seam));
        gathered = 0;
      }
    }
  });
  if (gathered == 0) return;
  std::memset(seam + gathered, 0, kChunkBytes - gathered);  // only the last chunk of a block is short
  queue.add(block, chunk, kernel.hash_page(seam));
}

struct SharedJob {
  const CopyJob& job;
  const CopyKernel& kernel;
  std::size_t block_nbytes;
  std::size_t units_per_block;
  bool streams;
  std::atomic<std::size_t> next_unit{0};
};

void work(void* context) {
  SharedJob& shared = *static_cast<SharedJob*>(context);
  const CopyJob& job = shared.job;
  const std::size_t num_units = job.num_blocks * shared.units_per_block;
  PageQueue queue(job, shared.kernel, shared.streams);
  for (;;) {
    const std::size_t unit = shared.next_unit.fetch_add(1, std::memory_order_relaxed);
    if (unit >= num_units) break;
    const std::size_t block = unit / shared.units_per_block;
    const std::size_t start = unit % shared.units_per_block * kUnitBytes;
    const std::size_t stop = start + kUnitBytes < shared.block_nbytes ? start + kUnitBytes : shared.block_nbytes;
    if (job.checksums == nullptr)
      copy_unit(job, queue, block, start, stop);
    else
      sum_unit(job, shared.kernel, queue, block, start, stop);
  }
  queue.finish();
}

}  // namespace

void run_copy_job(const CopyJob& job, int num_threads) {
  const std::size_t block_nbytes = job.num_pieces * job.piece_nbytes;
  const std::size_t total = block_nbytes * job.num_blocks;
  if (total > 0) {
    const bool is_small = total < kSmallJobBytes;
    SharedJob shared{job, copy_kernel(), block_nbytes, (block_nbytes + kUnitBytes - 1) / kUnitBytes, !is_small};
    run_in_team(work, &shared, is_small ? 1 : num_threads);
  }
  if (job.checksums == nullptr) return;
  for (std::size_t block = 0; block < job.num_blocks; ++block) {
    const std::uint64_t sum = avalanche(job.checksums[block] + block_nbytes);
    const std::uint64_t* hash = job.hashes + 2 * block;
    job.checksums[block] = avalanche(sum ^ avalanche(hash[0] + hash[1] * kPrime64_1));
  }
}

void run_memcpy_job(const CopyJob& job) {
  for (std::size_t block = 0; block < job.num_blocks; ++block)
    for (std::size_t piece = 0; piece < job.num_pieces; ++piece)
      std::memcpy(writable(job.destinations[block] + job.destination_pieces[piece]),
                  readable(job.sources[block] + job.source_pieces[piece]), job.piece_nbytes);
}

}  // namespace kvbm
