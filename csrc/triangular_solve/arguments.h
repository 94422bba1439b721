#pragma once
#include "checks.h"

namespace fastflow {

inline void check_triangular_solve(const Tensor& A, const Tensor& B) {
  const char* op = "triangular_solve";
  expect_shape(op, "A", A, {ANY, ANY, ANY});
  expect_shape(op, "A", A, {ANY, A.size(1), A.size(1)});
  expect_dtype(op, "A", A, {ScalarType::Float, ScalarType::Double});
  expect_tensor(op, "B", B, {A.size(0), A.size(1), ANY}, A.scalar_type(), A);
}

}  // namespace fastflow
