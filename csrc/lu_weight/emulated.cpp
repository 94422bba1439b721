// fastflow_emulated::lu_weight and lu_weight_backward: the CUDA kernels, run on the CPU.
#include "stable.h"

#include "emulated/emulated.h"
#include "lu_weight/kernels.h"

STABLE_TORCH_LIBRARY_IMPL(fastflow_emulated, CPU, m) {
  m.impl("lu_weight", TORCH_BOX(&fastflow::lu_weight<fastflow::Emulated>));
  m.impl("lu_weight_backward", TORCH_BOX(&fastflow::lu_weight_backward<fastflow::Emulated>));
}
