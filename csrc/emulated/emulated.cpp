// fastflow_emulated::order and raise_singular: what a test asks of the emulation itself.
#include "stable.h"

#include "emulated.h"
#include "singular.h"

namespace fastflow {

void set_order(int64_t order) { Emulated::order = order; }

}  // namespace fastflow

STABLE_TORCH_LIBRARY_FRAGMENT(fastflow_emulated, m) {
  m.def("set_order(int order) -> ()");
  m.def("raise_singular() -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastflow_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_order", TORCH_BOX(&fastflow::set_order));
  m.impl("raise_singular", TORCH_BOX(&fastflow::raise_singular<fastflow::Emulated>));
}
