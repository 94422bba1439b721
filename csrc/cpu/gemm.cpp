// All vectors in this file are explicit. g++ 12 would also combine scalars to vectors of two floats, for
// which it has no fused multiply-add. The bits of a column would then depend on the number of columns.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-loop-vectorize", "no-tree-slp-vectorize")
#endif

#include "cpu/gemm.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "multiversion.h"

// g++ has __builtin_shufflevector since version 12; clang has only that
#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define FASTFLOW_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif
#endif
#ifndef FASTFLOW_SHUFFLE
#define FASTFLOW_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Places{i, j, k, l})
#endif

namespace fastflow::cpu {
namespace {

template <typename T, int BYTES>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES)));
  static FASTFLOW_INLINE void load(type& v, const T* p) { std::memcpy(&v, p, BYTES); }
  static FASTFLOW_INLINE void store(T* p, const type& v) { std::memcpy(p, &v, BYTES); }
};
template <typename T>
struct Vector<T, sizeof(T)> {
  typedef T type;
  static FASTFLOW_INLINE void load(T& v, const T* p) { v = *p; }
  static FASTFLOW_INLINE void store(T* p, const T& v) { *p = v; }
};

// The next narrower vector with a version of its own.
template <typename T>
constexpr int narrower(int bytes) {
  return bytes > 16 ? bytes / 2 : int(sizeof(T));
}

// Accumulators per row, so that six rows of them and their operands stay in registers.
constexpr int most_vectors(int bytes) { return bytes == 64 ? 4 : 2; }

// Vectors are contiguous from column j. The last one ends with column n and may overlap the previous one.
template <typename T, int BYTES, int ROWS, int VECTORS>
FASTFLOW_INLINE void gemm_tile(const Gemm<T>& g, int64_t i, int64_t j) {
  using V = Vector<T, BYTES>;
  constexpr int64_t LANES = BYTES / sizeof(T);
  int64_t column[VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) column[v] = j + v * LANES;
  column[VECTORS - 1] = std::min(column[VECTORS - 1], g.n - LANES);
  const T* a = g.a_panel ? g.a + i / PANEL * g.a_panel + i % PANEL * g.a_row : g.a + i * g.a_row;
  const T* b = g.b;
  T* c = g.c + i * g.c_row;
  typename V::type sum[ROWS][VECTORS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      if (g.start == Start::result) V::load(sum[r][v], c + r * g.c_row + column[v]);
      else if (g.start == Start::column) V::load(sum[r][v], g.bias + column[v]);
      else sum[r][v] = (g.start == Start::row ? g.bias[i + r] : T(0)) + typename V::type{};
    }
  }
  for (int64_t p = 0; p < g.k; ++p) {
    typename V::type row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) V::load(row[v], b + column[v]);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const T factor = a[r * g.a_row];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += factor * row[v];
    }
    a += g.a_col;
    b += g.b_row;
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      if (g.relu) sum[r][v] = sum[r][v] < T(0) ? typename V::type{} : sum[r][v];
      V::store(c + r * g.c_row + column[v], sum[r][v]);
    }
  }
}

template <typename T, int BYTES, int VECTORS>
FASTFLOW_INLINE void gemm_columns(const Gemm<T>& g, int64_t j) {
  int64_t i = 0;
  for (; i + PANEL <= g.m; i += PANEL) gemm_tile<T, BYTES, PANEL, VECTORS>(g, i, j);
  for (; i + 2 <= g.m; i += 2) gemm_tile<T, BYTES, 2, VECTORS>(g, i, j);
  for (; i < g.m; ++i) gemm_tile<T, BYTES, 1, VECTORS>(g, i, j);
}

template <int BYTES, typename T>
FASTFLOW_INLINE void gemm_simd(const Gemm<T>& g) {
  constexpr int64_t LANES = BYTES / sizeof(T), MOST = most_vectors(BYTES);
  if constexpr (LANES > 1) {
    const int64_t idle = (g.n + LANES - 1) / LANES * LANES - g.n;
    if (g.n < LANES || (BYTES == 64 && 2 * idle >= LANES)) return gemm_simd<narrower<T>(BYTES)>(g);
  }
  for (int64_t j = 0; j < g.n; j += MOST * LANES) {
    const int64_t vectors = (g.n - j + LANES - 1) / LANES;
    if constexpr (MOST == 4) {
      if (vectors >= 4) gemm_columns<T, BYTES, 4>(g, j);
      if (vectors == 3) gemm_columns<T, BYTES, 3>(g, j);
    }
    if (vectors == 2 || (MOST == 2 && vectors > 2)) gemm_columns<T, BYTES, 2>(g, j);
    if (vectors == 1) gemm_columns<T, BYTES, 1>(g, j);
  }
}

