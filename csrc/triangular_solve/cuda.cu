// fastflow_C::triangular_solve on CUDA.
#include "stable.h"

#include "cuda/device.cuh"
#include "triangular_solve/kernels.h"

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CUDA, m) {
  m.impl("triangular_solve", TORCH_BOX(&fastflow::triangular_solve<fastflow::Cuda>));
}
