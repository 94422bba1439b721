// fastflow_emulated::masked_inverse and masked_solve: the CUDA kernels, run on the CPU.
#include "stable.h"

#include "emulated/emulated.h"
#include "masked_inverse/kernels.h"

STABLE_TORCH_LIBRARY_IMPL(fastflow_emulated, CPU, m) {
  m.impl("masked_inverse", TORCH_BOX(&fastflow::masked_inverse<fastflow::Emulated>));
  m.impl("masked_solve", TORCH_BOX(&fastflow::masked_solve<fastflow::Emulated>));
}
