#include "residual_network/elements.h"

#include <algorithm>

#include "cpu/activate.h"

namespace fastflow::cpu {
namespace {

// The first `count` elements of a vector, the others zero.
template <typename M>
FASTFLOW_INLINE typename M::V read(const auto* p, int64_t count) {
  if (count >= M::COUNT) return M::load(p);
  typename M::V v{};
  std::memcpy(&v, p, count * sizeof(*p));
  return v;
}

template <typename M>
FASTFLOW_INLINE void write(auto* p, const typename M::V& v, int64_t count) {
  if (count >= M::COUNT) M::store(p, v);
  else std::memcpy(p, &v, count * sizeof(*p));
}

template <int BYTES, typename T>
FASTFLOW_INLINE void activate_simd(const ActivationElements<T>& given) {
  using M = SimdMath<T, BYTES>;
  using V = typename M::V;
  const ActivationElements<T> f = given;
  for (int64_t row = 0, first = 0; row < f.rows; ++row, first += f.width)
    for (int64_t j = 0; j < f.width; j += M::COUNT) {
      const int64_t count = f.width - j, i = first + j;
      V z = read<M>(f.x + i, count);
      if (f.scale) z = z * read<M>(f.scale + j, count) + read<M>(f.shift + j, count);
      const V a = activated<M>(f.activation, z);
      if (f.gradient) {
        V d = read<M>(f.gradient + i, count) * slope_of<M>(f.activation, z, a);
        if (f.added) d += read<M>(f.added + i, count);
        write<M>(f.gradient_out + i, d, count);
      }
      if (f.out) write<M>(f.out + i, a, count);
    }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void gate_simd(const GateElements<T>& given) {
  using M = SimdMath<T, BYTES>;
  using V = typename M::V;
  const GateElements<T> f = given;
  for (int64_t i = 0; i < f.count; i += M::COUNT) {
    const int64_t count = f.count - i;
    V update = read<M>(f.update + i, count);
    if (f.gates) {
      const V s = sigmoid<M>(read<M>(f.gates + i, count));
      write<M>(f.gates + i, s, count);
      update *= s;
    }
    write<M>(f.out + i, read<M>(f.h + i, count) + update, count);
  }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void gate_backward_simd(const GateGradients<T>& given) {
  using M = Simd<T, BYTES>;
  using V = typename M::V;
  const GateGradients<T> f = given;
  for (int64_t i = 0; i < f.count; i += M::COUNT) {
    const int64_t count = f.count - i;
    const V s = read<M>(f.gates + i, count), d = read<M>(f.gradient + i, count) * s;
    write<M>(f.by_update + i, d, count);
    write<M>(f.by_gates + i, d * read<M>(f.update + i, count) * (1 - s), count);
  }
}

// Compilers vectorize these loops over units.
template <int, typename T>
FASTFLOW_INLINE void add_rows_simd(const RowSums<T>& given) {
  const RowSums<T> f = given;
  double* __restrict sums = f.sums;
  for (int64_t row = 0; row < f.rows; ++row) {
    const T* __restrict dz = f.dz + row * f.stride;
    for (int64_t j = 0; j < f.width; ++j) sums[j] += dz[j];
    if (!f.products) continue;
    const T* __restrict x = f.x + row * f.stride;
    const double* __restrict mean = f.mean;
    double* __restrict products = f.products;
    for (int64_t j = 0; j < f.width; ++j) products[j] += dz[j] * (x[j] - mean[j]);
  }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void norm_backward_simd(const NormGradients<T>& given) {
  using M = Simd<T, BYTES>;
  using V = typename M::V;
  const NormGradients<T> f = given;
  for (int64_t row = 0, first = 0; row < f.rows; ++row, first += f.width)
    for (int64_t j = 0; j < f.width; j += M::COUNT) {
      const int64_t count = f.width - j, i = first + j;
      const V deviation = read<M>(f.x + i, count) - read<M>(f.mean + j, count);
      V d =
          read<M>(f.dz + i, count) - read<M>(f.mean_dz + j, count) - read<M>(f.slope + j, count) * deviation;
      d *= read<M>(f.factor + j, count);
      if (f.added) d += read<M>(f.added + i, count);
      write<M>(f.out + i, d, count);
    }
}

}  // namespace

FASTFLOW_MULTIVERSION(activate, ActivationElements<float>, activate_simd)
FASTFLOW_MULTIVERSION(activate, ActivationElements<double>, activate_simd)
FASTFLOW_MULTIVERSION(gate, GateElements<float>, gate_simd)
FASTFLOW_MULTIVERSION(gate, GateElements<double>, gate_simd)
FASTFLOW_MULTIVERSION(gate_backward, GateGradients<float>, gate_backward_simd)
FASTFLOW_MULTIVERSION(gate_backward, GateGradients<double>, gate_backward_simd)
FASTFLOW_MULTIVERSION(add_rows, RowSums<float>, add_rows_simd)
FASTFLOW_MULTIVERSION(add_rows, RowSums<double>, add_rows_simd)
FASTFLOW_MULTIVERSION(norm_backward, NormGradients<float>, norm_backward_simd)
FASTFLOW_MULTIVERSION(norm_backward, NormGradients<double>, norm_backward_simd)

}  // namespace fastflow::cpu
