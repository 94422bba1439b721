#pragma once
// Elementwise parts of the one-pass inverse of a masked autoregressive transformation, compiled for each
// instruction set (multiversion.h). Samples are the lanes of vectors, so that counts are multiples of 16.
#include <cmath>
#include <cstdint>

#include "activation.h"
#include "block.h"

namespace fastflow::cpu {

// The rest of hidden units after their product. Elements are units and samples.
template <typename T>
struct UnitElements {
  Activation activation;
  int64_t count;
  T* units;        // the product, then the units
  const T* gates;  // factors of the product, or null
  bool after;      // whether the units are activated
  const T* skip;   // added to the units, or null
  T* read;         // the activated units that the next layer reads, may be `units`; or null
};
void finish(const UnitElements<float>&);
void finish(const UnitElements<double>&);

enum class AffineScale { exp, sigmoid, softplus, soft_clamp, tanh, soft_clip };

// x from z of a feature; its log-slope is added to log_det.
template <typename T>
struct AffineInverse {
  AffineScale scale;
  bool scale_first;
  T factor, offset;
  int64_t count;
  const T *z, *shift, *raw;
  T *x, *log_det;
};
void invert(const AffineInverse<float>&);
void invert(const AffineInverse<double>&);

// x in [-half, half] shifted by half of the circle.
template <typename T>
FASTFLOW_HD T turned(T x, T half) {
  return x < 0 ? x + half : x - half;
}

// What the network reads of a feature: a wave and a multiple of it.
template <typename T>
FASTFLOW_HD T waved(T x, T frequency, T of_sin, T of_cos, T multiple) {
  const T angle = frequency * x;
#ifdef __CUDA_ARCH__
  // std::sin and std::cos reduce large angles in an array, for which each thread would have a stack
  T sine, cosine;
  sincospi(angle * T(0.31830988618379067), &sine, &cosine);
#else
  const T sine = std::sin(angle), cosine = std::cos(angle);
#endif
  return of_sin * sine + of_cos * cosine + multiple * x;
}

// units = (gradient + skip) by the next layers and products = units * inner; gradient is first multiplied by
// outer. Null factors are 1, a null skip 0, null units are not written.
template <typename T>
struct UnitGradients {
  int64_t count;
  const T *gradient, *outer, *skip, *inner;
  T *units, *products;
};
void pull(const UnitGradients<float>&);
void pull(const UnitGradients<double>&);

// u = (v - read * sum) / slope of a feature, and the gradients of its parameters, jac * u - dparams, whose
// rows are `row` apart. A null dparams is 0, a null read is 1.
template <typename T>
struct FeatureGradients {
  int64_t count, parameters, row;
  const T *v, *sum, *slope, *jac, *dparams, *read;
  T *u, *products;
};
void solve(const FeatureGradients<float>&);
void solve(const FeatureGradients<double>&);

}  // namespace fastflow::cpu
