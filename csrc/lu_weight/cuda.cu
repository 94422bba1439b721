// fastflow_C::lu_weight and lu_weight_backward on CUDA.
#include "stable.h"

#include "cuda/device.cuh"
#include "lu_weight/kernels.h"

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CUDA, m) {
  m.impl("lu_weight", TORCH_BOX(&fastflow::lu_weight<fastflow::Cuda>));
  m.impl("lu_weight_backward", TORCH_BOX(&fastflow::lu_weight_backward<fastflow::Cuda>));
}
