#pragma once
// What the CPU's ops make tensors with.
#include "stable.h"
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>

namespace fastflow::cpu {

using torch::stable::Tensor;

// Contiguous and uninitialised, in the dtype of `like`, or in float or double where `type` says so. torch::stable::new_empty
// goes through the dispatcher, which takes a microsecond longer: a third of a small op.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<torch::headeronly::ScalarType> type = {}) {
  std::array<int64_t, 3> strides{};
  int64_t stride = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d)
    strides[d] = stride, stride *= std::max<int64_t>(1, sizes.begin()[d]);
  int32_t dtype;
  AtenTensorHandle made;
  if (type) dtype = *type == torch::headeronly::ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  else TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

}  // namespace fastflow::cpu
