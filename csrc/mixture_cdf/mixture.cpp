// The arithmetic of mixtures of logistics, compiled for each instruction set.
#include "mixture_cdf/mixture.h"

#include <limits>

#include "cpu/simd_math.h"
#include "multiversion.h"

namespace fastflow::cpu {
namespace {

constexpr double MAX_LOG_WIDTH = 7;  // of a component, up and down
constexpr int64_t MAX_STEPS = 100;   // of the inverse: each halves at least the last step or the bracket

template <typename M, typename T>
struct MixtureMath {
  using V = typename M::V;
  using I = typename M::I;

  // Selection by integers, as in spline.cpp: g++ 12 splits a comparison that several selections use.
  static FASTFLOW_INLINE I at_least(const V& a, const V& b) { return (I)(a >= b ? (V)~I{} : V{}); }
  static FASTFLOW_INLINE V select(const I& where, const V& a, const V& b) {
    return (V)((where & (I)a) | (~where & (I)b));
  }
  static FASTFLOW_INLINE V larger(const V& a, const V& b) { return a > b ? a : b; }
  static FASTFLOW_INLINE V smaller(const V& a, const V& b) { return a < b ? a : b; }
  static FASTFLOW_INLINE bool any(const I& where) {
    typename M::Integer found = 0;
    for (int64_t i = 0; i < M::COUNT; ++i) found |= where[i];
    return found != 0;
  }

  const T* params;  // of these lanes
  int64_t components, stride;
  // of each component: logits less their largest, e^-s; the largest of the latter
  V weight[MAX_COMPONENTS], rate[MAX_COMPONENTS], fastest;

  FASTFLOW_INLINE MixtureMath(const T* params_, int64_t components_, int64_t stride_)
      : params(params_), components(components_), stride(stride_) {
    V top = M::all(-INFINITY);
    for (int64_t k = 0; k < components; ++k) top = larger(logit(k), top);
    fastest = V{};
    for (int64_t k = 0; k < components; ++k) {
      weight[k] = logit(k) - top;
      rate[k] = M::exp(-log_width(k));
      fastest = larger(rate[k], fastest);
    }
  }
  FASTFLOW_INLINE V log_scale() const { return M::tanh(M::load(params)); }
  FASTFLOW_INLINE V shift() const { return M::load(params + stride); }
  FASTFLOW_INLINE V logit(int64_t k) const { return M::load(params + (2 + k) * stride); }
  FASTFLOW_INLINE V mean(int64_t k) const { return M::load(params + (2 + components + k) * stride); }
  FASTFLOW_INLINE V raw_log_width(int64_t k) const {
    return M::load(params + (2 + 2 * components + k) * stride);
  }
  FASTFLOW_INLINE V log_width(int64_t k) const {
    return M::min(M::max(raw_log_width(k), -MAX_LOG_WIDTH), MAX_LOG_WIDTH);
  }

  // logit F and its slope. Of each component: u; its parts of F and 1 - F, of which the sums are f and f1;
  // its part of the slope, of which the sum is `total`.
  struct Terms {
    V z, slope, log_slope, f, f1, total;
  };
  struct Parts {
    V u[MAX_COMPONENTS], below[MAX_COMPONENTS], above[MAX_COMPONENTS], slope[MAX_COMPONENTS];
  };

