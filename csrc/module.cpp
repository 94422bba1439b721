#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "multiversion.h"

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "FastFlow's compiled ops; importing it registers the CPU ones. `build` tells what was built, and with "
      "what.";
  pybind11::dict build;
  build["torch"] = TORCH_VERSION;
  build["compiler"] = __VERSION__;
  build["cpu_targets"] = FASTFLOW_CPU_TARGETS;
  build["cuda"] = FASTFLOW_CUDA;  // nvcc's version, empty when _cuda was left out
  build["cuda_archs"] = FASTFLOW_CUDA_ARCHS;
  m.attr("build") = build;
}
