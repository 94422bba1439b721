// fastflow_emulated::configure, limit_shared_memory and raise_singular, for tests.
#include "stable.h"

#include "emulated/emulated.h"
#include "singular.h"

namespace fastflow {

void configure(int64_t order, int64_t multiprocessors) {
  Emulated::order = order;
  Emulated::processors = multiprocessors;
}

void limit_shared_memory(int64_t bytes) { Emulated::shared = bytes; }

}  // namespace fastflow

STABLE_TORCH_LIBRARY_FRAGMENT(fastflow_emulated, m) {
  m.def("configure(int order, int multiprocessors) -> ()");
  m.def("limit_shared_memory(int bytes) -> ()");
  m.def("raise_singular() -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastflow_emulated, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&fastflow::configure));
  m.impl("limit_shared_memory", TORCH_BOX(&fastflow::limit_shared_memory));
  m.impl("raise_singular", TORCH_BOX(&fastflow::raise_singular<fastflow::Emulated>));
}
