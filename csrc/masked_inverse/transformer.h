#pragma once
// The inverses of the transformers of fastflow/ops/masked_inverse/reference.py, for CUDA kernels.
#include <cmath>
#include <string>

#include "block.h"
#include "masked_inverse/arguments.h"
#include "spline/element.h"
#include "spline/form.h"

namespace fastflow {

template <typename T>
struct Transformer {
  SplineElement<T> spline;  // if it has bins
  cpu::AffineScale scale;   // otherwise
  bool scale_first, shift_in_front;
  T factor, offset, half_turn, limit;

  FASTFLOW_HD int exponentials() const { return 2 * static_cast<int>(spline.bins); }

  // The i-th of `exponentials()`, of the parameters raw(p) of a feature.
  template <class Raw>
  FASTFLOW_HD T exponential(int i, const Raw& raw) const {
    const int bins = static_cast<int>(spline.bins), first = i < bins ? 0 : bins;
    T top = spline.squashed(raw(first));
    FASTFLOW_ROLLED
    for (int p = first + 1; p < first + bins; ++p) {
      const T u = spline.squashed(raw(p));
      if (u > top) top = u;
    }
    return std::exp(spline.squashed(raw(i)) - top);
  }

  // x of z, and log dx/dz.
  template <class Raw, class Exponential>
  FASTFLOW_HD T inverse(T z, const Raw& raw, const Exponential& found, T& log_slope) const {
    if (spline.bins) {
      const T x = spline.inverse(z, raw, found, log_slope);
      if (limit > 0 && std::abs(z) > limit) return log_slope = 0;
      return half_turn > 0 ? cpu::turned(x, half_turn) : x;
    }
    const T shift = raw(shift_in_front ? 0 : 1);
    T log_s;
    const T s = scale_of(raw(shift_in_front ? 1 : 0), log_s);
    log_slope = -log_s;
    return scale_first ? (z - shift) / s : z / s - shift;
  }

 private:
  FASTFLOW_HD T scale_of(T h, T& log_s) const {
    if (scale == cpu::AffineScale::softplus || (scale == cpu::AffineScale::sigmoid && offset > 0)) {
      const T s = (scale == cpu::AffineScale::softplus ? softplus(h) : 1 / (1 + std::exp(-(h + 2)))) + offset;
      log_s = std::log(s);
      return s;
    }
    switch (scale) {
      case cpu::AffineScale::exp: log_s = h; break;
      case cpu::AffineScale::sigmoid: log_s = -softplus(-(h + 2)); break;
      case cpu::AffineScale::soft_clamp: log_s = factor * std::tanh(h / factor); break;
      case cpu::AffineScale::tanh: log_s = factor * std::tanh(h); break;
      default: log_s = h / (1 + std::abs(h / factor));
    }
    return std::exp(log_s);
  }
};

// The arguments of the op that describe the transformer.
struct TransformerForm {
  const std::string &scale, &affine_order, &params_layout;
  double offset;
  cpu::SplineForm spline;

  int64_t parameters(const char* op) const { return spline.bins ? spline.parameters(op) : 2; }

  template <typename T>
  Transformer<T> transformer() const {
    return {{spline.bins ? spline.splines<T>() : cpu::Splines<T>{}},
            cpu::scale_of(scale),
            affine_order == "scale_first",
            params_layout == "shift_scale",
            static_cast<T>(spline.factor),
            static_cast<T>(offset),
            static_cast<T>(spline.bins ? spline.half_turn() : 0),
            static_cast<T>(spline.bins ? spline.limit() : 0)};
  }
};

}  // namespace fastflow
