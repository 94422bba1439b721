// The arithmetic of rational-quadratic splines, compiled for each instruction set.
#include "spline/spline.h"

#include <algorithm>

#include "cpu/simd_math.h"
#include "multiversion.h"

namespace fastflow::cpu {
namespace {

template <typename M, bool ZUKO, typename T>
struct SplineMath {
  using Simd = M;
  static constexpr bool IS_ZUKO = ZUKO;
  using V = typename M::V;
  using I = typename M::I;

  // Where a >= b (zuko: a > b), and selection by it. Integers, because g++ 12 splits a comparison that
  // several selections use into scalars.
  static FASTFLOW_INLINE I at_least(const V& a, const V& b) { return (I)(a >= b ? (V)~I{} : V{}); }
  static FASTFLOW_INLINE I above(const V& a, const V& b) { return (I)(a > b ? (V)~I{} : V{}); }
  static FASTFLOW_INLINE I reaches(const V& v, const V& knot) {
    return ZUKO ? above(v, knot) : at_least(v, knot);
  }
  static FASTFLOW_INLINE V select(const I& where, const V& a, const V& b) {
    return (V)((where & (I)a) | (~where & (I)b));
  }

  const Splines<T>& s;
  const T* params;  // of these lanes
  int64_t stride;

  FASTFLOW_INLINE V raw(int64_t p) const { return M::load(params + p * stride); }

  // The lower end and the size of the bin of each lane, with the softmax below it and in it.
  struct Bin {
    V lower, size, below, own;
  };

  // Exponentials of the raw sizes from `first` on; returns 1 / sum.
  FASTFLOW_INLINE V exponentials(int64_t first, V* e) const {
    const V range = M::all(2 * s.inverse_log_range);
    V top = M::all(-INFINITY);
    for (int64_t i = 0; i < s.bins; ++i) {
      V u = raw(first + i) * s.factor;
      if (ZUKO) u = u / (M::abs(u) * range + 1);
      e[i] = u;
      top = u > top ? u : top;
    }
    V sum{};
    for (int64_t i = 0; i < s.bins; ++i) sum += e[i] = M::exp(e[i] - top);
    return 1 / sum;
  }

  // The bin of v, or with KNOWN of this index.
  template <bool KNOWN>
  FASTFLOW_INLINE Bin find(const V* e, const V& inverse_sum, const V& v, V& index) const {
    const V scale = inverse_sum * (s.length * s.share);
    V sum{}, below{}, own = e[0];
    if (!KNOWN) index = V{};
    for (int64_t i = 1; i < s.bins; ++i) {
      sum += e[i - 1];
      const V knot = sum * scale + (s.start + s.length * s.smallest * i);
      const I here = KNOWN ? at_least(index, M::all(i)) : reaches(v, knot);
      below += (V)(here & (I)e[i - 1]);
      own = select(here, e[i], own);
      if (!KNOWN) index += (V)(here & (I)M::all(1));
    }
    Bin b;
    b.lower = below * scale + (index * (s.length * s.smallest) + s.start);
    b.size = own * scale + s.length * s.smallest;
    b.below = below * inverse_sum, b.own = own * inverse_sum;
    return b;
  }

