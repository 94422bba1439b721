#pragma once
// Elementwise parts of residual networks, compiled for each instruction set (multiversion.h). Arrays have
// `rows` samples of `width` units each. Without per-unit factors all elements are one row.
#include <cstdint>

#include "activation.h"

namespace fastflow::cpu {

// out = f(z) with z = scale * x + shift. If there is a gradient by out, it becomes the one by z, and `added`
// is added to it.
template <typename T>
struct ActivationElements {
  Activation activation;
  int64_t rows, width;
  const T *scale, *shift;  // per unit; null: 1 and 0
  const T* x;
  T* out;          // may be null
  T* gradient;     // null: forward
  const T* added;  // null: 0; may be `gradient_out`
  T* gradient_out;
};
void activate(const ActivationElements<float>&);
void activate(const ActivationElements<double>&);

// out = h + s * update, s the sigmoid of `gates`, which it replaces; null gates: s = 1.
template <typename T>
struct GateElements {
  int64_t count;
  const T *h, *update;
  T *gates, *out;
};
void gate(const GateElements<float>&);
void gate(const GateElements<double>&);

// Gradients by the update and by what the sigmoid was taken of, from the one of h + s * update.
template <typename T>
struct GateGradients {
  int64_t count;
  const T *gradient, *update, *gates;
  T *by_update, *by_gates;
};
void gate_backward(const GateGradients<float>&);
void gate_backward(const GateGradients<double>&);

// Adds the rows of dz to the sums, and those of dz * (x - mean) to the products unless they are null, for
// `width` units of rows that are `stride` apart.
template <typename T>
struct RowSums {
  int64_t rows, width, stride;
  const T* dz;
  double* sums;
  const T* x = nullptr;
  const double* mean = nullptr;
  double* products = nullptr;
};
void add_rows(const RowSums<float>&);
void add_rows(const RowSums<double>&);

// The gradient by x of batch normalization: factor * (dz - mean_dz - slope * (x - mean)), plus `added`.
template <typename T>
struct NormGradients {
  int64_t rows, width;
  const T *x, *dz;
  const T *factor, *mean_dz, *slope, *mean;  // per unit
  const T* added;                            // null: 0; may be `out`
  T* out;                                    // may be `dz`
};
void norm_backward(const NormGradients<float>&);
void norm_backward(const NormGradients<double>&);

}  // namespace fastflow::cpu
