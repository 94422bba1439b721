#pragma once
// The programming interface of the CUDA kernels, which the CPU can also run, block by block.
//
// A kernel is a struct: its arguments, THREADS, and `operator()(Block&)`, which does the work of one block in
// phases. A phase is a function of the thread and ends with a barrier, so threads may read values that others
// wrote in earlier phases. On a GPU, Block is DeviceBlock (cuda/device.cuh). On the CPU it is EmulatedBlock
// (emulated/emulated.h), which runs the threads of a phase one after the other in an order that a test
// chooses: a result that depends on the order is a race.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef __CUDACC__
#define FASTFLOW_HD __host__ __device__ __forceinline__
#define FASTFLOW_UNROLL _Pragma("unroll")
#define FASTFLOW_ROLLED _Pragma("unroll 1")  // saves registers
#else
#define FASTFLOW_HD inline
#define FASTFLOW_UNROLL
#define FASTFLOW_ROLLED
#endif

namespace fastflow {

// Returns v. nvcc cannot tell, so it computes what follows from v after this, not before a loop: that would
// take registers through the loop.
FASTFLOW_HD int opaque(int v) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// N values that are loaded or stored at once. Aligned to their size, so a GPU needs one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

// A kernel's view of memory, in elements. On the CPU an access out of bounds or with wrong alignment is an
// error; on a GPU accesses are unchecked.
template <typename T>
struct Span {
  T* data = nullptr;
  int64_t size = 0;

  FASTFLOW_HD T& operator[](int64_t i) const {
    check<T>(i, 1);
    return data[i];
  }
  template <int N>
  FASTFLOW_HD Pack<std::remove_const_t<T>, N> load(int64_t i) const {
    using Values = Pack<std::remove_const_t<T>, N>;
    check<Values>(i, N);
    return *reinterpret_cast<const Values*>(data + i);
  }
  template <int N>
  FASTFLOW_HD void store(int64_t i, const Pack<T, N>& values) const {
    check<Pack<T, N>>(i, N);
    *reinterpret_cast<Pack<T, N>*>(data + i) = values;
  }

 private:
  template <typename Values>
  FASTFLOW_HD void check([[maybe_unused]] int64_t i, [[maybe_unused]] int count) const {
#ifndef __CUDA_ARCH__
    if (i < 0 || i + count > size)
      throw std::out_of_range("fastflow: element " + std::to_string(i) + " of a span of " +
                              std::to_string(size));
    if (reinterpret_cast<uintptr_t>(data + i) % alignof(Values))
      throw std::out_of_range("fastflow: a span is misaligned at element " + std::to_string(i));
#endif
  }
};

// A matrix with strides, which transposing swaps.
template <typename T>
struct Matrix {
  Span<const T> span;
  int64_t row, col;

  FASTFLOW_HD T operator()(int64_t i, int64_t j) const { return span[i * row + j * col]; }
  Matrix transposed() const { return {span, col, row}; }
};

// The dtype of sums.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using accumulator = typename Accumulator<T>::type;

}  // namespace fastflow
