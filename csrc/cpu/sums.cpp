#include "cpu/sums.h"

#include <type_traits>

#include "cpu/simd_math.h"

namespace fastflow::cpu {
namespace {

// Loads as many values as a vector has doubles.
template <int BYTES, typename T>
FASTFLOW_INLINE typename Simd<double, BYTES>::V load_doubles(const T* p) {
  if constexpr (std::is_same_v<T, double>) return Simd<double, BYTES>::load(p);
  else return __builtin_convertvector(Simd<float, BYTES / 2>::load(p), typename Simd<double, BYTES>::V);
}

// Adds eight vectors pairwise in the precision of the values, which rounds like three additions.
template <int BYTES, typename T>
FASTFLOW_INLINE void add_eight(const T* p, typename Simd<double, BYTES>::V parts[2]) {
  using M = Simd<T, BYTES>;
  constexpr int64_t C = M::COUNT;
  const typename M::V sum =
      ((M::load(p) + M::load(p + C)) + (M::load(p + 2 * C) + M::load(p + 3 * C))) +
      ((M::load(p + 4 * C) + M::load(p + 5 * C)) + (M::load(p + 6 * C) + M::load(p + 7 * C)));
  T values[C];
  M::store(values, sum);
  for (int64_t j = 0; j < C / Simd<double, BYTES>::COUNT; ++j)
    parts[j] += load_doubles<BYTES>(values + j * Simd<double, BYTES>::COUNT);
}

template <int BYTES, typename T>
FASTFLOW_INLINE double sum_of(const T* values, int64_t count) {
  using M = Simd<double, BYTES>;
  constexpr int64_t EIGHT = 8 * Simd<T, BYTES>::COUNT;
  double total = 0;
  int64_t i = 0;
  if (count >= M::COUNT) {
    typename M::V parts[2] = {};
    for (; i + EIGHT <= count; i += EIGHT) add_eight<BYTES>(values + i, parts);
    for (; i + M::COUNT <= count; i += M::COUNT) parts[0] += load_doubles<BYTES>(values + i);
    const typename M::V sums = parts[0] + parts[1];
    for (int64_t j = 0; j < M::COUNT; ++j) total += sums[j];
  }
  for (; i < count; ++i) total += values[i];
  return total;
}

template <int BYTES, typename T>
FASTFLOW_INLINE void add_lines_simd(const Sum<T>& s) {
  for (int64_t l = 0; l < s.lines; ++l) s.sums[l] += sum_of<BYTES>(s.values + l * s.length, s.length);
}

template <int BYTES, typename T>
FASTFLOW_INLINE void add_each_simd(const Sum<T>& given) {
  const Sum<T> s = given;  // a copy: the compiler assumes that a store may change `given`
  using M = Simd<double, BYTES>;
  const int64_t count = s.lines * s.length;
  int64_t i = 0;
  for (; i + M::COUNT <= count; i += M::COUNT)
    M::store(s.sums + i, M::load(s.sums + i) + load_doubles<BYTES>(s.values + i));
  for (; i < count; ++i) s.sums[i] += s.values[i];
}

template <int BYTES, typename T>
FASTFLOW_INLINE void add_simd(const Addition<T>& given) {
  const Addition<T> a = given;
  using M = Simd<T, BYTES>;
  int64_t i = 0;
  for (; i + M::COUNT <= a.count; i += M::COUNT)
    M::store(a.sums + i, M::load(a.sums + i) + M::load(a.values + i));
  for (; i < a.count; ++i) a.sums[i] += a.values[i];
}

template <int BYTES, typename T>
FASTFLOW_INLINE void add_deviations_of_lines_simd(const DeviationSum<T>& s) {
  using M = Simd<double, BYTES>;
  using V = typename M::V;
  for (int64_t l = 0; l < s.lines; ++l) {
    const T* line = s.values + l * s.length;
    const double pivot = s.pivots[l];
    double sum = 0, square = 0;
    V sums[2] = {}, squares[2] = {};
    int64_t i = 0;
    for (; i + 2 * M::COUNT <= s.length; i += 2 * M::COUNT)
      for (int64_t j = 0; j < 2; ++j) {
        const V d = load_doubles<BYTES>(line + i + j * M::COUNT) - pivot;
        sums[j] += d;
        squares[j] += d * d;
      }
    for (; i < s.length; ++i) {
      const double d = line[i] - pivot;
      sum += d;
      square += d * d;
    }
    sums[0] += sums[1];
    squares[0] += squares[1];
    for (int64_t j = 0; j < M::COUNT; ++j) sum += sums[0][j], square += squares[0][j];
    s.sums[l] += sum;
    s.squares[l] += square;
  }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void add_deviations_of_each_simd(const DeviationSum<T>& given) {
  const DeviationSum<T> s = given;
  using M = Simd<double, BYTES>;
  const int64_t count = s.lines * s.length;
  int64_t i = 0;
  for (; i + M::COUNT <= count; i += M::COUNT) {
    const typename M::V d = load_doubles<BYTES>(s.values + i) - M::load(s.pivots + i);
    M::store(s.sums + i, M::load(s.sums + i) + d);
    M::store(s.squares + i, M::load(s.squares + i) + d * d);
  }
  for (; i < count; ++i) {
    const double d = s.values[i] - s.pivots[i];
    s.sums[i] += d;
    s.squares[i] += d * d;
  }
}

}  // namespace

FASTFLOW_MULTIVERSION(add_lines, Sum<float>, add_lines_simd)
FASTFLOW_MULTIVERSION(add_lines, Sum<double>, add_lines_simd)
FASTFLOW_MULTIVERSION(add_each, Sum<float>, add_each_simd)
FASTFLOW_MULTIVERSION(add_each, Sum<double>, add_each_simd)
FASTFLOW_MULTIVERSION(add, Addition<float>, add_simd)
FASTFLOW_MULTIVERSION(add, Addition<double>, add_simd)
FASTFLOW_MULTIVERSION(add_deviations_of_lines, DeviationSum<float>, add_deviations_of_lines_simd)
FASTFLOW_MULTIVERSION(add_deviations_of_lines, DeviationSum<double>, add_deviations_of_lines_simd)
FASTFLOW_MULTIVERSION(add_deviations_of_each, DeviationSum<float>, add_deviations_of_each_simd)
FASTFLOW_MULTIVERSION(add_deviations_of_each, DeviationSum<double>, add_deviations_of_each_simd)

}  // namespace fastflow::cpu
