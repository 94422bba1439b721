#pragma once
// Rational-quadratic splines of a tile of elements (fastflow/ops/spline/reference.py has the formulas).
//
// The parameters of an element are a column: parameter p of element i is at p * stride + i. Elements are the
// lanes of vectors. Everything of an element but the exponentials of its bins stays in registers.
//
// One spline of many elements is a table of its bins, from which each element selects: no exponentials per
// element.
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

// Values of a table, each of all bins: lower ends and sizes in x and y, and the slopes at both ends. Sums of
// the gradients of these values, over elements, have its form.
constexpr int64_t TABLE_ROWS = 6;

// `params`: those of one spline in each of 16 lanes, `stride` apart.
template <typename T>
struct SplineTable : Splines<T> {
  int64_t row;  // the distance between rows, a multiple of 16
  int64_t stride;
  const T* params;
  T* table;
};
// The gradient of the parameters of a spline, by those of its table.
template <typename T>
struct SplineTableBackward : Splines<T> {
  int64_t row, stride;
  const T* params;
  const double* dtable;
  T* dparams;  // consecutive
};

// Elements have parameters each, or all of them one `table`.
template <typename T>
struct SplineForward : Splines<T> {
  bool inverse;
  int64_t count, stride;  // elements, a multiple of 16; the distance between parameters
  const T *v, *params;
  T *out, *log_slope;
  const T* table = nullptr;
  int64_t row = 0;
};

template <typename T>
struct SplineBackward : Splines<T> {
  Given given;
  int64_t count, stride;
  const T *v, *params, *g, *dlog_slope;
  T *x, *dv, *dparams;  // x: null unless v is y
  const T* table = nullptr;
  int64_t row = 0;
  double* dtable = nullptr;  // gradients are added
};

void spline_elements(const SplineForward<float>& a);
void spline_elements(const SplineForward<double>& a);
void spline_elements_backward(const SplineBackward<float>& a);
void spline_elements_backward(const SplineBackward<double>& a);
void spline_table(const SplineTable<float>& a);
void spline_table(const SplineTable<double>& a);
void spline_table_backward(const SplineTableBackward<float>& a);
void spline_table_backward(const SplineTableBackward<double>& a);

}  // namespace fastflow::cpu
