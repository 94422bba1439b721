// fastflow_C::triangular_solve on the CPU: X = op(A)^-1 B for A [K, n, n] triangular, B [K, n, m].
#include "stable.h"

#include <algorithm>

#include "cpu/diagonal.h"
#include "cpu/gemm.h"
#include "cpu/tensors.h"
#include "triangular_solve/arguments.h"

namespace fastflow::cpu {
namespace {

// Columns of B that are solved together in a separate buffer: rows of X are m apart, and if m is a power of
// two they would all map to the same cache sets. Up to FEW_ROWS rows, as many as a set has ways, need no
// buffer and use more columns.
constexpr int64_t WIDTH = 64, FEW_ROWS = 8, WIDTH_OF_FEW_ROWS = 1024;

template <typename T>
void solve(const Tensor& A, const Tensor& B, const Tensor& X, bool lower, bool unit_diagonal) {
  const int64_t K = A.size(0), n = A.size(1), m = B.size(2);
  const bool few_rows = n <= FEW_ROWS;
  const int64_t most = few_rows ? WIDTH_OF_FEW_ROWS : WIDTH;
  const int64_t blocks = (m + most - 1) / most, row_size = m == 1 ? 1 : std::min(padded(m), most);
  const T* a_ptr = A.const_data_ptr<T>();
  const T* b_ptr = B.const_data_ptr<T>();
  T* x_ptr = X.mutable_data_ptr<T>();
  const int64_t a_batch = A.stride(0), b_batch = B.stride(0), b_col = B.stride(2);
  // Upper triangles are solved from the last row, like lower ones with negative strides.
  const int64_t sign = lower ? 1 : -1, last = lower ? 0 : n - 1;
  const int64_t a_row = sign * A.stride(1), a_col = sign * A.stride(2), b_row = sign * B.stride(1),
                x_row = sign * m;
  a_ptr += last * (A.stride(1) + A.stride(2));
  b_ptr += last * B.stride(1);
  x_ptr += last * m;
  FirstSingular singular(n);
  // starting a thread costs about 10 us, the time of this many products
  const int64_t grain = std::max<int64_t>(1, (1 << 19) / (n * (n + 16) * std::max<int64_t>(row_size, 4)));
  torch::stable::parallel_for(0, K * blocks, grain, [&](int64_t begin, int64_t end) {
    const Buffer<T> memory(n * (row_size + 1));
    T *block = memory.get(), *reciprocals = block + n * row_size;
    int64_t matrix = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task / blocks, first = task % blocks * most, width = std::min(most, m - first);
      const T* a = a_ptr + k * a_batch;
      const T* b = b_ptr + k * b_batch + first * b_col;
      T* x = x_ptr + k * n * m + first;
      if (k != matrix) {
        for (int64_t i = 0; i < n; ++i) {
          const T d = unit_diagonal ? T(1) : a[i * (a_row + a_col)];
          reciprocals[i] = singular.reciprocal(d, k, lower ? i : last - i);
        }
        matrix = k;
      }
      const bool whole = m == 1 || (width % 16 == 0 && b_col == 1);
      if (!whole)
        for (int64_t i = 0; i < n; ++i) {
          T* row = block + i * row_size;
          for (int64_t c = 0; c < width; ++c) row[c] = b[i * b_row + c * b_col];
          std::fill(row + width, row + row_size, T(0));
        }
      const T* from = whole ? b : block;
      const bool in_place = whole && (few_rows || m == 1);
      T* to = in_place ? x : block;
      substitute({n, width, a, a_row, a_col, reciprocals, from, whole ? b_row : row_size, to,
                  in_place ? x_row : row_size});
      if (!in_place)
        for (int64_t i = 0; i < n; ++i) std::copy_n(to + i * row_size, width, x + i * x_row);
    }
  });
  singular.raise("triangular_solve");
}

Tensor triangular_solve(const Tensor& A, const Tensor& B, bool upper, bool unit_diagonal, bool transpose) {
  check_triangular_solve(A, B);
  const int64_t n = A.size(1), m = B.size(2);
  Tensor X = empty(B, {B.size(0), n, m});
  if (X.numel() == 0) return X;
  Tensor a = transpose ? torch::stable::transpose(A, 1, 2) : A;
  // Reading a large matrix by columns misses the cache at each element; one copy serves all right-hand sides.
  if (a.stride(2) != 1 && n > 64 && m > 1) a = torch::stable::contiguous(a);
  const bool is_float = A.scalar_type() == ScalarType::Float;
  (is_float ? solve<float> : solve<double>)(a, B, X, upper == transpose, unit_diagonal);
  return X;
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("triangular_solve", TORCH_BOX(&fastflow::cpu::triangular_solve));
}
