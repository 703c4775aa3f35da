// Copies of the simulation: checked against the table of memory when they are queued, and again when they run.
//
// A copy with pageable memory acts at once, after what its stream holds: the strictest of what CUDA may do.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace kvbm {
namespace simulated {
namespace {

struct Box {
  uint64_t destination, source;
  uint64_t width, height, depth;
  uint64_t destination_pitch, source_pitch;
  uint64_t destination_slice, source_slice;

  uint64_t span(uint64_t pitch, uint64_t slice) const { return (depth - 1) * slice + (height - 1) * pitch + width; }
  uint64_t destination_span() const { return span(destination_pitch, destination_slice); }
  uint64_t source_span() const { return span(source_pitch, source_slice); }
};

enum class Side { kAny, kHost, kDevice };

cudaError_t check_side(uint64_t address, uint64_t nbytes, Side side, bool* is_pageable) {
  if (address == 0) return cudaErrorInvalidValue;
  const Range* const range = find_range(address);
  if (range == nullptr) {
    const auto after = state().ranges.upper_bound(address);
    if (side == Side::kDevice || (after != state().ranges.end() && after->first < address + nbytes)) {
      return cudaErrorInvalidValue;
    }
    *is_pageable = true;
    return cudaSuccess;
  }
  const bool is_device = range->type == cudaMemoryTypeDevice;
  if (address + nbytes > range->base + range->nbytes) return cudaErrorInvalidValue;
  if (side != Side::kAny && is_device != (side == Side::kDevice)) return cudaErrorInvalidValue;
  return cudaSuccess;
}

cudaError_t run_box(const Box& box, bool is_pageable) {
  char *to = reinterpret_cast<char*>(box.destination), *from = reinterpret_cast<char*>(box.source);
  {
    Lock lock(state().lock);
    const bool is_to_known = place_of(box.destination, box.destination_span(), -1, &to) == cudaSuccess;
    const bool is_from_known = place_of(box.source, box.source_span(), -1, &from) == cudaSuccess;
    if (!is_pageable && (!is_to_known || !is_from_known)) return cudaErrorIllegalAddress;
  }
  for (uint64_t z = 0; z < box.depth; ++z) {
    for (uint64_t y = 0; y < box.height; ++y) {
      std::memmove(to + z * box.destination_slice + y * box.destination_pitch,
                   from + z * box.source_slice + y * box.source_pitch, box.width);
    }
  }
  return cudaSuccess;
}

cudaError_t queue_boxes(const char* kind, std::vector<Box> boxes, cudaMemcpyKind direction, cudaStream_t handle,
                        Lock& lock) {
  const std::shared_ptr<Stream> stream = find_stream(handle);
  if (stream == nullptr) return keep(cudaErrorInvalidResourceHandle);
  if (direction < cudaMemcpyHostToHost || direction > cudaMemcpyDefault) return keep(cudaErrorInvalidMemcpyDirection);
  const bool is_any = direction == cudaMemcpyDefault;
  const bool is_from_device = direction == cudaMemcpyDeviceToHost || direction == cudaMemcpyDeviceToDevice;
  const bool is_to_device = direction == cudaMemcpyHostToDevice || direction == cudaMemcpyDeviceToDevice;
  const Side from = is_any ? Side::kAny : is_from_device ? Side::kDevice : Side::kHost;
  const Side to = is_any ? Side::kAny : is_to_device ? Side::kDevice : Side::kHost;
  Operation operation;
  operation.kind = kind;
  bool is_pageable = false;
  for (const Box& box : boxes) {
    if (box.destination_pitch < box.width || box.source_pitch < box.width) return keep(cudaErrorInvalidValue);
    cudaError_t code = check_side(box.source, box.source_span(), from, &is_pageable);
    if (code == cudaSuccess) code = check_side(box.destination, box.destination_span(), to, &is_pageable);
    if (code != cudaSuccess) return keep(code);
    operation.nbytes += box.width * box.height * box.depth;
  }
  operation.source = boxes.front().source;
  operation.destination = boxes.front().destination;
  if (is_pageable) {
    if (boxes.size() > 1) return keep(cudaErrorInvalidValue);
    operation.kind += ":pageable";
    operation.run = [box = boxes.front()] { return run_box(box, true); };
    if (const cudaError_t code = queue(lock, stream, std::move(operation))) return code;
    return drain(lock, stream, true);
  }
  operation.run = [boxes = std::move(boxes)]() -> cudaError_t {
    bool is_reversed;
    {
      Lock own(state().lock);
      is_reversed = state().is_reversed;
    }
    for (std::size_t i = 0; i < boxes.size(); ++i) {  // the copies of a batch have no order
      if (const cudaError_t code = run_box(boxes[is_reversed ? boxes.size() - 1 - i : i], false)) return code;
    }
    return cudaSuccess;
  };
  return queue(lock, stream, std::move(operation));
}

// As the driver has it, CUDA 13.
int memcpy_batch(uint64_t* destinations, uint64_t* sources, std::size_t* sizes, std::size_t count, void*,
                 std::size_t* indices, std::size_t num_attributes, cudaStream_t stream) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cuMemcpyBatchAsync")) return code;
  if (count == 0 || num_attributes != 1 || indices[0] != 0 || reinterpret_cast<uint64_t>(stream) <= 1) {
    return keep(cudaErrorInvalidValue);
  }
  std::vector<Box> boxes;
  for (std::size_t i = 0; i < count; ++i) {
    if (sizes[i] == 0) return keep(cudaErrorInvalidValue);
    boxes.push_back({destinations[i], sources[i], sizes[i], 1, 1, sizes[i], sizes[i], 0, 0});
  }
  return queue_boxes("batch", std::move(boxes), cudaMemcpyDefault, stream, lock);
}

// As CUDA 12.8 had it.
int memcpy_batch_12(uint64_t* destinations, uint64_t* sources, std::size_t* sizes, std::size_t count, void* attributes,
                    std::size_t* indices, std::size_t num_attributes, std::size_t* failed, cudaStream_t stream) {
  *failed = count;
  return memcpy_batch(destinations, sources, sizes, count, attributes, indices, num_attributes, stream);
}

}  // namespace