  // Raw slopes at both ends of the bin; whether they are fixed to 1.
  struct RawSlopes {
    V r0, r1;
    I fixed0, fixed1;
  };
  FASTFLOW_INLINE RawSlopes raw_slopes(const V& index) const {
    const int64_t first = 2 * s.bins, shift = s.tails == Tails::linear ? 1 : 0;
    RawSlopes d{V{}, V{}, I{}, I{}};
    for (int64_t j = shift; j <= s.bins - shift; ++j) {
      const int64_t p = s.tails == Tails::circular && j == s.bins ? 0 : j - shift;
      const V r = raw(first + p);
      d.r0 = select(at_least(index, M::all(j)), r, d.r0);
      d.r1 = select(at_least(index, M::all(j - 1)), r, d.r1);
    }
    if (shift) {
      d.fixed0 = ~at_least(index, M::all(1));
      d.fixed1 = at_least(index, M::all(s.bins - 1));
    }
    return d;
  }
  FASTFLOW_INLINE V slope(const V& r, const I& fixed) const {
    V d;
    if (ZUKO) {
      d = M::exp(r / (M::abs(r) * s.inverse_log_range + 1));
    } else {
      const V u = r + s.slope_offset;
      d = M::max(u, 0) + M::log1p(M::exp(-M::abs(u))) + s.min_slope;
    }
    return select(fixed, M::all(1), d);
  }
  // The gradient of a raw slope.
  FASTFLOW_INLINE V slope_vjp(const V& r, const I& fixed, const V& d, const V& g) const {
    V by;
    if (ZUKO) {
      const V c = M::abs(r) * s.inverse_log_range + 1;
      by = d / (c * c);
    } else {
      const V u = r + s.slope_offset, e = M::exp(-M::abs(u)), one = 1 / (e + 1);
      by = u >= 0 ? one : e * one;
    }
    return (V)(~fixed & (I)(by * g));
  }

  // The bin of each lane of a table, and the slopes at its ends.
  struct Piece {
    Bin x, y;
    V d0, d1, index;
  };
  FASTFLOW_INLINE Piece look_up(const T* table, int64_t row, const V& v, bool by_y) const {
    const auto at = [&](int64_t r, int64_t i)
                        __attribute__((always_inline)) { return M::all(table[r * row + i]); };
    Piece p{{at(0, 0), at(1, 0), V{}, V{}}, {at(2, 0), at(3, 0), V{}, V{}}, at(4, 0), at(5, 0), V{}};
    for (int64_t i = 1; i < s.bins; ++i) {
      const I here = reaches(v, at(by_y ? 2 : 0, i));
      p.x.lower = select(here, at(0, i), p.x.lower), p.x.size = select(here, at(1, i), p.x.size);
      p.y.lower = select(here, at(2, i), p.y.lower), p.y.size = select(here, at(3, i), p.y.size);
      p.d0 = select(here, at(4, i), p.d0), p.d1 = select(here, at(5, i), p.d1);
      p.index += (V)(here & (I)M::all(1));
    }
    return p;
  }