// Products are summed from zero and the sum is subtracted from b at the end, which rounds less than
// subtracting each product from b.
template <typename T, int BYTES, int ROWS, int VECTORS>
FASTFLOW_INLINE void substitute_tile(const Substitution<T>& s, int64_t i, int64_t j) {
  using V = Vector<T, BYTES>;
  constexpr int64_t LANES = BYTES / sizeof(T);
  const T* a = s.a + i * s.a_row;
  const T* solved = s.x + j;
  typename V::type x[ROWS][VECTORS] = {};  // the sums, then the solution
  for (int64_t p = 0; p < i; ++p) {
    typename V::type row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) V::load(row[v], solved + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const T factor = a[r * s.a_row];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) x[r][v] += factor * row[v];
    }
    a += s.a_col;
    solved += s.x_row;
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int q = 0; q < r; ++q) {
      const T factor = a[r * s.a_row + q * s.a_col];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) x[r][v] += factor * x[q][v];
    }
    const T reciprocal = s.reciprocals[i + r], diagonal = a[r * (s.a_row + s.a_col)];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      typename V::type b;
      V::load(b, s.b + (i + r) * s.b_row + j + v * LANES);
      if (reciprocal != T(0)) x[r][v] = (b - x[r][v]) * reciprocal;
      else x[r][v] = (b - x[r][v]) / diagonal;
      V::store(s.x + (i + r) * s.x_row + j + v * LANES, x[r][v]);
    }
  }
}

// The rows that fill no block come first, because their sums are short.
template <typename T, int BYTES, int VECTORS>
FASTFLOW_INLINE void substitute_columns(const Substitution<T>& s, int64_t j) {
  constexpr int ROWS = BYTES == sizeof(T) ? 8 : 6;
  int64_t i = 0;
  for (; i < s.n % ROWS; ++i) substitute_tile<T, BYTES, 1, VECTORS>(s, i, j);
  for (; i < s.n; i += ROWS) substitute_tile<T, BYTES, ROWS, VECTORS>(s, i, j);
}

template <int BYTES, typename T>
FASTFLOW_INLINE void substitute_simd(const Substitution<T>& s) {
  constexpr int64_t LANES = BYTES / sizeof(T), MOST = most_vectors(BYTES);
  if constexpr (LANES > 1)
    if (2 * s.columns <= LANES) return substitute_simd<narrower<T>(BYTES)>(s);
  for (int64_t j = 0; j < s.columns; j += MOST * LANES) {
    const int64_t vectors = (s.columns - j + LANES - 1) / LANES;
    if constexpr (MOST == 4) {
      if (vectors >= 4) substitute_columns<T, BYTES, 4>(s, j);
      if (vectors == 3) substitute_columns<T, BYTES, 3>(s, j);
    }
    if (vectors == 2 || (MOST == 2 && vectors > 2)) substitute_columns<T, BYTES, 2>(s, j);
    if (vectors == 1) substitute_columns<T, BYTES, 1>(s, j);
  }
}

// Blocks of four by four, which compilers translate to shuffles.
template <int, typename T>
FASTFLOW_INLINE void transpose_simd(const Transposition<T>& t) {
  typedef T V __attribute__((vector_size(4 * sizeof(T))));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> I;
  [[maybe_unused]] typedef I Places __attribute__((vector_size(4 * sizeof(T))));
  for (int64_t j = 0; j < t.columns; j += 4) {
    const int64_t width = std::min<int64_t>(4, t.columns - j);
    T* to = t.to + j * t.to_row;
    int64_t i = 0;
    for (; width == 4 && i + 4 <= t.rows; i += 4) {
      V r[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) std::memcpy(&r[q], t.from + (i + q) * t.from_row + j, sizeof(V));
      const V low01 = FASTFLOW_SHUFFLE(r[0], r[1], 0, 4, 1, 5),
              high01 = FASTFLOW_SHUFFLE(r[0], r[1], 2, 6, 3, 7);
      const V low23 = FASTFLOW_SHUFFLE(r[2], r[3], 0, 4, 1, 5),
              high23 = FASTFLOW_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
      r[0] = FASTFLOW_SHUFFLE(low01, low23, 0, 1, 4, 5);
      r[1] = FASTFLOW_SHUFFLE(low01, low23, 2, 3, 6, 7);
      r[2] = FASTFLOW_SHUFFLE(high01, high23, 0, 1, 4, 5);
      r[3] = FASTFLOW_SHUFFLE(high01, high23, 2, 3, 6, 7);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) std::memcpy(to + q * t.to_row + i, &r[q], sizeof(V));
    }
    for (; i < t.rows; ++i)
      for (int64_t q = 0; q < width; ++q) to[q * t.to_row + i] = t.from[i * t.from_row + j + q];
    for (; i < padded(t.rows); ++i)
      for (int64_t q = 0; q < width; ++q) to[q * t.to_row + i] = T(0);
  }
}

}  // namespace

FASTFLOW_MULTIVERSION(gemm, Gemm<float>, gemm_simd)
FASTFLOW_MULTIVERSION(gemm, Gemm<double>, gemm_simd)
FASTFLOW_MULTIVERSION(substitute, Substitution<float>, substitute_simd)
FASTFLOW_MULTIVERSION(substitute, Substitution<double>, substitute_simd)
FASTFLOW_MULTIVERSION(transpose, Transposition<float>, transpose_simd)
FASTFLOW_MULTIVERSION(transpose, Transposition<double>, transpose_simd)

}  // namespace fastflow::cpu
