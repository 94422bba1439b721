// fastflow_C::scaled_weight and its backward on the CPU: a convolution's weight and bias times exp(factor log_scale) of each
// output channel, whose part of the weight lies in one piece.
#include "stable.h"
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "arguments.h"
#include "cpu/tensors.h"

namespace fastflow::cpu {
namespace {

constexpr int64_t GRAIN = 1 << 16;  // elements that are worth a thread

void check(const char* op, const Tensor& weight, const Tensor& log_scale, const Tensor& bias) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float || weight.scalar_type() == ScalarType::Double, op, ": weight has dtype ",
                  dtype(weight), ", expected Float or Double");
  STD_TORCH_CHECK(weight.dim() >= 2 && weight.numel(), op, ": weight has shape ", shape(weight), ", expected [O, I, ...] with elements");
  STD_TORCH_CHECK(weight.size(0) == 1 || weight.stride(0) * weight.size(0) == weight.numel(), op,
                  ": weight lies apart, expected the part of each output channel in one piece");
  for (const auto& [name, v] : {std::pair("log_scale", &log_scale), std::pair("bias", &bias)}) {
    check_beside(op, name, *v, "weight", weight);
    STD_TORCH_CHECK(v->dim() == 1 && v->size(0) == weight.size(0), op, ": ", name, " has shape ", shape(*v), ", expected [", weight.size(0),
                    "], one for each output channel");
  }
}

template <typename F>
void for_channels(const Tensor& weight, const F& f) {
  const int64_t row = weight.numel() / weight.size(0);
  torch::stable::parallel_for(0, weight.size(0), std::max<int64_t>(1, GRAIN / row), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) f(o, row);
  });
}

template <typename T>
void forward(const Tensor& weight, const Tensor& log_scale, const Tensor& bias, double factor, const Tensor& out, const Tensor& out_bias) {
  const T *w = weight.const_data_ptr<T>(), *l = log_scale.const_data_ptr<T>(), *b = bias.const_data_ptr<T>();
  T *to = out.mutable_data_ptr<T>(), *to_bias = out_bias.mutable_data_ptr<T>();
  for_channels(weight, [&](int64_t o, int64_t row) {
    const T s = std::exp(T(factor) * l[o * log_scale.stride(0)]);
    for (int64_t i = o * row; i < (o + 1) * row; ++i) to[i] = w[i] * s;
    to_bias[o] = b[o * bias.stride(0)] * s;
  });
}

template <typename T>
void backward(const Tensor& weight, const Tensor& log_scale, const Tensor& bias, double factor, const Tensor& dweight, const Tensor& dbias,
              const Tensor& dw_out, const Tensor& dl_out, const Tensor& db_out) {
  constexpr int64_t LANES = 16;  // sums side by side, for vectors
  const T *w = weight.const_data_ptr<T>(), *l = log_scale.const_data_ptr<T>(), *b = bias.const_data_ptr<T>();
  const T *dw = dweight.const_data_ptr<T>(), *db = dbias.const_data_ptr<T>();
  T *to = dw_out.mutable_data_ptr<T>(), *to_scale = dl_out.mutable_data_ptr<T>(), *to_bias = db_out.mutable_data_ptr<T>();
  for_channels(weight, [&](int64_t o, int64_t row) {
    const T s = std::exp(T(factor) * l[o * log_scale.stride(0)]), g = db[o * dbias.stride(0)];
    const int64_t first = o * row, whole = row - row % LANES;
    T sums[LANES] = {};
    for (int64_t i = 0; i < whole; i += LANES)
      for (int64_t j = 0; j < LANES; ++j) {
        sums[j] += dw[first + i + j] * w[first + i + j];
        to[first + i + j] = dw[first + i + j] * s;
      }
    T sum = g * b[o * bias.stride(0)];
    for (int64_t i = whole; i < row; ++i) sum += dw[first + i] * w[first + i], to[first + i] = dw[first + i] * s;
    for (const T part : sums) sum += part;
    to_scale[o] = T(factor) * s * sum;
    to_bias[o] = g * s;
  });
}

std::tuple<Tensor, Tensor> scaled_weight(const Tensor& weight, const Tensor& log_scale, const Tensor& bias, double factor) {
  check("scaled_weight", weight, log_scale, bias);
  const Tensor out = torch::stable::empty_like(weight), out_bias = empty(weight, {weight.size(0)});
  (weight.scalar_type() == ScalarType::Double ? forward<double> : forward<float>)(weight, log_scale, bias, factor, out, out_bias);
  return {out, out_bias};
}

std::tuple<Tensor, Tensor, Tensor> scaled_weight_backward(const Tensor& weight, const Tensor& log_scale, const Tensor& bias, double factor,
                                                          const Tensor& dweight, const Tensor& dbias) {
  constexpr const char* op = "scaled_weight_backward";
  check(op, weight, log_scale, bias);
  check_beside(op, "dweight", dweight, "weight", weight);
  check_beside(op, "dbias", dbias, "weight", weight);
  STD_TORCH_CHECK(same_shape(dweight, weight), op, ": dweight has shape ", shape(dweight), ", expected weight's, ", shape(weight));
  STD_TORCH_CHECK(same_shape(dbias, bias), op, ": dbias has shape ", shape(dbias), ", expected bias's, ", shape(bias));
  const Tensor dw = torch::stable::empty_like(weight), dl = empty(weight, {weight.size(0)}), db = empty(weight, {weight.size(0)});
  (weight.scalar_type() == ScalarType::Double ? backward<double> : backward<float>)(weight, log_scale, bias, factor, dweight, dbias, dw, dl,
                                                                                    db);
  return {dw, dl, db};
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("scaled_weight", TORCH_BOX(&fastflow::cpu::scaled_weight));
  m.impl("scaled_weight_backward", TORCH_BOX(&fastflow::cpu::scaled_weight_backward));
}
