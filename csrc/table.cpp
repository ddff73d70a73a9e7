#include "table.h"

#include <string>

namespace fused_l2 {

const char* layout() {
#define FUSED_L2_SPELL(name) #name " "
#define FUSED_L2_SPELL_MEMBER(type, name) #name " "
  // clang-format off
  static const std::string spelled =
      "columns " FUSED_L2_COLUMNS(FUSED_L2_SPELL)
      "bucket " FUSED_L2_BUCKET(FUSED_L2_SPELL_MEMBER)
      "sgd " FUSED_L2_SGD(FUSED_L2_SPELL)
      "adam " FUSED_L2_ADAM(FUSED_L2_SPELL)
      "rules " FUSED_L2_RULES(FUSED_L2_SPELL)
      "dtypes " FUSED_L2_DTYPES(FUSED_L2_SPELL)
      "flags " FUSED_L2_FLAGS(FUSED_L2_SPELL)
      "row_flags " FUSED_L2_ROW_FLAGS(FUSED_L2_SPELL)
      "statistics " FUSED_L2_STATISTICS(FUSED_L2_SPELL)
      "step_count " + std::to_string(kStepCount) + " width " + std::to_string(kCoefficients) + " group " +
      std::to_string(kGroup) + " ";
  // clang-format on
  return spelled.c_str();
}

}  // namespace fused_l2
