// Memory of the simulation. An address of device memory is reserved and never accessible; its bytes lie elsewhere, with
// a page that nobody may touch on each side. So host code that follows a device address faults, as it does with a GPU.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "state.h"

namespace kvbm {
namespace simulated {
namespace {

constexpr int kPoison = 0xA5;
constexpr std::size_t kAlignment = 256;  // of cudaMalloc

std::size_t page_nbytes() {
  static const std::size_t nbytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return nbytes;
}

char* reserve(std::size_t nbytes) {
  void* const at = ::mmap(nullptr, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return at == MAP_FAILED ? nullptr : static_cast<char*>(at);
}

bool map_bytes(Range& range) {
  const std::size_t page = page_nbytes();
  const std::size_t nbytes = (range.nbytes + page - 1) / page * page;
  char* const names = reserve(nbytes + 2 * page);
  char* const bytes = names == nullptr ? nullptr : reserve(nbytes + 2 * page);
  if (bytes == nullptr || ::mprotect(bytes + page, nbytes, PROT_READ | PROT_WRITE) != 0) {
    if (names != nullptr) ::munmap(names, nbytes + 2 * page);
    if (bytes != nullptr) ::munmap(bytes, nbytes + 2 * page);
    return false;
  }
  range.base = reinterpret_cast<uint64_t>(names + page);
  range.bytes = bytes + page;
  range.mapped_nbytes = nbytes;
  std::memset(range.bytes, kPoison, nbytes);
  return true;
}

void unmap_bytes(const Range& range) {
  const std::size_t page = page_nbytes(), nbytes = range.mapped_nbytes + 2 * page;
  ::munmap(range.bytes - page, nbytes);
  ::munmap(reinterpret_cast<char*>(range.base) - page, nbytes);
}

}  // namespace

const Range* find_range(uint64_t address) {
  const auto& ranges = state().ranges;
  auto after = ranges.upper_bound(address);
  if (after == ranges.begin()) return nullptr;
  const Range& range = std::prev(after)->second;
  return address - range.base < range.nbytes ? &range : nullptr;
}

cudaError_t place_of(uint64_t address, uint64_t nbytes, int device, char** bytes) {
  const Range* const range = find_range(address);
  if (range == nullptr || address + nbytes > range->base + range->nbytes) return cudaErrorIllegalAddress;
  if (range->type == cudaMemoryTypeDevice && device >= 0 && range->device != device) return cudaErrorIllegalAddress;
  *bytes = range->bytes + (address - range->base);
  return cudaSuccess;
}

void release_everything(State& all) {
  for (const auto& [base, range] : all.ranges) {
    if (range.type == cudaMemoryTypeDevice) unmap_bytes(range);
  }
  all.ranges.clear();
}

}  // namespace simulated
}  // namespace kvbm

using namespace kvbm::simulated;

cudaError_t cudaMalloc(void** address, std::size_t nbytes) {
  Lock lock(state().lock);
  *address = nullptr;
  if (const cudaError_t code = enter(lock, "cudaMalloc")) return code;
  if (nbytes == 0) return cudaSuccess;
  State& all = state();
  DeviceState& device = all.devices[current_device()];
  const uint64_t taken = (nbytes + kAlignment - 1) / kAlignment * kAlignment;
  Range range{0, nbytes, cudaMemoryTypeDevice, current_device(), nullptr, 0};
  if (taken < nbytes || taken > all.total_nbytes - device.used_nbytes || device.used_nbytes > all.total_nbytes ||
      !map_bytes(range)) {
    return keep(cudaErrorMemoryAllocation);
  }
  device.used_nbytes += taken;
  all.ranges[range.base] = range;
  *address = reinterpret_cast<void*>(range.base);
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  Lock lock(state().lock);
  if (const cudaError_t code = injected("cudaFree")) return keep(code);
  if (address == nullptr) return cudaSuccess;
  State& all = state();
  auto found = all.ranges.find(reinterpret_cast<uint64_t>(address));
  if (found == all.ranges.end() || found->second.type != cudaMemoryTypeDevice) return keep(cudaErrorInvalidValue);
  const int owner = found->second.device;
  drain_device(lock, owner);  // as CUDA: memory is not taken from under what still runs
  found = all.ranges.find(reinterpret_cast<uint64_t>(address));
  if (found == all.ranges.end()) return keep(cudaErrorInvalidValue);
  const Range range = found->second;
  all.ranges.erase(found);
  all.devices[owner].used_nbytes -= (range.nbytes + kAlignment - 1) / kAlignment * kAlignment;
  unmap_bytes(range);
  return keep(all.devices[owner].sticky);
}

cudaError_t cudaMemGetInfo(std::size_t* free_nbytes, std::size_t* total_nbytes) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaMemGetInfo")) return code;
  const uint64_t used = state().devices[current_device()].used_nbytes;
  *total_nbytes = state().total_nbytes;
  *free_nbytes = used > state().total_nbytes ? 0 : state().total_nbytes - used;
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* address, std::size_t nbytes, unsigned int flags) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaHostRegister")) return code;
  State& all = state();
  const uint64_t base = reinterpret_cast<uint64_t>(address);
  if (base == 0 || nbytes == 0 || (flags & ~3U) != 0) return keep(cudaErrorInvalidValue);
  const auto after = all.ranges.lower_bound(base);
  if (find_range(base) != nullptr || (after != all.ranges.end() && after->first < base + nbytes)) {
    return keep(cudaErrorHostMemoryAlreadyRegistered);
  }
  all.ranges[base] = Range{base, nbytes, cudaMemoryTypeHost, current_device(), static_cast<char*>(address), nbytes};
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* address) {
  Lock lock(state().lock);
  if (const cudaError_t code = injected("cudaHostUnregister")) return keep(code);
  State& all = state();
  const auto found = all.ranges.find(reinterpret_cast<uint64_t>(address));
  if (found == all.ranges.end() || found->second.type != cudaMemoryTypeHost) {
    return keep(cudaErrorHostMemoryNotRegistered);
  }
  const int owner = found->second.device;
  all.ranges.erase(found);
  return keep(owner < all.num_devices ? all.devices[owner].sticky : cudaSuccess);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaPointerGetAttributes")) return code;
  const Range* const range = find_range(reinterpret_cast<uint64_t>(address));
  std::memset(attributes, 0, sizeof *attributes);
  attributes->device = -2;  // cudaInvalidDeviceId
  if (range == nullptr) return cudaSuccess;
  attributes->type = range->type;
  attributes->device = range->device;
  attributes->devicePointer = const_cast<void*>(address);
  attributes->hostPointer = range->type == cudaMemoryTypeHost ? const_cast<void*>(address) : nullptr;
  return cudaSuccess;
}
