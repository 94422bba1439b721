// fastflow_C::masked_inverse and masked_solve on CUDA.
#include "stable.h"

#include "cuda/device.cuh"
#include "masked_inverse/kernels.h"

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CUDA, m) {
  m.impl("masked_inverse", TORCH_BOX(&fastflow::masked_inverse<fastflow::Cuda>));
  m.impl("masked_solve", TORCH_BOX(&fastflow::masked_solve<fastflow::Cuda>));
}
