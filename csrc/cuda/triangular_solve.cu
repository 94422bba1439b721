// fastflow_C::triangular_solve on CUDA: a thread for each right-hand side, neighbours in m beside each other.
#include "stable.h"
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>  // STD_CUDA_KERNEL_LAUNCH_CHECK, which torch 2.11 has only here
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "triangular_solve.h"
#include "triangular_solve_check.h"

namespace fastflow {

constexpr int THREADS = 128;

template <typename T>
__global__ void __launch_bounds__(THREADS)
    solve_kernel(Triangle<T> a, int64_t a_batch, const T* b, int64_t b_batch, int64_t b_row, int64_t b_col, T* x,
                 int64_t K, int64_t m) {
  const int64_t stride = int64_t(gridDim.x) * THREADS;
  for (int64_t column = int64_t(blockIdx.x) * THREADS + threadIdx.x; column < K * m; column += stride) {
    const int64_t k = column / m, c = column % m;
    Triangle<T> a_k = a;
    a_k.data += k * a_batch;
    const T* b_k = b + k * b_batch + c * b_col;
    T* x_k = x + k * a.n * m + c;
    for (int64_t i = 0; i < a.n; ++i) x_k[i * m] = b_k[i * b_row];
    substitute<1>(a_k, x_k, m);
  }
}

template <typename T>
void launch(const Tensor& A, const Tensor& B, const Tensor& X, bool lower, bool unit_diagonal, bool transpose) {
  const int64_t K = A.size(0), n = A.size(1), m = B.size(2);
  const Triangle<T> a{A.const_data_ptr<T>(), A.stride(transpose ? 2 : 1), A.stride(transpose ? 1 : 2), n, lower,
                      unit_diagonal};
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(A.get_device_index(), &stream));
  const int64_t blocks = std::min<int64_t>((K * m + THREADS - 1) / THREADS, (int64_t(1) << 31) - 1);
  solve_kernel<T><<<static_cast<unsigned>(blocks), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
      a, A.stride(0), B.const_data_ptr<T>(), B.stride(0), B.stride(1), B.stride(2), X.mutable_data_ptr<T>(), K, m);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor triangular_solve_cuda(const Tensor& A, const Tensor& B, bool upper, bool unit_diagonal, bool transpose) {
  check_triangular_solve(A, B);
  const torch::stable::accelerator::DeviceGuard guard(A.get_device_index());
  Tensor X = torch::stable::new_empty(B, {B.size(0), B.size(1), B.size(2)});
  if (X.numel() == 0) return X;
  const bool is_float = A.scalar_type() == torch::headeronly::ScalarType::Float;
  (is_float ? launch<float> : launch<double>)(A, B, X, upper == transpose, unit_diagonal, transpose);
  return X;
}

}  // namespace fastflow

// The schema comes from fastflow._C, which is loaded first and is always there when this library is.
STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CUDA, m) {
  m.impl("triangular_solve", TORCH_BOX(&fastflow::triangular_solve_cuda));
}
