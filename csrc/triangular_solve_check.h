#pragma once
// What both bodies ask of their arguments: the message names the argument, what came and what was expected.
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <string>

namespace fastflow {

using torch::stable::Tensor;

inline std::string shape(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t d = 0; d < t.dim(); ++d) out << (d ? ", " : "") << t.size(d);
  out << "]";
  return out.str();
}

inline void check_triangular_solve(const Tensor& A, const Tensor& B) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(A.dim() == 3 && A.size(1) == A.size(2), "triangular_solve: A has shape ", shape(A),
                  ", expected [K, n, n]");
  STD_TORCH_CHECK(B.dim() == 3 && B.size(0) == A.size(0) && B.size(1) == A.size(1), "triangular_solve: B has shape ",
                  shape(B), ", expected [K, n, m] with K = ", A.size(0), " and n = ", A.size(1), " of A");
  STD_TORCH_CHECK(A.scalar_type() == ScalarType::Float || A.scalar_type() == ScalarType::Double,
                  "triangular_solve: A has dtype ", torch::headeronly::toString(A.scalar_type()),
                  ", expected Float or Double");
  STD_TORCH_CHECK(B.scalar_type() == A.scalar_type(), "triangular_solve: B has dtype ",
                  torch::headeronly::toString(B.scalar_type()), ", expected A's, ",
                  torch::headeronly::toString(A.scalar_type()));
  STD_TORCH_CHECK(B.device() == A.device(), "triangular_solve: A and B are on different devices, expected one");
}

}  // namespace fastflow
