#pragma once
// Allocation of the CPU ops' tensors.
#include "stable.h"
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

namespace fastflow::cpu {

using torch::stable::Tensor;

// A contiguous, uninitialized tensor of the dtype of `like`, or of `type` (float or double).
// torch::stable::new_empty uses the dispatcher and takes a microsecond longer, a third of a small op's time.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                    std::optional<torch::headeronly::ScalarType> type = {}) {
  std::array<int64_t, 3> strides{};
  int64_t stride = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d)
    strides[d] = stride, stride *= std::max<int64_t>(1, sizes.begin()[d]);
  int32_t dtype;
  AtenTensorHandle made;
  if (type)
    dtype = *type == torch::headeronly::ScalarType::Double ? aoti_torch_dtype_float64()
                                                           : aoti_torch_dtype_float32();
  else TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Uninitialized images [n, c, h, w] of the dtype of `like`, with torch.empty's strides for contiguous or
// channels_last.
inline Tensor empty_images(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w,
                           bool channels_last) {
  const auto at_least_1 = [](int64_t size) { return std::max<int64_t>(1, size); };
  const std::array<int64_t, 4> sizes{n, c, h, w},
      planes{at_least_1(c) * at_least_1(h) * at_least_1(w), at_least_1(h) * at_least_1(w), at_least_1(w), 1},
      rows{h * w * c, 1, w * c, c};
  int32_t dtype;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), (channels_last ? rows : planes).data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Whether the elements of x fill memory without gaps or overlaps, for any order of dimensions.
inline bool is_dense(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) != 1) dims.emplace_back(x.stride(d), x.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t stride = 1;
  for (const auto& [step, size] : dims) {
    if (step != stride) return false;
    stride *= size;
  }
  return true;
}

// torch.empty_like(x, dtype=dtype) for uint8 and floating-point dtypes.
inline Tensor empty_like(const Tensor& x, torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  const Tensor like = is_dense(x) ? x : torch::stable::empty_like(x);
  int32_t code;
  switch (dtype) {
    case ScalarType::Byte: code = aoti_torch_dtype_uint8(); break;
    case ScalarType::Float: code = aoti_torch_dtype_float32(); break;
    case ScalarType::Double: code = aoti_torch_dtype_float64(); break;
    case ScalarType::BFloat16: code = aoti_torch_dtype_bfloat16(); break;
    default: code = aoti_torch_dtype_float16();
  }
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), like.sizes().data(), like.strides().data(), code,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Bytes per element, for any dtype.
inline size_t itemsize(const Tensor& x) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return aoti_torch_dtype_element_size(dtype);
}

}  // namespace fastflow::cpu
