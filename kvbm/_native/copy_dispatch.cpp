// Chooses the kernel once, by what the processor and the operating system support.
#include <cstdlib>
#include <cstring>
#include <string>

#include "copy_kernel.hpp"

namespace kvbm {
namespace {

struct Choice {
  const CopyKernel* kernel = &kBaselineKernel;
  std::string names = kBaselineKernel.name;

  Choice() {
#if defined(__x86_64__)
    const char* limit = std::getenv("KVBM_CPU");
    const bool baseline = limit != nullptr && std::strcmp(limit, "baseline") == 0;
    const bool no_avx512 = baseline || (limit != nullptr && std::strcmp(limit, "avx2") == 0);
    // These ask cpuid and xgetbv, so registers that the system does not save count as absent.
    __builtin_cpu_init();
    if (!baseline && __builtin_cpu_supports("avx2")) take(&kAvx2Kernel, "avx2");
    if (!no_avx512 && __builtin_cpu_supports("avx512f")) take(&kAvx512Kernel, "avx512f");
#endif
  }

  void take(const CopyKernel* better, const char* name) {
    kernel = better;
    names += ' ';
    names += name;
  }
};

const Choice& choice() {
  static const Choice chosen;
  return chosen;
}

}  // namespace

const CopyKernel& copy_kernel() { return *choice().kernel; }
const char* cpu_feature_names() { return choice().names.c_str(); }

}  // namespace kvbm
