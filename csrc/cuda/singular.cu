// fastflow_C::raise_singular: raises the error that a kernel has reported; see singular.h.
#include "stable.h"

#include "cuda/device.cuh"
#include "singular.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fastflow_C, m) { m.def("raise_singular() -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CompositeExplicitAutograd, m) {
  m.impl("raise_singular", TORCH_BOX(&fastflow::raise_singular<fastflow::Cuda>));
}
