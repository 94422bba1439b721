#include "cpu/transpose.h"

#include <utility>

#include "cpu/simd_math.h"
#include "multiversion.h"

namespace fastflow::cpu {
namespace {

// Square blocks of a matrix, transposed in registers.
template <int BYTES, typename T>
struct Square {
  static constexpr int WIDTH = BYTES < 32 ? BYTES : 32;
  static constexpr int64_t SIDE = WIDTH / sizeof(T);
  using M = Simd<T, WIDTH>;
  using V = typename M::V;

  // Elements 0, N, 1, N + 1, ... of the first or second halves of a and b.
  template <bool SECOND, int... J>
  static FASTFLOW_INLINE V zipped(const V& a, const V& b, std::integer_sequence<int, J...>) {
    return __builtin_shufflevector(a, b, ((SECOND ? SIDE / 2 : 0) + J / 2 + J % 2 * SIDE)...);
  }
  template <bool SECOND>
  static FASTFLOW_INLINE V zipped(const V& a, const V& b) {
    return zipped<SECOND>(a, b, std::make_integer_sequence<int, SIDE>());
  }
  static FASTFLOW_INLINE void transpose(V* rows) {
#pragma GCC unroll 4
    for (int64_t stage = 1; stage < SIDE; stage *= 2) {
      V found[SIDE];
#pragma GCC unroll 8
      for (int64_t i = 0; i < SIDE / 2; ++i) {
        found[2 * i] = zipped<false>(rows[i], rows[i + SIDE / 2]);
        found[2 * i + 1] = zipped<true>(rows[i], rows[i + SIDE / 2]);
      }
#pragma GCC unroll 8
      for (int64_t i = 0; i < SIDE; ++i) rows[i] = found[i];
    }
  }

  // Calls block(i, q) for blocks of elements and parameters, of which the last may overlap, and one(i, q) for
  // the elements that fill no block.
  template <typename Block, typename One>
  static FASTFLOW_INLINE void for_blocks(int64_t count, int64_t each, const Block& block, const One& one) {
    int64_t i = 0;
    for (; each >= SIDE && i + SIDE <= count; i += SIDE)
      for (int64_t q = 0; q < each; q += SIDE) block(i, q + SIDE <= each ? q : each - SIDE);
    for (; i < count; ++i)
      for (int64_t q = 0; q < each; ++q) one(i, q);
  }
};

template <int BYTES, typename T>
FASTFLOW_INLINE void to_columns_simd(const ToColumns<T>& given) {
  const ToColumns<T> a = given;
  using S = Square<BYTES, T>;
  S::for_blocks(
      a.count, a.each,
      [&](int64_t i, int64_t q) __attribute__((always_inline)) {
        typename S::V block[S::SIDE];
#pragma GCC unroll 8
        for (int64_t j = 0; j < S::SIDE; ++j) block[j] = S::M::load(a.rows + (i + j) * a.each + q);
        S::transpose(block);
#pragma GCC unroll 8
        for (int64_t j = 0; j < S::SIDE; ++j) S::M::store(a.columns + (q + j) * a.stride + i, block[j]);
      },
      [&](int64_t i, int64_t q)
          __attribute__((always_inline)) { a.columns[q * a.stride + i] = a.rows[i * a.each + q]; });
}

template <int BYTES, typename T>
FASTFLOW_INLINE void to_rows_simd(const ToRows<T>& given) {
  const ToRows<T> a = given;
  using S = Square<BYTES, T>;
  S::for_blocks(
      a.count, a.each,
      [&](int64_t i, int64_t q) __attribute__((always_inline)) {
        typename S::V block[S::SIDE];
#pragma GCC unroll 8
        for (int64_t j = 0; j < S::SIDE; ++j) block[j] = S::M::load(a.columns + (q + j) * a.stride + i);
        S::transpose(block);
#pragma GCC unroll 8
        for (int64_t j = 0; j < S::SIDE; ++j) S::M::store(a.rows + (i + j) * a.each + q, block[j]);
      },
      [&](int64_t i, int64_t q)
          __attribute__((always_inline)) { a.rows[i * a.each + q] = a.columns[q * a.stride + i]; });
}

}  // namespace

FASTFLOW_MULTIVERSION(to_columns, ToColumns<float>, to_columns_simd)
FASTFLOW_MULTIVERSION(to_columns, ToColumns<double>, to_columns_simd)
FASTFLOW_MULTIVERSION(to_rows, ToRows<float>, to_rows_simd)
FASTFLOW_MULTIVERSION(to_rows, ToRows<double>, to_rows_simd)

}  // namespace fastflow::cpu