  FASTFLOW_INLINE V end() const { return M::all(s.start + s.length); }
  FASTFLOW_INLINE I inside(const V& v) const { return reaches(v, M::all(s.start)) & at_least(end(), v); }
  FASTFLOW_INLINE V clamped(const V& v) const { return M::min(M::max(v, s.start), s.start + s.length); }
  // xi in [0, 1], and 1 at the upper end: only rounding differs from that.
  FASTFLOW_INLINE V within_unit(const V& xi, const V& kept) const {
    return select(at_least(kept, end()), M::all(1), M::min(M::max(xi, 0), 1));
  }
};

// The root xi of the height eta above the bin's lower end, without cancellation for either sign of b.
template <typename M, typename V>
FASTFLOW_INLINE V solved(const V& eta, const V& height, const V& s, const V& q, const V& d0) {
  const V a = height * (s - d0) + eta * q, b = height * d0 - eta * q;
  const V root = M::sqrt(M::max(b * b + 4 * a * s * eta, 0));
  const V positive = 2 * s * eta / (b + root), negative = (root - b) / (2 * a);
  return b >= 0 ? positive : negative;
}

template <bool ZUKO, bool TABLE, int BYTES, typename T>
FASTFLOW_INLINE void forward_lanes(const SplineForward<T>& given) {
  using M = SimdMath<T, BYTES>;
  using V = typename M::V;
  using Math = SplineMath<M, ZUKO, T>;
  const SplineForward<T> f = given;  // a copy: the compiler assumes that a store may change `given`
  const bool identity = f.tails != Tails::none;
  V e[MAX_BINS];
  for (int64_t i = 0; i < f.count; i += M::COUNT) {
    const Math math{f, f.params + i, f.stride};
    const V v = M::load(f.v + i), kept = math.clamped(v);
    typename Math::Bin x, y;
    V d0, d1;
    if (TABLE) {
      const auto piece = math.look_up(f.table, f.row, kept, f.inverse);
      x = piece.x, y = piece.y, d0 = piece.d0, d1 = piece.d1;
    } else {
      V index;
      const int64_t first = f.inverse ? f.bins : 0;
      const auto searched = math.template find<false>(e, math.exponentials(first, e), kept, index);
      const auto other = math.template find<true>(e, math.exponentials(f.bins - first, e), kept, index);
      x = f.inverse ? other : searched, y = f.inverse ? searched : other;
      const auto raw = math.raw_slopes(index);
      d0 = math.slope(raw.r0, raw.fixed0), d1 = math.slope(raw.r1, raw.fixed1);
    }
    const V s = y.size / x.size, q = d0 + d1 - 2 * s;
    V xi = f.inverse ? solved<M>(kept - y.lower, y.size, s, q, d0) : (kept - x.lower) / x.size;
    xi = math.within_unit(xi, kept);
    const V rest = 1 - xi, t = xi * rest, bottom = s + q * t, ratio = s / bottom;
    const V top = d1 * xi * xi + 2 * s * t + d0 * rest * rest;
    V out = f.inverse ? x.lower + xi * x.size : y.lower + y.size * ((s * xi * xi + d0 * t) / bottom);
    const V slope = top * ratio * ratio;
    V log_slope = M::log(slope);
    const auto inside = math.inside(v);
    if (identity) {
      const V zero = v == v ? V{} : v;  // NaN stays NaN
      log_slope = Math::select(inside, log_slope, zero);
      out = Math::select(inside, out, v);
    } else {
      const V beyond = f.inverse ? (v - kept) / slope : (v - kept) * slope;
      out = Math::select(inside, out, out + beyond);
    }
    M::store(f.out + i, out);
    M::store(f.log_slope + i, f.inverse ? -log_slope : log_slope);
  }
}

// The gradients of the values of a bin.
template <typename V>
struct OfBin {
  V x, width, y, height, d0, d1;
};

// Stores the gradients of the parameters of each lane. e: exponentials of its bins, inverse: 1 / their sums.
template <typename Math, typename V, typename T>
FASTFLOW_INLINE void store_gradients(const Math& math, const V* e_x, const V* e_y, const V& inverse_x,
                                     const V& inverse_y, const typename Math::Bin& x,
                                     const typename Math::Bin& y, const typename Math::RawSlopes& raw,
                                     const V& d0, const V& d1, const V& index, const OfBin<V>& by, T* dparams,
                                     int64_t stride) {
  using M = typename Math::Simd;
  using I = typename Math::I;
  const auto& s = math.s;
  const T size_scale = s.length * s.share;
  const V mean_x = by.x * x.below + by.width * x.own, mean_y = by.y * y.below + by.height * y.own;
  const V scale_x = inverse_x * (size_scale * s.factor), scale_y = inverse_y * (size_scale * s.factor);
  const V range = M::all(2 * s.factor * s.inverse_log_range);
  for (int64_t j = 0; j < s.bins; ++j) {
    const I before = Math::above(index, M::all(j)), up_to = Math::at_least(index, M::all(j));
    const V bin_x = Math::select(before, by.x, (V)(up_to & (I)by.width)),
            bin_y = Math::select(before, by.y, (V)(up_to & (I)by.height));
    V dx = e_x[j] * scale_x * (bin_x - mean_x), dy = e_y[j] * scale_y * (bin_y - mean_y);
    if (Math::IS_ZUKO) {
      const V c_x = M::abs(math.raw(j)) * range + 1, c_y = M::abs(math.raw(s.bins + j)) * range + 1;
      dx = dx / (c_x * c_x), dy = dy / (c_y * c_y);
    }
    M::store(dparams + j * stride, dx);
    M::store(dparams + (s.bins + j) * stride, dy);
  }
  const V s0 = math.slope_vjp(raw.r0, raw.fixed0, d0, by.d0),
          s1 = math.slope_vjp(raw.r1, raw.fixed1, d1, by.d1);
  const int64_t shift = s.tails == Tails::linear ? 1 : 0, slopes = s.slopes();
  for (int64_t j = 0; j < slopes; ++j) {
    const V at = M::all(j + shift);  // the knot
    V d = (V)((I)(index == at ? s0 : V{}));
    d += index + 1 == at ? s1 : V{};
    if (s.tails == Tails::circular && j == 0) d += index == M::all(s.bins - 1) ? s1 : V{};
    M::store(dparams + (2 * s.bins + j) * stride, d);
  }
}

template <bool ZUKO, bool TABLE, int BYTES, typename T>
FASTFLOW_INLINE void backward_lanes(const SplineBackward<T>& given) {
  using M = SimdMath<T, BYTES>;
  using V = typename M::V;
  using I = typename M::I;
  using Math = SplineMath<M, ZUKO, T>;
  const SplineBackward<T> f = given;
  const bool identity = f.tails != Tails::none, by_y = f.given != Given::x;
  V e_x[MAX_BINS], e_y[MAX_BINS], sums[TABLE ? MAX_BINS * TABLE_ROWS : 1];
  if (TABLE)
    for (int64_t j = 0; j < f.bins * TABLE_ROWS; ++j) sums[j] = V{};
  for (int64_t i = 0; i < f.count; i += M::COUNT) {
    const Math math{f, f.params + i, f.stride};
    const V v = M::load(f.v + i), kept = math.clamped(v);
    V g = M::load(f.g + i), dlog = M::load(f.dlog_slope + i), index;
    const V passed = g;
    V inverse_x, inverse_y, d0, d1;
    typename Math::Bin x, y;
    typename Math::RawSlopes raw;
    if (TABLE) {
      const auto piece = math.look_up(f.table, f.row, kept, by_y);
      x = piece.x, y = piece.y, d0 = piece.d0, d1 = piece.d1, index = piece.index;
    } else {
      inverse_x = math.exponentials(0, e_x), inverse_y = math.exponentials(f.bins, e_y);
      if (by_y) {
        y = math.template find<false>(e_y, inverse_y, kept, index);
        x = math.template find<true>(e_x, inverse_x, kept, index);
      } else {
        x = math.template find<false>(e_x, inverse_x, kept, index);
        y = math.template find<true>(e_y, inverse_y, kept, index);
      }
      raw = math.raw_slopes(index);
      d0 = math.slope(raw.r0, raw.fixed0), d1 = math.slope(raw.r1, raw.fixed1);
    }
    const V inverse_width = 1 / x.size, s = y.size * inverse_width, q = d0 + d1 - 2 * s;
    V xi = by_y ? solved<M>(kept - y.lower, y.size, s, q, d0) : (kept - x.lower) * inverse_width;
    xi = math.within_unit(xi, kept);
    const V rest = 1 - xi, turn = rest - xi, t = xi * rest, bottom = s + q * t, inverse_bottom = 1 / bottom;
    const V top = d1 * xi * xi + 2 * s * t + d0 * rest * rest, inverse_top = 1 / top;
    const V numerator = s * xi * xi + d0 * t, ratio = s * inverse_bottom, slope = top * ratio * ratio;
    const I inside = math.inside(v);

    V log_by_xi = 2 * (d1 * xi + s * turn - d0 * rest) * inverse_top - 2 * q * turn * inverse_bottom;
    if (!identity) log_by_xi = (V)(inside & (I)log_by_xi);
    V dv;
    if (f.given == Given::inverse) {
      dlog = -dlog;
      g = -(g + dlog * log_by_xi * inverse_width) / slope;
      dv = -g;
    }
    V x_out = x.lower + xi * x.size, beyond{};
    if (!identity) {
      beyond = v - kept;
      if (by_y) beyond = beyond / slope;
      x_out = Math::select(inside, x_out, x_out + beyond);
    }
    const V by_xi = g * slope * x.size + dlog * log_by_xi, t_bottom = 2 * t * inverse_bottom;
    if (f.given != Given::inverse) dv = by_xi * inverse_width;
    const V by_log = dlog + g * beyond * slope;
    const V g_bottom = g * y.size * inverse_bottom * inverse_bottom;
    const V by_s = g_bottom * (xi * xi * bottom - numerator * (1 - 2 * t)) +
                   by_log * (2 / s + 2 * t * inverse_top - 2 * (1 - 2 * t) * inverse_bottom);
    V by_0 = g_bottom * t * (bottom - numerator) + by_log * (rest * rest * inverse_top - t_bottom);
    V by_1 = by_log * (xi * xi * inverse_top - t_bottom) - g_bottom * numerator * t;
    V by_x = -by_xi * inverse_width, by_width = by_x * xi - by_s * s * inverse_width, by_lower = g,
      by_height = g * numerator * inverse_bottom + by_s * inverse_width;
    if (identity) {
      const V outside = f.given == Given::inverse ? passed : g;
      dv = Math::select(inside, dv, v == v ? outside : v);
      x_out = Math::select(inside, x_out, v);
      by_0 = (V)(inside & (I)by_0), by_1 = (V)(inside & (I)by_1);
      by_x = (V)(inside & (I)by_x), by_width = (V)(inside & (I)by_width);
      by_lower = (V)(inside & (I)by_lower), by_height = (V)(inside & (I)by_height);
    }
    if (f.x) M::store(f.x + i, x_out);
    M::store(f.dv + i, dv);

    const OfBin<V> by{by_x, by_width, by_lower, by_height, by_0, by_1};
    if (!TABLE) {
      store_gradients(math, e_x, e_y, inverse_x, inverse_y, x, y, raw, d0, d1, index, by, f.dparams + i,
                      f.stride);
      continue;
    }
    for (int64_t j = 0; j < f.bins; ++j) {
      const I here = Math::at_least(index, M::all(j)) & ~Math::above(index, M::all(j));
      V* sum = sums + j * TABLE_ROWS;
      sum[0] += (V)(here & (I)by.x), sum[1] += (V)(here & (I)by.width), sum[2] += (V)(here & (I)by.y);
      sum[3] += (V)(here & (I)by.height), sum[4] += (V)(here & (I)by.d0), sum[5] += (V)(here & (I)by.d1);
    }
  }
  if (TABLE)
    for (int64_t j = 0; j < f.bins; ++j)
      for (int64_t r = 0; r < TABLE_ROWS; ++r) {
        const V sum = sums[j * TABLE_ROWS + r];
        for (int64_t l = 0; l < M::COUNT; ++l) f.dtable[r * f.row + j] += static_cast<double>(sum[l]);
      }
}

// Calls run(math, index, first): lanes are the bins from `first` on.
template <bool ZUKO, int BYTES, typename T, typename A, typename F>
FASTFLOW_INLINE void for_bins(const A& a, const F& run) {
  using M = SimdMath<T, BYTES>;
  using V = typename M::V;
  V lanes;
  for (int64_t l = 0; l < M::COUNT; ++l) lanes[l] = static_cast<T>(l);
  for (int64_t i = 0; i < a.bins; i += M::COUNT)
    run(SplineMath<M, ZUKO, T>{a, a.params, a.stride}, lanes + static_cast<T>(i), i);
}

template <bool ZUKO, int BYTES, typename T>
FASTFLOW_INLINE void table_lanes(const SplineTable<T>& given) {
  using M = SimdMath<T, BYTES>;
  using V = typename M::V;
  using Math = SplineMath<M, ZUKO, T>;
  const SplineTable<T> a = given;
  for_bins<ZUKO, BYTES, T>(a, [&](const Math& math, V index, int64_t i) __attribute__((always_inline)) {
    V e[MAX_BINS];
    T* to = a.table + i;
    const auto x = math.template find<true>(e, math.exponentials(0, e), V{}, index);
    M::store(to, x.lower), M::store(to + a.row, x.size);
    const auto y = math.template find<true>(e, math.exponentials(a.bins, e), V{}, index);
    M::store(to + 2 * a.row, y.lower), M::store(to + 3 * a.row, y.size);
    const auto raw = math.raw_slopes(index);
    M::store(to + 4 * a.row, math.slope(raw.r0, raw.fixed0));
    M::store(to + 5 * a.row, math.slope(raw.r1, raw.fixed1));
  });
}

template <bool ZUKO, int BYTES, typename T>
FASTFLOW_INLINE void table_backward_lanes(const SplineTableBackward<T>& given) {
  using M = SimdMath<T, BYTES>;
  using V = typename M::V;
  using Math = SplineMath<M, ZUKO, T>;
  const SplineTableBackward<T> a = given;
  const int64_t parameters = a.parameters();
  for (int64_t p = 0; p < parameters; ++p) a.dparams[p] = 0;
  for_bins<ZUKO, BYTES, T>(a, [&](const Math& math, V index, int64_t i) __attribute__((always_inline)) {
    V e_x[MAX_BINS], e_y[MAX_BINS], by[TABLE_ROWS];
    T lanes[(3 * MAX_BINS + 1) * M::COUNT];
    for (int64_t r = 0; r < TABLE_ROWS; ++r)
      for (int64_t l = 0; l < M::COUNT; ++l)
        by[r][l] = i + l < a.bins ? static_cast<T>(a.dtable[r * a.row + i + l]) : T(0);
    const V inverse_x = math.exponentials(0, e_x), inverse_y = math.exponentials(a.bins, e_y);
    const auto x = math.template find<true>(e_x, inverse_x, V{}, index);
    const auto y = math.template find<true>(e_y, inverse_y, V{}, index);
    const auto raw = math.raw_slopes(index);
    const V d0 = math.slope(raw.r0, raw.fixed0), d1 = math.slope(raw.r1, raw.fixed1);
    store_gradients(math, e_x, e_y, inverse_x, inverse_y, x, y, raw, d0, d1, index,
                    OfBin<V>{by[0], by[1], by[2], by[3], by[4], by[5]}, lanes, M::COUNT);
    for (int64_t p = 0; p < parameters; ++p)
      for (int64_t l = 0; l < M::COUNT; ++l) a.dparams[p] += lanes[p * M::COUNT + l];
  });
}

template <int BYTES, typename T>
FASTFLOW_INLINE void table_simd(const SplineTable<T>& a) {
  a.zuko ? table_lanes<true, BYTES, T>(a) : table_lanes<false, BYTES, T>(a);
}
template <int BYTES, typename T>
FASTFLOW_INLINE void table_backward_simd(const SplineTableBackward<T>& a) {
  a.zuko ? table_backward_lanes<true, BYTES, T>(a) : table_backward_lanes<false, BYTES, T>(a);
}

template <int BYTES, typename T>
FASTFLOW_INLINE void forward_simd(const SplineForward<T>& f) {
  if (f.table) f.zuko ? forward_lanes<true, true, BYTES, T>(f) : forward_lanes<false, true, BYTES, T>(f);
  else f.zuko ? forward_lanes<true, false, BYTES, T>(f) : forward_lanes<false, false, BYTES, T>(f);
}
template <int BYTES, typename T>
FASTFLOW_INLINE void backward_simd(const SplineBackward<T>& f) {
  if (f.table) f.zuko ? backward_lanes<true, true, BYTES, T>(f) : backward_lanes<false, true, BYTES, T>(f);
  else f.zuko ? backward_lanes<true, false, BYTES, T>(f) : backward_lanes<false, false, BYTES, T>(f);
}

}  // namespace

FASTFLOW_MULTIVERSION(spline_elements, SplineForward<float>, forward_simd)
FASTFLOW_MULTIVERSION(spline_elements, SplineForward<double>, forward_simd)
FASTFLOW_MULTIVERSION(spline_elements_backward, SplineBackward<float>, backward_simd)
FASTFLOW_MULTIVERSION(spline_elements_backward, SplineBackward<double>, backward_simd)
FASTFLOW_MULTIVERSION(spline_table, SplineTable<float>, table_simd)
FASTFLOW_MULTIVERSION(spline_table, SplineTable<double>, table_simd)
FASTFLOW_MULTIVERSION(spline_table_backward, SplineTableBackward<float>, table_backward_simd)
FASTFLOW_MULTIVERSION(spline_table_backward, SplineTableBackward<double>, table_backward_simd)

}  // namespace fastflow::cpu
