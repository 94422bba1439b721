#pragma once
// Rational-quadratic splines of a tile of elements (fastflow/ops/spline/reference.py has the formulas).
//
// The parameters of an element are a column: parameter p of element i is at p * stride + i. Elements are the
// lanes of vectors. Everything of an element but the exponentials of its bins stays in registers.
#include <cstdint>

namespace fastflow::cpu {

constexpr int64_t MAX_BINS = 64;

enum class Tails { linear, circular, none };
enum class Given {
  x,
  inverse,
  y
};  // what `v` and `g` of a backward belong to, see `_pullback` in the reference

// The splines of a tile. `smallest` and `share`: a bin has the share smallest + share * softmax of `length`.
template <typename T>
struct Splines {
  int64_t bins;
  Tails tails;
  bool zuko;  // the convention
  T start, length, smallest, share, factor, min_slope, slope_offset, inverse_log_range;
  int64_t slopes() const { return bins + (tails == Tails::linear ? -1 : tails == Tails::circular ? 0 : 1); }
  int64_t parameters() const { return 2 * bins + slopes(); }
};

template <typename T>
struct SplineForward : Splines<T> {
  bool inverse;
  int64_t count, stride;  // elements, a multiple of 16; the distance between parameters
  const T *v, *params;
  T *out, *log_slope;
};

template <typename T>
struct SplineBackward : Splines<T> {
  Given given;
  int64_t count, stride;
  const T *v, *params, *g, *dlog_slope;
  T *x, *dv, *dparams;  // x: null unless v is y
};

void spline_elements(const SplineForward<float>& a);
void spline_elements(const SplineForward<double>& a);
void spline_elements_backward(const SplineBackward<float>& a);
void spline_elements_backward(const SplineBackward<double>& a);

}  // namespace fastflow::cpu
