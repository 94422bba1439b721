#pragma once
#include "checks.h"

namespace fastflow {

inline void check_lu_weight(const char* op, const Tensor& perm, const Tensor& lower, const Tensor& upper,
                            const Tensor& log_s, const Tensor& sign_s) {
  expect_shape(op, "lower", lower, {ANY, ANY, ANY});
  const int64_t stack = lower.size(0), channels = lower.size(1);
  expect_shape(op, "lower", lower, {stack, channels, channels});
  STD_TORCH_CHECK(channels <= MAX_CHANNELS, op, ": lower: got ", channels, " channels, expected at most ",
                  MAX_CHANNELS);
  expect_dtype(op, "lower", lower, {ScalarType::Float, ScalarType::Double});
  expect_tensor(op, "perm", perm, {stack, channels}, ScalarType::Long, lower);
  expect_tensor(op, "upper", upper, lower.sizes(), lower.scalar_type(), lower);
  expect_tensor(op, "log_s", log_s, {stack, channels}, lower.scalar_type(), lower);
  expect_tensor(op, "sign_s", sign_s, {stack, channels}, lower.scalar_type(), lower);
}

inline void check_lu_weight_backward(const Tensor& perm, const Tensor& lower, const Tensor& upper,
                                     const Tensor& log_s, const Tensor& sign_s, const Tensor& weight_inverse,
                                     const Tensor& dweight, const Tensor& dweight_inverse,
                                     const Tensor& dlog_det) {
  const char* op = "lu_weight_backward";
  check_lu_weight(op, perm, lower, upper, log_s, sign_s);
  expect_tensor(op, "weight_inverse", weight_inverse, lower.sizes(), lower.scalar_type(), lower);
  expect_tensor(op, "dweight", dweight, lower.sizes(), lower.scalar_type(), lower);
  expect_tensor(op, "dweight_inverse", dweight_inverse, lower.sizes(), lower.scalar_type(), lower);
  expect_tensor(op, "dlog_det", dlog_det, {lower.size(0)}, lower.scalar_type(), lower);
}

}  // namespace fastflow
