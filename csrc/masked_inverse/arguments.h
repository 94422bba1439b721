#pragma once
// The network of masked_inverse and masked_solve, and checks of their arguments.
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "masked_inverse/elements.h"

namespace fastflow {

namespace cpu {

inline AffineScale scale_of(const std::string& name) {
  return name == "exp"          ? AffineScale::exp
         : name == "sigmoid"    ? AffineScale::sigmoid
         : name == "softplus"   ? AffineScale::softplus
         : name == "soft_clamp" ? AffineScale::soft_clamp
         : name == "tanh"       ? AffineScale::tanh
                                : AffineScale::soft_clip;
}

}  // namespace cpu

// Bits of a layer (fastflow/ops/masked_inverse/reference.py).
constexpr int64_t BEFORE = 1, GATE = 2, AFTER = 4, SKIP = 8;

// Layer 0 is the features in their order, layers 1 to `last` are hidden, the next one is the parameters.
struct MaskedNetwork {
  int64_t features, each, last;                       // features; parameters of a feature; hidden layers
  std::vector<int64_t> sizes, weights, added, gates;  // units of each layer; where its rows start
  std::vector<int64_t> layers;                        // bits of layers 1 to last + 1

  // `like` is [N, features]. Without `weights_`, the caller checks their number.
  MaskedNetwork(const char* op, const char* name, const Tensor& like, const std::optional<Tensor>& weights_,
                const Tensor& ends, const std::vector<int64_t>& widths, const std::vector<int64_t>& layers_,
                int64_t each_)
      : each(each_), last(static_cast<int64_t>(widths.size())), layers(layers_) {
    expect_shape(op, name, like, {ANY, ANY});
    expect_dtype(op, name, like, {ScalarType::Float, ScalarType::Double});
    features = like.size(1);
    STD_TORCH_CHECK(features >= 1 && each >= 1, op, ": ", name, ": got ", features, " features of ", each,
                    " parameters, expected at least 1");
    STD_TORCH_CHECK(static_cast<int64_t>(layers.size()) == last + 1, op, ": layers: got ", layers.size(),
                    " numbers, expected ", last + 1);
    sizes.push_back(features);
    for (int64_t width : widths) {
      STD_TORCH_CHECK(width >= 1, op, ": widths: got ", width, ", expected positive integers");
      sizes.push_back(width);
    }
    sizes.push_back(features * each);
    weights = added = gates = {0, 0};
    for (int64_t l = 1; l <= last + 1; ++l) {
      const int64_t flags = layers[l - 1];
      STD_TORCH_CHECK(!(flags & BEFORE) || l > 1, op, ": layers: got an activation of the features");
      STD_TORCH_CHECK(!(flags & SKIP) || (l > 2 && l <= last && sizes[l] == sizes[l - 2]), op,
                      ": layers: got a sum of units that differ in number");
      STD_TORCH_CHECK(!(flags & (GATE | AFTER)) || l <= last, op, ": layers: got an output with gates");
      weights.push_back(weights[l] + sizes[l] * sizes[l - 1]);
      added.push_back(added[l] + sizes[l]);
      gates.push_back(gates[l] + (flags & GATE ? sizes[l] : 0));
    }
    if (weights_) expect_tensor(op, "weights", *weights_, {weights[last + 2]}, like.scalar_type(), like);
    expect_tensor(op, "ends", ends, {last, features}, ScalarType::Long, like);
  }
  int64_t units() const { return added[last + 1]; }
  int64_t total() const { return added[last + 2]; }
  int64_t total_gates() const { return gates[last + 1]; }
  int64_t flags(int64_t layer) const { return layers[layer - 1]; }
};

inline void check_masked_inverse(const MaskedNetwork& net, const Tensor& z, const Tensor& added,
                                 const std::optional<Tensor>& gates, const Tensor& order,
                                 const std::optional<Tensor>& waves) {
  const char* op = "masked_inverse";
  const int64_t n = z.size(0);
  if (added.dim() == 2) expect_tensor(op, "added", added, {n, net.total()}, z.scalar_type(), z);
  else expect_tensor(op, "added", added, {net.total()}, z.scalar_type(), z);
  STD_TORCH_CHECK(gates.has_value() == (net.total_gates() > 0), op, ": gates: got ",
                  gates ? "a tensor" : "None", ", expected ", net.total_gates(), " for each sample");
  if (gates) expect_tensor(op, "gates", *gates, {n, net.total_gates()}, z.scalar_type(), z);
  expect_tensor(op, "order", order, {net.features}, ScalarType::Long, z);
  if (waves) expect_tensor(op, "waves", *waves, {4, net.features}, z.scalar_type(), z);
}

inline void check_masked_solve(const MaskedNetwork& net, const Tensor& v, const Tensor& slope,
                               const Tensor& jac, const std::optional<Tensor>& dparams,
                               const std::optional<Tensor>& inner, const std::optional<Tensor>& outer,
                               const std::optional<Tensor>& of_features) {
  const int64_t n = v.size(0);
  const auto check = [&](const char* name, const std::optional<Tensor>& t, IntHeaderOnlyArrayRef sizes) {
    if (t) expect_tensor("masked_solve", name, *t, sizes, v.scalar_type(), v);
  };
  check("slope", slope, {n, net.features});
  check("jac", jac, {n, net.features, net.each});
  check("dparams", dparams, {n, net.features, net.each});
  check("inner", inner, {n, net.units()});
  check("outer", outer, {n, net.units()});
  check("of_features", of_features, {n, net.features});
}

}  // namespace fastflow
