// fastflow_C::triangular_solve on the CPU: X = op(A)^-1 B for A [K, n, n] triangular, B [K, n, m].
#include "stable.h"
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "clones.h"
#include "triangular_solve.h"
#include "triangular_solve_check.h"

namespace fastflow {

// Columns of B that are solved together, in a buffer of their own: rows of B lie m apart, and where m is a power of two
// they would all fall on the same cache sets. A last, partly filled block is solved at full width too (the rest is
// zero), so that a column's bits depend neither on m nor on the number of threads.
constexpr int WIDTH = 32;

FASTFLOW_CLONES void substitute_block(const Triangle<float>& a, float* x) { substitute<WIDTH>(a, x, WIDTH); }
FASTFLOW_CLONES void substitute_block(const Triangle<double>& a, double* x) { substitute<WIDTH>(a, x, WIDTH); }

template <typename T>
void solve(const Tensor& A, const Tensor& B, const Tensor& X, bool lower, bool unit_diagonal) {
  const int64_t K = A.size(0), n = A.size(1), m = B.size(2);
  const int64_t blocks = (m + WIDTH - 1) / WIDTH;
  const int64_t grain = std::max<int64_t>(1, (1 << 19) / (n * n * WIDTH));  // waking a thread costs some 10 us
  const T* a_ptr = A.const_data_ptr<T>();
  const T* b_ptr = B.const_data_ptr<T>();
  T* x_ptr = X.mutable_data_ptr<T>();
  const int64_t a_batch = A.stride(0), a_row = A.stride(1), a_col = A.stride(2);
  const int64_t b_batch = B.stride(0), b_row = B.stride(1), b_col = B.stride(2);
  torch::stable::parallel_for(0, K * blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> block(n * WIDTH);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task / blocks, first = task % blocks * WIDTH;
      const int64_t width = std::min<int64_t>(WIDTH, m - first);
      for (int64_t i = 0; i < n; ++i) {
        const T* b = b_ptr + k * b_batch + i * b_row + first * b_col;
        T* row = block.data() + i * WIDTH;
        for (int64_t c = 0; c < width; ++c) row[c] = b[c * b_col];
        std::fill(row + width, row + WIDTH, T(0));
      }
      substitute_block({a_ptr + k * a_batch, a_row, a_col, n, lower, unit_diagonal}, block.data());
      for (int64_t i = 0; i < n; ++i)
        std::copy_n(block.data() + i * WIDTH, width, x_ptr + (k * n + i) * m + first);
    }
  });
}

Tensor triangular_solve(const Tensor& A, const Tensor& B, bool upper, bool unit_diagonal, bool transpose) {
  check_triangular_solve(A, B);
  const int64_t n = A.size(1), m = B.size(2);
  Tensor X = torch::stable::new_empty(B, {B.size(0), n, m});
  if (X.numel() == 0) return X;
  Tensor a = transpose ? torch::stable::transpose(A, 1, 2) : A;
  // Walking a large matrix down its columns misses the cache at each step; one copy serves all right-hand sides.
  if (a.stride(2) != 1 && n > WIDTH && m > 1) a = torch::stable::contiguous(a);
  const bool is_float = A.scalar_type() == torch::headeronly::ScalarType::Float;
  (is_float ? solve<float> : solve<double>)(a, B, X, upper == transpose, unit_diagonal);
  return X;
}

}  // namespace fastflow

// FRAGMENT, not STABLE_TORCH_LIBRARY: a second op file with the latter crashes at load. A namespace of its own, because
// fastflow:: is defined in Python and picks between this body and others. The CUDA library adds its body to this schema.
STABLE_TORCH_LIBRARY_FRAGMENT(fastflow_C, m) {
  m.def("triangular_solve(Tensor A, Tensor B, bool upper, bool unit_diagonal=False, bool transpose=False) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) { m.impl("triangular_solve", TORCH_BOX(&fastflow::triangular_solve)); }
