#include "capability.h"

#if FUSED_L2_X86
#include <cpuid.h>
#endif

namespace fused_l2 {

const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::avx2: return "avx2";
    case Capability::avx512: return "avx512";
    default: return "baseline";
  }
}

#if FUSED_L2_X86
namespace {
// Not among the names that __builtin_cpu_supports knows in GCC 10 and Clang 17.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}
}  // namespace
#endif

bool is_supported(Capability capability) {
#if FUSED_L2_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  switch (capability) {
    case Capability::baseline: return true;
    case Capability::avx2: return has_avx2;
    case Capability::avx512:
      return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    default: return false;
  }
#else
  return capability == Capability::baseline;
#endif
}

bool is_intel() {
#if FUSED_L2_X86
  static const bool intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
  return intel;
#else
  return false;
#endif
}

namespace {
Capability best() {
  if (is_supported(Capability::avx512)) return Capability::avx512;
  return is_supported(Capability::avx2) ? Capability::avx2 : Capability::baseline;
}
Capability active = best();
}  // namespace

Capability active_capability() { return active; }
void activate(Capability capability) { active = capability; }

}  // namespace fused_l2
