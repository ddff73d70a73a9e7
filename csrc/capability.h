// CPU instruction sets: which are compiled in, which this machine has, which one is in use.
#pragma once

// The two x86 sets need per-function targets, which GCC and Clang have.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FUSED_L2_X86 1
#else
#define FUSED_L2_X86 0
#endif

#define FUSED_L2_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FUSED_L2_BEGIN_TARGET(list) \
  FUSED_L2_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define FUSED_L2_END_TARGET FUSED_L2_PRAGMA(clang attribute pop)
#else
#define FUSED_L2_BEGIN_TARGET(list) FUSED_L2_PRAGMA(GCC push_options) FUSED_L2_PRAGMA(GCC target(list))
#define FUSED_L2_END_TARGET FUSED_L2_PRAGMA(GCC pop_options)
#endif

#if defined(_MSC_VER)
#define FUSED_L2_INLINE __forceinline
#define FUSED_L2_NOINLINE __declspec(noinline)
#define FUSED_L2_SMALL __declspec(noinline)
#define FUSED_L2_LIKELY(condition) (condition)
#else
#define FUSED_L2_NOINLINE __attribute__((noinline))
#define FUSED_L2_SMALL __attribute__((noinline, cold))  // rather small than fast
#define FUSED_L2_LIKELY(condition) __builtin_expect(!!(condition), 1)
#define FUSED_L2_INLINE inline __attribute__((always_inline))
#endif

namespace fused_l2 {

enum class Capability : int { baseline, avx2, avx512, count };

const char* name_of(Capability);
bool is_supported(Capability);
bool is_intel();
Capability active_capability();
void activate(Capability);

// A table of one function per instruction set; `get()` is the one in use.
template <class Function> struct PerCapability {
  Function baseline, avx2, avx512;

  Function get() const {
    switch (active_capability()) {
      case Capability::avx512: return avx512;
      case Capability::avx2: return avx2;
      default: return baseline;
    }
  }
};

#if FUSED_L2_X86
#define FUSED_L2_PER_CAPABILITY(function) {baseline::function, avx2::function, avx512::function}
#else
#define FUSED_L2_PER_CAPABILITY(function) {baseline::function, baseline::function, baseline::function}
#endif

}  // namespace fused_l2
