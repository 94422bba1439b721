#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "multiversion.h"

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "FastFlow's compiled ops. Importing this module registers the CPU ops. `build`: versions and targets "
      "of "
      "the build.";
  pybind11::dict build;
  build["torch"] = TORCH_VERSION;
  build["compiler"] = __VERSION__;
  build["cpu_targets"] = FASTFLOW_CPU_TARGETS;
  build["cuda"] = FASTFLOW_CUDA;  // nvcc's version; empty if _cuda was not built
  build["cuda_archs"] = FASTFLOW_CUDA_ARCHS;
  build["emulator"] = FASTFLOW_EMULATOR;  // "1", or empty if the CUDA kernels were not built for the CPU
  m.attr("build") = build;
}
