#pragma once
#include <optional>

#include "checks.h"

namespace fastflow {

// Weight and bias have the accumulation dtype.
inline void check_conv1x1(const char* op, const char* name, const Tensor& x, const Tensor& weight,
                          const std::optional<Tensor>& bias) {
  expect_batch(op, name, x);
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(1 <= channels && channels <= MAX_CHANNELS, op, ": ", name, ": got ", channels,
                  " channels, expected 1 to ", MAX_CHANNELS);
  const ScalarType acc = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  expect_tensor(op, "weight", weight, {channels, channels}, acc, x);
  if (bias) expect_tensor(op, "bias", *bias, {channels}, acc, x);
}

inline void check_conv1x1_backward(const Tensor& x, const Tensor& weight, const Tensor& dy) {
  check_conv1x1("conv1x1_backward", "x", x, weight, std::nullopt);
  expect_tensor("conv1x1_backward", "dy", dy, x.sizes(), x.scalar_type(), x);
}

inline void check_conv1x1_inverse_backward(const Tensor& y, const Tensor& weight,
                                           const Tensor& weight_inverse, const std::optional<Tensor>& bias,
                                           const Tensor& dy) {
  const char* op = "conv1x1_inverse_backward";
  check_conv1x1(op, "y", y, weight, bias);
  expect_tensor(op, "weight_inverse", weight_inverse, weight.sizes(), weight.scalar_type(), y);
  expect_tensor(op, "dy", dy, y.sizes(), y.scalar_type(), y);
}

}  // namespace fastflow
