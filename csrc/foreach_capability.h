// Compiles FUSED_L2_KERNELS (a header without include guard) once per instruction set, each copy in a namespace
// of its own: fused_l2::baseline, fused_l2::avx2, fused_l2::avx512. The standard headers come first, so that no
// function of theirs is compiled for an instruction set the machine may lack.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "capability.h"
#include "dtypes.h"
#include "table.h"
#if FUSED_L2_X86
#include <immintrin.h>
#endif

#define FUSED_L2_NAMESPACE baseline
#include "vectors_baseline.h"
#include FUSED_L2_KERNELS
#undef FUSED_L2_NAMESPACE

#if FUSED_L2_X86
#define FUSED_L2_NAMESPACE avx2
FUSED_L2_BEGIN_TARGET("avx2,fma,f16c")
#include "vectors_avx2.h"
#include FUSED_L2_KERNELS
FUSED_L2_END_TARGET
#undef FUSED_L2_NAMESPACE

#define FUSED_L2_NAMESPACE avx512
#if defined(__clang__)
FUSED_L2_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#else  // in the loops that it makes vectors of itself, GCC takes half of the width unless told
FUSED_L2_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#include "vectors_avx512.h"
#include FUSED_L2_KERNELS
FUSED_L2_END_TARGET
#undef FUSED_L2_NAMESPACE
#endif
