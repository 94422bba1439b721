#pragma once
// The mixture-of-logistics CDF transform of a tile of elements (fastflow/ops/mixture_cdf/reference.py has the
// formulas). The parameters of an element are a column, and elements are the lanes of vectors
// (cpu/columns.h).
#include <cstdint>

namespace fastflow::cpu {

constexpr int64_t MAX_COMPONENTS = 64;

enum class MixtureGiven { x, inverse, y };  // what `v` and `g` of a backward belong to, see `_pullback`

template <typename T>
struct MixtureForward {
  int64_t components;
  bool inverse;
  int64_t count, stride;  // elements, a multiple of 16; the distance between parameters
  const T *v, *params;
  T *out, *log_slope;
};

template <typename T>
struct MixtureBackward {
  int64_t components;
  MixtureGiven given;
  int64_t count, stride;
  const T *v, *params, *g, *dlog_slope;
  T *x, *dv, *dparams;  // x: null unless v is y
};

void mixture_elements(const MixtureForward<float>& a);
void mixture_elements(const MixtureForward<double>& a);
void mixture_elements_backward(const MixtureBackward<float>& a);
void mixture_elements_backward(const MixtureBackward<double>& a);

}  // namespace fastflow::cpu
