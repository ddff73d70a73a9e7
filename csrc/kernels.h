// What the kernel files offer to library.cpp.
#pragma once
#include "capability.h"
#include "parallel.h"

namespace fused_l2 {

extern const PerCapability<PieceFunction> sgd_kernels;
extern const PerCapability<PieceFunction> adam_kernels;

// Sum of x^2 over `count` elements, in float64 and in an order that depends on `count` alone.
using SumOfSquares = double (*)(const void* x, int64_t element_type, int64_t count);
extern const PerCapability<SumOfSquares> sum_of_squares_kernels;

}  // namespace fused_l2
