// fastflow_C::conv1x1, conv1x1_backward and conv1x1_inverse_backward on CUDA.
#include "stable.h"

#include "conv1x1/kernels.h"
#include "cuda/device.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CUDA, m) {
  m.impl("conv1x1", TORCH_BOX(&fastflow::conv1x1<fastflow::Cuda>));
  m.impl("conv1x1_backward", TORCH_BOX(&fastflow::conv1x1_backward<fastflow::Cuda>));
  m.impl("conv1x1_inverse_backward", TORCH_BOX(&fastflow::conv1x1_inverse_backward<fastflow::Cuda>));
}
