// fastflow_emulated::conv1x1, conv1x1_backward and conv1x1_inverse_backward: the CUDA kernels, run on the
// CPU.
#include "stable.h"

#include "conv1x1/kernels.h"
#include "emulated/emulated.h"

STABLE_TORCH_LIBRARY_IMPL(fastflow_emulated, CPU, m) {
  m.impl("conv1x1", TORCH_BOX(&fastflow::conv1x1<fastflow::Emulated>));
  m.impl("conv1x1_backward", TORCH_BOX(&fastflow::conv1x1_backward<fastflow::Emulated>));
  m.impl("conv1x1_inverse_backward", TORCH_BOX(&fastflow::conv1x1_inverse_backward<fastflow::Emulated>));
}
