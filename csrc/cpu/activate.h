#pragma once
// Activations of networks, of vectors (simd_math.h).
#include "activation.h"
#include "cpu/simd_math.h"

namespace fastflow::cpu {

template <typename M, typename V = typename M::V>
FASTFLOW_INLINE V sigmoid(const V& v) {
  const V e = M::exp(-M::abs(v)), one = 1 / (e + 1);
  return v >= 0 ? one : e * one;
}

template <typename M, typename V = typename M::V>
FASTFLOW_INLINE V activated(Activation activation, const V& v) {
  if (activation == Activation::relu) return M::max(v, 0);
  if (activation == Activation::tanh) return M::tanh(v);
  if (activation == Activation::silu) return v * sigmoid<M>(v);
  return v > 0 ? v : M::expm1(M::min(v, 0));
}

// Its derivative at v; `a` is the activation of v. That of ReLU is 1 at NaN, as PyTorch's is.
template <typename M, typename V = typename M::V>
FASTFLOW_INLINE V slope_of(Activation activation, const V& v, const V& a) {
  if (activation == Activation::relu) return v <= 0 ? V{} : M::all(1);
  if (activation == Activation::tanh) return 1 - a * a;
  if (activation == Activation::silu) {
    const V s = sigmoid<M>(v);
    return s * (v * (1 - s) + 1);
  }
  return v > 0 ? M::all(1) : a + 1;
}

}  // namespace fastflow::cpu
