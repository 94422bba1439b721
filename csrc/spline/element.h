#pragma once
// The inverse of one rational-quadratic spline, for CUDA kernels (fastflow/ops/spline/reference.py has the
// formulas). spline.cpp computes the same for vectors of elements.
#include <cmath>

#include "block.h"
#include "spline/spline.h"

namespace fastflow {

template <typename T>
FASTFLOW_HD T softplus(T v) {
  return (v > 0 ? v : T(0)) + std::log1p(std::exp(-std::abs(v)));
}

template <typename T>
struct SplineElement : cpu::Splines<T> {
  using Base = cpu::Splines<T>;
  using Base::bins, Base::tails, Base::zuko, Base::start, Base::length, Base::smallest, Base::share,
      Base::factor, Base::min_slope, Base::slope_offset, Base::inverse_log_range;

  // A raw width or height, before the softmax.
  FASTFLOW_HD T squashed(T raw) const {
    const T u = raw * factor;
    return zuko ? u / (std::abs(u) * (2 * inverse_log_range) + 1) : u;
  }

  // x of y. `raw(p)`: parameter p. `exponential(i)`: e^(squashed raw size - the largest one), of the widths
  // and then of the heights.
  template <class Raw, class Exponential>
  FASTFLOW_HD T inverse(T y, const Raw& raw, const Exponential& exponential, T& log_slope) const {
    const int count = static_cast<int>(bins);
    const T end = start + length, least = length * smallest;
    const T kept = y < start ? start : y > end ? end : y;  // NaN stays NaN
    T sum_x = 0, sum_y = 0;
    FASTFLOW_ROLLED
    for (int i = 0; i < count; ++i) sum_x += exponential(i), sum_y += exponential(count + i);
    const T scale_x = length * share / sum_x, scale_y = length * share / sum_y;
    T below_x = 0, below_y = 0, to_y = 0;
    int index = 0;
    FASTFLOW_ROLLED
    for (int i = 1; i < count; ++i) {
      to_y += exponential(count + i - 1);
      const T knot = to_y * scale_y + (start + least * i);
      if (zuko ? kept > knot : kept >= knot) index = i, below_y = to_y;
    }
    FASTFLOW_ROLLED
    for (int i = 0; i < index; ++i) below_x += exponential(i);
    const T x_low = below_x * scale_x + (index * least + start), width = exponential(index) * scale_x + least;
    const T y_low = below_y * scale_y + (index * least + start);
    const T height = exponential(count + index) * scale_y + least;

    const T d0 = slope(index, raw), d1 = slope(index + 1, raw), s = height / width, q = d0 + d1 - 2 * s;
    const T eta = kept - y_low, a = height * (s - d0) + eta * q, b = height * d0 - eta * q;
    const T square = b * b + 4 * a * s * eta;
    const T root = std::sqrt(square < 0 ? T(0) : square);
    T xi = b >= 0 ? 2 * s * eta / (b + root) : (root - b) / (2 * a);  // without cancellation
    xi = kept >= end ? T(1) : xi < 0 ? T(0) : xi > 1 ? T(1) : xi;     // only rounding differs from that
    const T rest = 1 - xi, t = xi * rest, ratio = s / (s + q * t);
    const T rise = (d1 * xi * xi + 2 * s * t + d0 * rest * rest) * ratio * ratio;  // dy/dx
    const T x = x_low + xi * width;
    const bool inside = (zuko ? y > start : y >= start) && y <= end;
    if (tails != cpu::Tails::none && !inside) {  // the identity
      log_slope = y == y ? T(0) : y;
      return y;
    }
    log_slope = -std::log(rise);
    return inside ? x : x + (y - kept) / rise;
  }

 private:
  template <class Raw>
  FASTFLOW_HD T slope(int knot, const Raw& raw) const {
    const int count = static_cast<int>(bins);
    if (tails == cpu::Tails::linear) {
      if (knot == 0 || knot == count) return 1;
      --knot;
    } else if (tails == cpu::Tails::circular && knot == count) {
      knot = 0;
    }
    const T r = raw(2 * count + knot);
    if (zuko) return std::exp(r / (std::abs(r) * inverse_log_range + 1));
    return softplus(r + slope_offset) + min_slope;
  }
};

}  // namespace fastflow
