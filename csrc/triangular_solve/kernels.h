#pragma once
// Batched triangular solves, X = op(A)^-1 B for A [K, n, n], B [K, n, m]: a CUDA kernel written for block.h.
//
// Bound: 8 bytes per element of B in float32 for small n, n operations per element for large n. A thread
// handles a column of B, with 32 of its rows in registers. A passes through shared memory in blocks of
// 32 x 32, which all threads read at once. Blocks of X that were solved before are read back from memory (the
// L2 cache); the same thread wrote them. Products are summed from zero and the sum is subtracted from b at
// the end, which rounds less than subtracting each product from b; tests compare with LAPACK.
#include <algorithm>

#include "stable.h"
#include <torch/csrc/stable/ops.h>
#include "block.h"
#include "singular.h"
#include "triangular_solve/arguments.h"

namespace fastflow {

template <typename T>
struct TriangularSolveKernel {
  static constexpr int THREADS = 128, RESIDENT = sizeof(T) == 4 ? 4 : 2, ROWS = 32;
  static constexpr int STRIDE = ROWS + 4;  // rows of 16-byte loads, fewer bank conflicts

  Matrix<T> a, b;  // of matrix 0; b is [n, m]
  int64_t a_step, b_step;
  Span<T> x;
  int64_t stack, n, m;
  bool lower, unit_diagonal;
  int64_t* fault;

  FASTFLOW_HD int64_t column_blocks() const { return (m + THREADS - 1) / THREADS; }
  static int64_t shared_bytes() { return sizeof(T) * (ROWS * STRIDE + ROWS); }

  template <class Block>
  FASTFLOW_HD void operator()(Block& block) const {
    const Span<T> tile = block.template shared<T>(ROWS * STRIDE), diagonal = block.template shared<T>(ROWS);
    typename Block::template PerThread<Column> columns(block);
    const int64_t across = column_blocks();
    for (int64_t task = block.index; task < stack * across; task += block.count) {
      const int64_t k = task / across, first = task % across * THREADS;
      for (int64_t top = 0; top < n; top += ROWS) {
        for (int64_t left = 0; left < top; left += ROWS) {
          block.phase([&](int thread) { load(thread, k, top, left, tile); });
          block.phase([&](int thread) { add(k, left, first + thread, tile, columns[thread]); });
        }
        block.phase([&](int thread) {
          load(thread, k, top, top, tile);
          if (thread < ROWS) diagonal[thread] = divisor(k, top + thread);
        });
        block.phase([&](int thread) { finish(k, top, first + thread, tile, diagonal, columns[thread]); });
      }
    }
  }

 private:
  struct Column {
    T sum[ROWS];  // of products with solved rows, for ROWS rows
  };

  // The i-th row in the order of solving: an upper triangle is solved from the last row.
  FASTFLOW_HD int64_t row(int64_t i) const { return lower ? i : n - 1 - i; }

  // tile[j][i] = op(A)(top + i, left + j) in the strict triangle, 0 elsewhere.
  FASTFLOW_HD void load(int thread, int64_t k, int64_t top, int64_t left, const Span<T>& tile) const {
    const bool by_rows = a.col <= a.row;
    for (int at = thread; at < ROWS * ROWS; at += THREADS) {
      const int i = by_rows ? at / ROWS : at % ROWS, j = by_rows ? at % ROWS : at / ROWS;
      const bool in_range = top + i < n && left + j < top + i;
      tile[j * STRIDE + i] =
          in_range ? a.span[k * a_step + row(top + i) * a.row + row(left + j) * a.col] : T(0);
    }
  }

  FASTFLOW_HD T divisor(int64_t k, int64_t i) const {
    if (unit_diagonal || i >= n) return T(1);
    const T d = a.span[k * a_step + row(i) * (a.row + a.col)];
    if (!is_finite_nonzero(d)) *fault = encode_fault(Fault::diagonal_of_triangular_solve, k, row(i));
    return d;
  }

  FASTFLOW_HD void add(int64_t k, int64_t left, int64_t column, const Span<T>& tile, Column& c) const {
    if (column >= m) return;
    for (int j = 0; j < ROWS; ++j) {
      const T solved = x[(k * n + row(left + j)) * m + column];
      FASTFLOW_UNROLL
      for (int four = 0; four < ROWS; four += 4) {
        const Pack<T, 4> v = tile.template load<4>(j * STRIDE + four);
        FASTFLOW_UNROLL
        for (int i = 0; i < 4; ++i) c.sum[four + i] += v.value[i] * solved;
      }
    }
  }

  // Solves the rows, and resets the sums to zero for the next rows.
  FASTFLOW_HD void finish(int64_t k, int64_t top, int64_t column, const Span<T>& tile,
                          const Span<T>& diagonal, Column& c) const {
    if (column >= m) return;
    FASTFLOW_UNROLL
    for (int j = 0; j < ROWS; ++j) {
      const bool in_range = top + j < n;
      const T right = in_range ? b.span[k * b_step + row(top + j) * b.row + column * b.col] : T(0);
      const T solved = (right - c.sum[j]) / diagonal[j];
      c.sum[j] = T(0);
      FASTFLOW_UNROLL
      for (int four = (j + 1) / 4 * 4; four < ROWS; four += 4) {
        const Pack<T, 4> v = tile.template load<4>(j * STRIDE + four);
        FASTFLOW_UNROLL
        for (int i = 0; i < 4; ++i)
          if (four + i > j) c.sum[four + i] += v.value[i] * solved;
      }
      if (in_range) x[(k * n + row(top + j)) * m + column] = solved;
    }
  }
};

// The op: host code that launches the kernels.

template <class Device>
Tensor triangular_solve(const Tensor& A, const Tensor& B, bool upper, bool unit_diagonal, bool transpose) {
  check_triangular_solve(A, B);
  const typename Device::Guard guard(A);
  raise_singular<Device>();
  const int64_t stack = B.size(0), n = B.size(1), m = B.size(2);
  const Tensor X = torch::stable::new_empty(B, {stack, n, m});
  const auto launch = [&](auto value) {
    using T = decltype(value);
    const auto extent = [](const Tensor& t) {
      int64_t size = 1;
      for (int64_t d = 0; d < t.dim(); ++d) size += (t.size(d) - 1) * t.stride(d);
      return size;
    };
    const TriangularSolveKernel<T> kernel{
        {{A.const_data_ptr<T>(), extent(A)}, A.stride(transpose ? 2 : 1), A.stride(transpose ? 1 : 2)},
        {{B.const_data_ptr<T>(), extent(B)}, B.stride(1), B.stride(2)},
        A.stride(0),
        B.stride(0),
        {X.mutable_data_ptr<T>(), X.numel()},
        stack,
        n,
        m,
        upper == transpose,
        unit_diagonal,
        Device::fault_word()};
    Device::launch(kernel, std::min<int64_t>(stack * kernel.column_blocks(), (int64_t(1) << 31) - 1),
                   kernel.shared_bytes());
  };
  if (X.numel()) A.scalar_type() == torch::headeronly::ScalarType::Float ? launch(float()) : launch(double());
  return X;
}

}  // namespace fastflow
