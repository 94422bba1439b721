#include "masked_inverse/elements.h"

#include "cpu/activate.h"

namespace fastflow::cpu {
namespace {

template <int BYTES, typename T>
FASTFLOW_INLINE void finish_simd(const UnitElements<T>& given) {
  using M = SimdMath<T, BYTES>;
  const UnitElements<T> f = given;
  for (int64_t i = 0; i < f.count; i += M::COUNT) {
    auto u = M::load(f.units + i);
    if (f.gates) u *= M::load(f.gates + i);
    if (f.after) u = activated<M>(f.activation, u);
    if (f.skip) u += M::load(f.skip + i);
    M::store(f.units + i, u);
    if (f.read) M::store(f.read + i, activated<M>(f.activation, u));
  }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void invert_simd(const AffineInverse<T>& given) {
  using M = SimdMath<T, BYTES>;
  using V = typename M::V;
  const AffineInverse<T> f = given;
  for (int64_t i = 0; i < f.count; i += M::COUNT) {
    const V z = M::load(f.z + i), shift = M::load(f.shift + i), raw = M::load(f.raw + i);
    V s, log_s;
    if (f.scale == AffineScale::softplus || (f.scale == AffineScale::sigmoid && f.offset > 0)) {
      if (f.scale == AffineScale::softplus) s = M::max(raw, 0) + M::log1p(M::exp(-M::abs(raw)));
      else s = sigmoid<M>(raw + 2);
      s += f.offset;
      log_s = M::log(s);
    } else {
      if (f.scale == AffineScale::exp) log_s = raw;
      else if (f.scale == AffineScale::soft_clamp) log_s = f.factor * M::tanh(raw / f.factor);
      else if (f.scale == AffineScale::tanh) log_s = f.factor * M::tanh(raw);
      else if (f.scale == AffineScale::soft_clip) log_s = raw / (M::abs(raw / f.factor) + 1);
      else log_s = M::min(raw + 2, 0) - M::log1p(M::exp(-M::abs(raw + 2)));
      s = M::exp(log_s);
    }
    M::store(f.x + i, f.scale_first ? (z - shift) / s : z / s - shift);
    M::store(f.log_det + i, M::load(f.log_det + i) - log_s);
  }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void pull_simd(const UnitGradients<T>& given) {
  using M = Simd<T, BYTES>;
  const UnitGradients<T> f = given;
  for (int64_t i = 0; i < f.count; i += M::COUNT) {
    auto d = M::load(f.gradient + i);
    if (f.outer) d *= M::load(f.outer + i);
    if (f.skip) d += M::load(f.skip + i);
    if (f.units) M::store(f.units + i, d);
    if (f.inner) d *= M::load(f.inner + i);
    M::store(f.products + i, d);
  }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void solve_simd(const FeatureGradients<T>& given) {
  using M = Simd<T, BYTES>;
  const FeatureGradients<T> f = given;
  for (int64_t i = 0; i < f.count; i += M::COUNT) {
    auto sum = M::load(f.sum + i);
    if (f.read) sum *= M::load(f.read + i);
    const auto u = (M::load(f.v + i) - sum) / M::load(f.slope + i);
    M::store(f.u + i, u);
    for (int64_t p = i; p < f.parameters * f.row; p += f.row) {
      auto d = M::load(f.jac + p) * u;
      if (f.dparams) d -= M::load(f.dparams + p);
      M::store(f.products + p, d);
    }
  }
}

}  // namespace

FASTFLOW_MULTIVERSION(finish, UnitElements<float>, finish_simd)
FASTFLOW_MULTIVERSION(finish, UnitElements<double>, finish_simd)
FASTFLOW_MULTIVERSION(invert, AffineInverse<float>, invert_simd)
FASTFLOW_MULTIVERSION(invert, AffineInverse<double>, invert_simd)
FASTFLOW_MULTIVERSION(pull, UnitGradients<float>, pull_simd)
FASTFLOW_MULTIVERSION(pull, UnitGradients<double>, pull_simd)
FASTFLOW_MULTIVERSION(solve, FeatureGradients<float>, solve_simd)
FASTFLOW_MULTIVERSION(solve, FeatureGradients<double>, solve_simd)

}  // namespace fastflow::cpu
