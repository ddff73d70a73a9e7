#define FUSED_L2_KERNELS "sgd_kernels.h"
#include "foreach_capability.h"
#include "kernels.h"

namespace fused_l2 {
const PerCapability<PieceFunction> sgd_kernels = FUSED_L2_PER_CAPABILITY(sgd);
}
