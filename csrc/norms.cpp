#define FUSED_L2_KERNELS "norms_kernels.h"
#include "foreach_capability.h"
#include "kernels.h"

namespace fused_l2 {
const PerCapability<SumOfSquares> sum_of_squares_kernels = FUSED_L2_PER_CAPABILITY(sum_of_squares);
}
