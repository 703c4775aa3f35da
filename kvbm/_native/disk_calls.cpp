// One operation of a disk queue, from its first call to its last: bounce buffers, short counts, calls made again.
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "disk_queue.hpp"

namespace kvbm {
namespace {

constexpr int64_t kPage = 4096;  // what direct I/O is aligned to: offset, size and address
constexpr int kMaxStuck = 8;  // calls in a row that move less than a page

// Give what lies behind the first bytes of an operation's buffers.
void pass_on(DiskOperation* operation, int64_t num_moved) {
  size_t nbytes = static_cast<size_t>(num_moved);
  while (operation->num_rest && nbytes >= operation->rest->iov_len) {
    nbytes -= operation->rest->iov_len;
    ++operation->rest;
    --operation->num_rest;
  }
  if (!nbytes) return;
  operation->rest->iov_base = static_cast<char*>(operation->rest->iov_base) + nbytes;
  operation->rest->iov_len -= nbytes;
}

// Let the next call move some bytes only.
void cut_short(DiskOperation* operation, int64_t num_moved) {
  size_t nbytes = static_cast<size_t>(num_moved);
  iovec* buffer = operation->rest;
  for (; nbytes > buffer->iov_len; ++buffer) nbytes -= buffer->iov_len;
  operation->cut = buffer;
  operation->cut_nbytes = buffer->iov_len;
  buffer->iov_len = nbytes;
  operation->num_call = static_cast<int>(buffer - operation->rest) + 1;
}

}  // namespace

// Make ready what the calls move: the caller's buffers, or one aligned buffer with a slot for each block.
void DiskQueue::begin(DiskOperation* operation) {
  const DiskBatch& batch = *operation->batch;
  operation->rest = operation->buffers;
  operation->num_rest = operation->num_buffers;
  if (!batch.slot_nbytes) return;
  operation->error = posix_memalign(&operation->bounce_memory, kPage, static_cast<size_t>(operation->nbytes));
  if (operation->error) {
    operation->bounce_memory = nullptr;
    return;
  }
  operation->bounce = {operation->bounce_memory, static_cast<size_t>(operation->nbytes)};
  operation->rest = &operation->bounce;
  operation->num_rest = 1;
  if (batch.is_read) return;
  char* slot = static_cast<char*>(operation->bounce_memory);
  const size_t block_nbytes = static_cast<size_t>(batch.block_nbytes);
  for (int i = 0; i < operation->num_buffers; ++i, slot += batch.slot_nbytes) {
    memcpy(slot, operation->buffers[i].iov_base, block_nbytes);
    memset(slot + block_nbytes, 0, static_cast<size_t>(batch.slot_nbytes) - block_nbytes);
  }
}

// Give the blocks that were read whole to the caller, and the bounce buffer back.
void DiskQueue::end(DiskOperation* operation) {
  const DiskBatch& batch = *operation->batch;
  if (!operation->bounce_memory) return;
  if (batch.is_read) {
    const char* slot = static_cast<const char*>(operation->bounce_memory);
    const int64_t num_whole = operation->moved / batch.slot_nbytes;
    for (int64_t i = 0; i < num_whole; ++i, slot += batch.slot_nbytes) {
      memcpy(operation->buffers[i].iov_base, slot, static_cast<size_t>(batch.block_nbytes));
    }
  }
  free(operation->bounce_memory);
  operation->bounce_memory = nullptr;
}

// A test's answer, where there is one, stays with the operation until the call has ended.
void DiskQueue::begin_call(DiskOperation* operation) {
  operation->num_call = operation->num_rest;
  if (!has_answers_) return;
  int64_t answer;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (answers_.empty()) return;
    answer = answers_.front();
    answers_.pop_front();
    has_answers_ = !answers_.empty();
  }
  if (answer >= operation->nbytes - operation->moved) return;
  // Direct I/O moves whole pages: what is beyond them is claimed, not moved.
  const int64_t real = answer < 0 ? 0 : answer / kPage * kPage;
  operation->forced = answer - real;
  if (real) {
    cut_short(operation, real);
  } else {
    operation->num_call = 0;
  }
}

ssize_t DiskQueue::call(DiskOperation* operation) {
  begin_call(operation);
  if (!operation->num_call) return 0;
  const off_t offset = static_cast<off_t>(operation->offset + operation->moved);
  const ssize_t result = operation->batch->is_read ? preadv(fd_, operation->rest, operation->num_call, offset)
                                                   : pwritev(fd_, operation->rest, operation->num_call, offset);
  return result < 0 ? -errno : result;
}

// Note how a call ended; true when the operation has ended too, else it goes on with another call.
bool DiskQueue::end_call(DiskOperation* operation, int64_t result) {
  ++operation->num_calls;
  if (operation->cut) operation->cut->iov_len = operation->cut_nbytes;
  operation->cut = nullptr;
  if (!operation->num_call || result > 0) result += operation->forced;
  operation->forced = 0;
  if (result == -EINTR) return false;
  if (result < 0 && result != -EAGAIN) {
    operation->error = static_cast<int>(-result);
    return true;
  }
  const bool is_at_end = result == 0 && operation->batch->is_read;  // somebody has cut the file short
  if (result < 0) result = 0;
  if (is_direct_ && operation->moved + result < operation->nbytes) result -= result % kPage;
  pass_on(operation, result);
  operation->moved += result;
  if (operation->moved == operation->nbytes) return true;
  operation->num_stuck = result ? 0 : operation->num_stuck + 1;
  if (is_at_end || operation->num_stuck > kMaxStuck) operation->error = EIO;
  return operation->error != 0;
}

}  // namespace kvbm
