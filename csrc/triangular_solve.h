#pragma once
// Substitution for W right-hand sides at once, the one algorithm that the CPU and the CUDA body share.
#include <cstdint>

#ifdef __CUDACC__
#define FASTFLOW_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTFLOW_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fastflow {

// A matrix seen through its strides. Transposing is swapping them, and then the other triangle holds the numbers.
template <typename T>
struct Triangle {
  const T* data;
  int64_t row, col;
  int64_t n;
  bool lower;
  bool unit_diagonal;
};

// x[i * stride + c], for i < n and c < W, holds B and becomes A^-1 B. Sums run over j ascending, whatever the device
// and however the columns were split, so that the same column gives the same bits.
template <int W, typename T>
FASTFLOW_HOST_DEVICE void substitute(const Triangle<T>& a, T* x, int64_t stride) {
  for (int64_t step = 0; step < a.n; ++step) {
    const int64_t i = a.lower ? step : a.n - 1 - step;
    const int64_t j_begin = a.lower ? 0 : i + 1, j_end = a.lower ? i : a.n;
    T acc[W];
    for (int c = 0; c < W; ++c) acc[c] = x[i * stride + c];
    for (int64_t j = j_begin; j < j_end; ++j) {
      const T v = a.data[i * a.row + j * a.col];
      for (int c = 0; c < W; ++c) acc[c] -= v * x[j * stride + c];
    }
    if (!a.unit_diagonal) {
      const T d = a.data[i * (a.row + a.col)];
      for (int c = 0; c < W; ++c) acc[c] /= d;
    }
    for (int c = 0; c < W; ++c) x[i * stride + c] = acc[c];
  }
}

}  // namespace fastflow
