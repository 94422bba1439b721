#include "cpu/sums.h"

#include <type_traits>

#include "cpu/elementary.h"

namespace fastflow::cpu {
namespace {

// As many values as a vector has doubles.
template <int BYTES, typename T>
FASTFLOW_INLINE typename Lanes<double, BYTES>::V load_doubles(const T* p) {
  if constexpr (std::is_same_v<T, double>) return Lanes<double, BYTES>::load(p);
  else return __builtin_convertvector(Lanes<float, BYTES / 2>::load(p), typename Lanes<double, BYTES>::V);
}

// Eight vectors of values become one by adding pairs, in their own precision: its rounding is that of three additions.
template <int BYTES, typename T>
FASTFLOW_INLINE void add_eight(const T* p, typename Lanes<double, BYTES>::V parts[2]) {
  using M = Lanes<T, BYTES>;
  constexpr int64_t C = M::COUNT;
  const typename M::V sum = ((M::load(p) + M::load(p + C)) + (M::load(p + 2 * C) + M::load(p + 3 * C))) +
                            ((M::load(p + 4 * C) + M::load(p + 5 * C)) + (M::load(p + 6 * C) + M::load(p + 7 * C)));
  T values[C];
  M::store(values, sum);
  for (int64_t j = 0; j < C / Lanes<double, BYTES>::COUNT; ++j) parts[j] += load_doubles<BYTES>(values + j * Lanes<double, BYTES>::COUNT);
}

template <int BYTES, typename T>
FASTFLOW_INLINE double sum_of(const T* values, int64_t count) {
  using M = Lanes<double, BYTES>;
  constexpr int64_t EIGHT = 8 * Lanes<T, BYTES>::COUNT;
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
FASTFLOW_INLINE void add_lines_of(const Sum<T>& s) {
  for (int64_t l = 0; l < s.lines; ++l) s.sums[l] += sum_of<BYTES>(s.values + l * s.length, s.length);
}

template <int BYTES, typename T>
FASTFLOW_INLINE void add_each_of(const Sum<T>& s) {
  using M = Lanes<double, BYTES>;
  const int64_t count = s.lines * s.length;
  int64_t i = 0;
  for (; i + M::COUNT <= count; i += M::COUNT) M::store(s.sums + i, M::load(s.sums + i) + load_doubles<BYTES>(s.values + i));
  for (; i < count; ++i) s.sums[i] += s.values[i];
}

}  // namespace

FASTFLOW_CLONES(add_lines, Sum<float>, add_lines_of)
FASTFLOW_CLONES(add_lines, Sum<double>, add_lines_of)
FASTFLOW_CLONES(add_each, Sum<float>, add_each_of)
FASTFLOW_CLONES(add_each, Sum<double>, add_each_of)

}  // namespace fastflow::cpu
