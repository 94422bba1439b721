#include "affine_coupling/coupling.h"

#include "cpu/simd_math.h"

namespace fastflow::cpu {
namespace {

// log s and, with GRADIENTS, its derivatives with respect to the network's output and the factor.
template <bool GRADIENTS, typename M, typename V = typename M::V>
FASTFLOW_INLINE void log_scale(Scale scale, const V& raw, const V& f, V& log_s, V& by_raw, V& by_factor) {
  if (scale == Scale::exp) {
    log_s = raw;
    if (GRADIENTS) by_raw = M::all(1);
  } else if (scale == Scale::sigmoid) {
    const V a = raw + 2, e = M::exp(-M::abs(a));  // log sigmoid(a) = min(a, 0) - log(1 + e^-|a|)
    log_s = M::min(a, 0) - M::log1p(e);
    if (GRADIENTS) by_raw = (a < 0 ? M::all(1) : e) / (e + 1);
  } else {
    const bool soft = scale == Scale::soft_clamp;
    V a = raw;
    if (soft) a = raw / f;
    const V th = M::tanh(a);
    log_s = f * th;
    if (!GRADIENTS) return;
    const V slope = 1 - th * th;
    by_raw = soft ? slope : f * slope;
    by_factor = soft ? th - a * slope : th;
  }
}

// v for active elements, otherwise 0. Uses bit masks, because g++ 12 splits a comparison that two selections
// share into scalars.
template <typename M, typename V = typename M::V>
FASTFLOW_INLINE V masked(const typename M::Integer* active, int64_t i, const V& v) {
  if (!active) return v;
  typename M::I mask;
  std::memcpy(&mask, active + i, sizeof(mask));
  return (V)((typename M::I)v & mask);
}

template <int BYTES, typename T>
FASTFLOW_INLINE void couple_simd(const Coupling<T>& c) {
  using M = SimdMath<T, BYTES>;
  using V = typename M::V;
  for (int64_t i = 0; i < c.count; i += M::COUNT) {
    const V v = M::load(c.v + i), shift = masked<M>(c.active, i, M::load(c.shift + i));
    if (c.scale == Scale::none) {
      M::store(c.out + i, c.inverse ? v - shift : v + shift);
      continue;
    }
    const V raw = masked<M>(c.active, i, M::load(c.raw + i)), f = c.factor ? M::load(c.factor + i) : V{};
    V log_s, by_raw{}, by_factor{};
    log_scale<false, M>(c.scale, raw, f, log_s, by_raw, by_factor);
    log_s = masked<M>(c.active, i, log_s);
    const V s = M::exp(log_s);
    M::store(c.log_s + i, c.inverse ? -log_s : log_s);
    // divides by s, because e^-log_s is rounded differently
    if (c.inverse) M::store(c.out + i, c.scale_first ? (v - shift) / s : v / s - shift);
    else M::store(c.out + i, c.scale_first ? v * s + shift : (v + shift) * s);
  }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void couple_backward_simd(const CouplingBackward<T>& c) {
  using M = SimdMath<T, BYTES>;
  using V = typename M::V;
  for (int64_t i = 0; i < c.count; i += M::COUNT) {
    const V g = M::load(c.dout + i);
    if (c.scale == Scale::none) {
      if (c.x) M::store(c.x + i, M::load(c.v + i) - masked<M>(c.active, i, M::load(c.shift + i)));
      M::store(c.dv + i, g);
      M::store(c.dshift + i, masked<M>(c.active, i, c.inverse ? -g : g));
      continue;
    }
    V v = M::load(c.v + i);
    const V shift = masked<M>(c.active, i, M::load(c.shift + i)), dlog_det = M::load(c.dlog_det + i);
    const V raw = masked<M>(c.active, i, M::load(c.raw + i)), f = c.factor ? M::load(c.factor + i) : V{};
    V log_s, by_raw{}, by_factor{};
    log_scale<true, M>(c.scale, raw, f, log_s, by_raw, by_factor);
    log_s = masked<M>(c.active, i, log_s);
    const V s = M::exp(c.inverse ? -log_s : log_s);
    if (c.x) {
      v = c.scale_first ? (v - shift) / s : v / s - shift;
      M::store(c.x + i, v);
    }
    const V dv = g * s;
    V dshift, dlog_s;
    if (c.inverse) {
      dshift = c.scale_first ? -dv : -g;
      dlog_s = -dv * (c.scale_first ? v - shift : v) - dlog_det;
    } else {
      dshift = c.scale_first ? g : dv;
      dlog_s = dv * (c.scale_first ? v : v + shift) + dlog_det;
    }
    dlog_s = masked<M>(c.active, i, dlog_s);
    M::store(c.dv + i, dv);
    M::store(c.dshift + i, masked<M>(c.active, i, dshift));
    M::store(c.draw + i, dlog_s * by_raw);
    if (c.dfactor) M::store(c.dfactor + i, dlog_s * by_factor);
  }
}

}  // namespace

FASTFLOW_MULTIVERSION(couple, Coupling<float>, couple_simd)
FASTFLOW_MULTIVERSION(couple, Coupling<double>, couple_simd)
FASTFLOW_MULTIVERSION(couple_backward, CouplingBackward<float>, couple_backward_simd)
FASTFLOW_MULTIVERSION(couple_backward, CouplingBackward<double>, couple_backward_simd)

}  // namespace fastflow::cpu
