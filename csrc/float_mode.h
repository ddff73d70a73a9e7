// The floating-point mode of a thread: other code may have left one in which small numbers are flushed to zero
// (`torch.set_flush_denormal`, libraries built with -ffast-math), results are rounded in another direction, or
// exceptions trap. Kernels compute in IEEE's default mode on every thread, and leave the mode that they found.
#pragma once
#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#elif !defined(__aarch64__)
#include <cfenv>
#endif

namespace fused_l2 {

// The default mode for as long as this lives. A few cycles where it is the thread's anyway.
class DefaultFloatMode {
#if defined(__x86_64__) || defined(_M_X64)
  // MXCSR: flush to zero, rounding, masks of exceptions, denormals are zero; below them sticky bits of no interest.
  static constexpr unsigned kControl = 0xffc0, kDefault = 0x1f80;
  static unsigned get() { return _mm_getcsr(); }
  static void set(unsigned mode) { _mm_setcsr(mode); }
  unsigned found;
#elif defined(__aarch64__)
  // FPCR: alternative half precision, default NaN, flush to zero, rounding, flush to zero of halves, traps, and the
  // modes that FEAT_AFP adds.
  static constexpr uint64_t kControl = 0x7c89f07, kDefault = 0;
  static uint64_t get() {
    uint64_t mode;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(uint64_t mode) { __asm__ __volatile__("msr fpcr, %0" : : "r"(mode)); }
  uint64_t found;
#endif

 public:
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;
#if defined(__x86_64__) || defined(_M_X64) || defined(__aarch64__)
  DefaultFloatMode() : found(get()) {
    if ((found & kControl) != kDefault) set((found & ~kControl) | kDefault);
  }
  ~DefaultFloatMode() {
    if ((found & kControl) != kDefault) set(found);
  }
#else
  DefaultFloatMode() {
    std::fegetenv(&found);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatMode() { std::fesetenv(&found); }

 private:
  std::fenv_t found;
#endif
};

}  // namespace fused_l2