void* find_symbol(const char* name) {
  if (std::strcmp(name, "cuDevicePrimaryCtxGetState") == 0) return reinterpret_cast<void*>(&context_state);
  Lock lock(state().lock);
  const int version = state().batch_copy;
  if (version == 13 && std::strcmp(name, "cuMemcpyBatchAsync_v2") == 0) return reinterpret_cast<void*>(&memcpy_batch);
  const bool is_old = version == 12 && std::strcmp(name, "cuMemcpyBatchAsync") == 0;
  return is_old ? reinterpret_cast<void*>(&memcpy_batch_12) : nullptr;
}

}  // namespace simulated
}  // namespace kvbm

using namespace kvbm::simulated;

cudaError_t cudaMemcpyAsync(void* destination, const void* source, std::size_t nbytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaMemcpyAsync")) return code;
  if (nbytes == 0) return cudaSuccess;
  const Box box{reinterpret_cast<uint64_t>(destination), reinterpret_cast<uint64_t>(source), nbytes, 1, 1, nbytes,
                nbytes, 0, 0};
  return queue_boxes("memcpy", {box}, kind, stream, lock);
}

cudaError_t cudaMemcpy2DAsync(void* destination, std::size_t destination_pitch, const void* source,
                              std::size_t source_pitch, std::size_t width, std::size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaMemcpy2DAsync")) return code;
  if (width == 0 || height == 0) return cudaSuccess;
  const Box box{reinterpret_cast<uint64_t>(destination), reinterpret_cast<uint64_t>(source), width, height, 1,
                destination_pitch, source_pitch, 0, 0};
  return queue_boxes("memcpy2d", {box}, kind, stream, lock);
}

cudaError_t cudaMemcpy3DAsync(const cudaMemcpy3DParms* copy, cudaStream_t stream) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaMemcpy3DAsync")) return code;
  const cudaExtent& extent = copy->extent;
  if (extent.width == 0 || extent.height == 0 || extent.depth == 0) return cudaSuccess;
  if (copy->srcArray != nullptr || copy->dstArray != nullptr) return keep(cudaErrorInvalidValue);
  const auto start = [](const cudaPitchedPtr& at, const cudaPos& from) {
    return reinterpret_cast<uint64_t>(at.ptr) + (from.z * at.ysize + from.y) * at.pitch + from.x;
  };
  if (copy->srcPtr.ysize < extent.height || copy->dstPtr.ysize < extent.height) return keep(cudaErrorInvalidValue);
  const Box box{start(copy->dstPtr, copy->dstPos), start(copy->srcPtr, copy->srcPos), extent.width, extent.height,
                extent.depth, copy->dstPtr.pitch, copy->srcPtr.pitch, copy->dstPtr.pitch * copy->dstPtr.ysize,
                copy->srcPtr.pitch * copy->srcPtr.ysize};
  return queue_boxes("memcpy3d", {box}, copy->kind, stream, lock);
}

cudaError_t cudaMemsetAsync(void* address, int value, std::size_t nbytes, cudaStream_t handle) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaMemsetAsync")) return code;
  if (nbytes == 0) return cudaSuccess;
  const std::shared_ptr<Stream> stream = find_stream(handle);
  if (stream == nullptr) return keep(cudaErrorInvalidResourceHandle);
  const uint64_t at = reinterpret_cast<uint64_t>(address);
  char* bytes = nullptr;
  if (place_of(at, nbytes, -1, &bytes) != cudaSuccess) return keep(cudaErrorInvalidValue);
  Operation operation;
  operation.kind = "memset";
  operation.nbytes = nbytes;
  operation.destination = at;
  operation.run = [=]() -> cudaError_t {
    char* now = nullptr;
    {
      Lock own(state().lock);
      if (place_of(at, nbytes, -1, &now) != cudaSuccess) return cudaErrorIllegalAddress;
    }
    std::memset(now, value, nbytes);
    return cudaSuccess;
  };
  return queue(lock, stream, std::move(operation));
}
