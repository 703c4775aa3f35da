// The kernel that tells whether the binary holds code for a device.
#include "device_calls.h"
#include "device_code.cuh"

namespace kvbm {
namespace {

__global__ void present() {}

}  // namespace

const void* present_kernel() { return reinterpret_cast<const void*>(&present); }

}  // namespace kvbm