  // The slope f / (F (1 - F)) is a sum over the components by the smaller side, F or 1 - F, times
  // 1 + e^-|z|. Between distant components it is below the smallest number, and LOG computes its logarithm.
  template <bool LOG>
  FASTFLOW_INLINE Terms terms(const V& x, Parts& p) const {
    V top = M::all(-INFINITY), top1 = top;
    for (int64_t k = 0; k < components; ++k) {
      const V u = (x - mean(k)) * rate[k];
      p.u[k] = u;
      top = larger(weight[k] + M::min(u, 0), top);
      top1 = larger(weight[k] - M::max(u, 0), top1);
    }
    Terms t;
    t.f = V{}, t.f1 = V{};
    for (int64_t k = 0; k < components; ++k) {
      const V u = p.u[k], e = M::exp(-M::abs(u)), one = 1 / (1 + e);
      t.f += p.below[k] = M::exp(weight[k] + M::min(u, 0) - top) * one;
      t.f1 += p.above[k] = M::exp(weight[k] - M::max(u, 0) - top1) * one;
      p.slope[k] = one;
    }
    t.z = (top - top1) + M::log(t.f / t.f1);
    const I left = ~at_least(t.z, V{});  // F is the smaller side
    const V both = 1 + M::exp(-M::abs(t.z)), side = select(left, t.f, t.f1);
    t.total = V{};
    for (int64_t k = 0; k < components; ++k) {
      const V u = p.u[k], part = select(left, p.below[k], p.above[k]);
      // the logistic of u towards the other side: `one`, or 1 - one without cancellation
      const V to = select(left, -u, u), one = p.slope[k], toward = to >= 0 ? one : M::exp(to) * one;
      t.total += p.slope[k] = part * toward * rate[k];
    }
    t.slope = t.total / side * both;
    if (!LOG) return t;
    t.log_slope = M::log(t.slope);
    const T least = sizeof(T) == 4 ? T(1e-25) : T(1e-250);
    if (any((I)(t.slope < least ? (V)~I{} : V{}))) {
      V highest = M::all(-INFINITY);
      for (int64_t k = 0; k < components; ++k)
        highest = larger(exponent(k, p.u[k], left, top, top1), highest);
      V total{};
      for (int64_t k = 0; k < components; ++k) {
        const V one = 1 / (1 + M::exp(-M::abs(p.u[k])));
        total += p.slope[k] = M::exp(exponent(k, p.u[k], left, top, top1) - highest) * one * one;
      }
      t.total = total;
      t.log_slope = highest + M::log(total / side * both);
    }
    return t;
  }
  // of a component's part of the slope
  FASTFLOW_INLINE V exponent(int64_t k, const V& u, const I& left, const V& top, const V& top1) const {
    const V below = weight[k] + M::min(u, 0) - top, above = weight[k] - M::max(u, 0) - top1;
    const V to = select(left, -u, u);
    return select(left, below, above) + M::min(to, 0) - log_width(k);
  }

