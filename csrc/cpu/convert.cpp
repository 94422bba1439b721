#include "cpu/convert.h"

#include <torch/headeronly/util/BFloat16.h>

#include "cpu/simd_math.h"

namespace fastflow::cpu {
namespace {

template <int BYTES>
struct Words {
  static constexpr int64_t COUNT = BYTES / 4;
  typedef uint32_t V __attribute__((vector_size(BYTES)));
  typedef uint16_t Half __attribute__((vector_size(BYTES / 2)));
};

template <int BYTES>
FASTFLOW_INLINE void widen_simd(const Widening& given) {
  const Widening w = given;  // a copy: the compiler assumes that a store may change `given`
  using W = Words<BYTES>;
  int64_t i = 0;
  for (; i + W::COUNT <= w.count; i += W::COUNT) {
    typename W::Half bits;
    std::memcpy(&bits, w.from + i, sizeof(bits));
    const typename W::V words = __builtin_convertvector(bits, typename W::V) << 16;
    std::memcpy(w.to + i, &words, BYTES);
  }
  for (; i < w.count; ++i) w.to[i] = torch::headeronly::detail::f32_from_bits(w.from[i]);
}

template <int BYTES>
FASTFLOW_INLINE void narrow_simd(const Narrowing& given) {
  const Narrowing n = given;
  using W = Words<BYTES>;
  using M = Simd<float, BYTES>;
  int64_t i = 0;
  for (; i + W::COUNT <= n.count; i += W::COUNT) {
    const typename M::V value = M::load(n.from + i);
    const typename W::V bits = (typename W::V)value;
    const typename W::V rounded = (bits + ((bits >> 16 & 1) + 0x7fff)) >> 16;
    const typename W::V words = value == value ? rounded : (typename W::V{} + 0x7fc0);
    const typename W::Half halves = __builtin_convertvector(words, typename W::Half);
    std::memcpy(n.to + i, &halves, sizeof(halves));
  }
  for (; i < n.count; ++i) n.to[i] = torch::headeronly::detail::round_to_nearest_even(n.from[i]);
}

}  // namespace

FASTFLOW_MULTIVERSION(widen, Widening, widen_simd)
FASTFLOW_MULTIVERSION(narrow, Narrowing, narrow_simd)

}  // namespace fastflow::cpu
