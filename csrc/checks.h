#pragma once
// Checks of sizes, dtype and device that every op runs before it reads a tensor's pointer. They only guard
// memory. The Python op (fastflow/ops) checks all arguments before it calls a compiled op, so users rarely
// see these errors.
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <string>

namespace fastflow {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t MAX_CHANNELS = 64;  // of conv1x1 and lu_weight; larger matrices use torch.matmul
constexpr int64_t ANY = -1;           // a size that is not checked

inline std::string to_string(IntHeaderOnlyArrayRef sizes) {
  std::ostringstream out;
  out << "[";
  for (size_t d = 0; d < sizes.size(); ++d) {
    out << (d ? ", " : "");
    sizes[d] == ANY ? out << "*" : out << sizes[d];
  }
  out << "]";
  return out.str();
}

inline void expect_dims(const char* op, const char* name, const Tensor& t, int64_t at_least) {
  STD_TORCH_CHECK(t.dim() >= at_least, op, ": ", name, ": got shape ", to_string(t.sizes()),
                  ", expected at least ", at_least, " dimensions");
}

inline void expect_shape(const char* op, const char* name, const Tensor& t, IntHeaderOnlyArrayRef sizes) {
  const IntHeaderOnlyArrayRef got = t.sizes();
  const bool equal =
      std::equal(got.begin(), got.end(), sizes.begin(), sizes.end(),
                 [](int64_t size, int64_t expected) { return expected == ANY || size == expected; });
  STD_TORCH_CHECK(equal, op, ": ", name, ": got shape ", to_string(got), ", expected ", to_string(sizes));
}

inline void expect_dtype(const char* op, const char* name, const Tensor& t,
                         std::initializer_list<ScalarType> dtypes) {
  if (std::find(dtypes.begin(), dtypes.end(), t.scalar_type()) != dtypes.end()) return;
  std::ostringstream expected;
  for (ScalarType dtype : dtypes) expected << (dtype == *dtypes.begin() ? "" : " or ") << dtype;
  STD_TORCH_CHECK(false, op, ": ", name, ": got dtype ", torch::headeronly::toString(t.scalar_type()),
                  ", expected ", expected.str());
}

// A multiple of `divisor` channels.
inline void expect_channels(const char* op, const char* name, const Tensor& x, int64_t divisor) {
  STD_TORCH_CHECK(x.size(1) % divisor == 0, op, ": ", name, ": got ", x.size(1),
                  " channels, expected a multiple of ", divisor);
}

inline void expect_floating(const char* op, const char* name, const Tensor& t) {
  expect_dtype(op, name, t, {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half});
}

// Also checks the sizes.
inline void expect_floating(const char* op, const char* name, const Tensor& t, IntHeaderOnlyArrayRef sizes) {
  expect_shape(op, name, t, sizes);
  expect_floating(op, name, t);
}

// Floating point [N, C, ...].
inline void expect_batch(const char* op, const char* name, const Tensor& x) {
  expect_dims(op, name, x, 2);
  expect_floating(op, name, x);
}

// Gradients of an output of the shape of x [N, C, ...] and of a log-determinant [N].
inline void expect_gradients(const char* op, const Tensor& x, const Tensor& dy, const Tensor& dlog_det) {
  expect_floating(op, "dy", dy, x.sizes());
  expect_floating(op, "dlog_det", dlog_det, {x.size(0)});
}

// Checks sizes, dtype, and that `t` is on the device of `other`.
inline void expect_tensor(const char* op, const char* name, const Tensor& t, IntHeaderOnlyArrayRef sizes,
                          ScalarType dtype, const Tensor& other) {
  expect_shape(op, name, t, sizes);
  expect_dtype(op, name, t, {dtype});
  STD_TORCH_CHECK(t.device() == other.device(), op, ": ", name,
                  ": got a tensor on another device, expected the device of the first argument");
}

}  // namespace fastflow