  // x with logit F = z, by Newton's method in a bracket, which is halved where a step would leave it or is
  // more than half of the last one. logit F is between the least and the greatest u.
  FASTFLOW_INLINE V root(const V& z, Parts& p) const {
    constexpr T EPSILON = std::numeric_limits<T>::epsilon();
    const T near = std::sqrt(EPSILON) / 2;
    V low = M::all(INFINITY), high = -low;
    for (int64_t k = 0; k < components; ++k) {
      const V end = mean(k) + z / rate[k];
      low = smaller(end, low), high = larger(end, high);
    }
    V x = low + (high - low) / 2, last = high - low;
    I open = ~I{};  // lanes that have not converged
    for (int64_t i = 0; i < MAX_STEPS && any(open); ++i) {
      const Terms t = terms<false>(x, p);
      const I above = ~at_least(z, t.z);
      low = select(above, low, x), high = select(above, x, high);
      const V residual = z - t.z, step = residual / t.slope, to = x + step, size = M::abs(step);
      // the derivative of the log-slope is at most a few times the largest rate, so the error after a step
      // that is a small part of the width is of the order of its square
      const I small = at_least(larger(M::abs(x) * (2 * EPSILON), near / fastest), size) |
                      at_least((M::abs(z) + 1) * (2 * EPSILON), M::abs(residual));
      const I inside = at_least(to, low) & at_least(high, to);
      const I newton = inside & (small | at_least(M::abs(last), size * 2));
      const V halved = low + (high - low) / 2;
      last = select(newton, step, high - low);
      x = select(open, select(newton, to, select(small, x, halved)), x);
      open &= ~small & at_least(z, z);  // NaN ends at once
    }
    return x + (z - z);
  }
};

template <int BYTES, typename T>
FASTFLOW_INLINE void forward_simd(const MixtureForward<T>& given) {
  using M = SimdMath<T, BYTES>;
  using V = typename M::V;
  using Math = MixtureMath<M, T>;
  const MixtureForward<T> f = given;  // a copy: the compiler assumes that a store may change `given`
  typename Math::Parts p;
  for (int64_t i = 0; i < f.count; i += M::COUNT) {
    const Math math(f.params + i, f.components, f.stride);
    const V v = M::load(f.v + i), a = math.log_scale(), b = math.shift();
    V x = v;
    if (f.inverse) x = math.root((v - b) * M::exp(-a), p);
    const auto t = math.template terms<true>(x, p);
    const V log_slope = t.log_slope + a;
    M::store(f.out + i, f.inverse ? x : M::exp(a) * t.z + b);
    M::store(f.log_slope + i, f.inverse ? -log_slope : log_slope);
  }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void backward_simd(const MixtureBackward<T>& given) {
  using M = SimdMath<T, BYTES>;
  using V = typename M::V;
  using I = typename M::I;
  using Math = MixtureMath<M, T>;
  const MixtureBackward<T> f = given;
  const int64_t n = f.components;
  typename Math::Parts p;
  V by_u[MAX_COMPONENTS];
  for (int64_t i = 0; i < f.count; i += M::COUNT) {
    const Math math(f.params + i, n, f.stride);
    const V v = M::load(f.v + i), a = math.log_scale(), b = math.shift(), scale = M::exp(a);
    V g = M::load(f.g + i), dlog = M::load(f.dlog_slope + i);
    const V x = f.given == MixtureGiven::x ? v : math.root((v - b) * M::exp(-a), p);
    const auto t = math.template terms<true>(x, p);
    const V inverse_f = 1 / t.f, inverse_f1 = 1 / t.f1, inverse_total = 1 / t.total;
    V log_by_x{}, weights{};
    for (int64_t k = 0; k < n; ++k) {
      const V u = p.u[k], e = M::exp(-M::abs(u)), one = 1 / (1 + e), other = e * one;
      const V left = u >= 0 ? one : other, right = u >= 0 ? other : one;
      const V below = p.below[k] *= inverse_f, above = p.above[k] *= inverse_f1,
              share = p.slope[k] *= inverse_total;
      const V log_by_u = share * (right - left) - below * right + above * left;
      by_u[k] = below * right + above * left;  // of z
      p.u[k] = log_by_u;                       // u is computed again below
      log_by_x += math.rate[k] * log_by_u;
      weights += M::exp(math.weight[k]);
    }
    V dv;
    if (f.given == MixtureGiven::inverse) {
      dlog = -dlog;
      g = -(g + dlog * log_by_x) * M::exp(-(t.log_slope + a));
      dv = -g;
    }
    const V by_z = g * scale;
    if (f.given != MixtureGiven::inverse) dv = by_z * t.slope + dlog * log_by_x;
    if (f.x) M::store(f.x + i, x);
    M::store(f.dv + i, dv);
    const V inverse_weights = 1 / weights;
    T* dparams = f.dparams + i;
    for (int64_t k = 0; k < n; ++k) {
      const V below = p.below[k], above = p.above[k], share = p.slope[k];
      const V u = (x - math.mean(k)) * math.rate[k], by = by_z * by_u[k] + dlog * p.u[k];
      const V weight = M::exp(math.weight[k]) * inverse_weights;
      M::store(dparams + (2 + k) * f.stride,
               by_z * (below - above) + dlog * (share - below - above + weight));
      M::store(dparams + (2 + n + k) * f.stride, -math.rate[k] * by);
      const I inside = (I)(M::abs(math.raw_log_width(k)) < T(MAX_LOG_WIDTH) ? (V)~I{} : V{});
      M::store(dparams + (2 + 2 * n + k) * f.stride, Math::select(inside, -u * by - dlog * share, V{}));
    }
    M::store(dparams, (by_z * t.z + dlog) * (1 - a) * (1 + a));
    M::store(dparams + f.stride, g);
  }
}

}  // namespace

FASTFLOW_MULTIVERSION(mixture_elements, MixtureForward<float>, forward_simd)
FASTFLOW_MULTIVERSION(mixture_elements, MixtureForward<double>, forward_simd)
FASTFLOW_MULTIVERSION(mixture_elements_backward, MixtureBackward<float>, backward_simd)
FASTFLOW_MULTIVERSION(mixture_elements_backward, MixtureBackward<double>, backward_simd)

}  // namespace fastflow::cpu
