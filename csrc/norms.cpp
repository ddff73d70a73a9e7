#include "kernels.h"

#define FUSED_L2_KERNELS "norms_kernels.h"
#include "foreach_capability.h"

namespace fused_l2 {
const PerCapability<Norm> sum_of_squares_kernels = FUSED_L2_PER_CAPABILITY(sum_of_squares);
const PerCapability<StepMeasured> step_measured_kernels = FUSED_L2_PER_CAPABILITY(step_measured);
const PerCapability<Norm> largest_kernels = FUSED_L2_PER_CAPABILITY(largest);
}  // namespace fused_l2
