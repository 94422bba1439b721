// fastflow_emulated::triangular_solve: the CUDA kernels, run on the CPU.
#include "stable.h"

#include "emulated/emulated.h"
#include "triangular_solve/kernels.h"

STABLE_TORCH_LIBRARY_IMPL(fastflow_emulated, CPU, m) {
  m.impl("triangular_solve", TORCH_BOX(&fastflow::triangular_solve<fastflow::Emulated>));
}
