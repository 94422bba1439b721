#pragma once
// Runs a kernel of csrc/ on a GPU.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>  // STD_CUDA_CHECK; torch 2.11 has it only here
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>

#include "block.h"

namespace fastflow {

class DeviceBlock {
 public:
  const int64_t index = blockIdx.x, count = gridDim.x;

  __device__ explicit DeviceBlock(unsigned char* memory) : memory_(memory) {}

  template <class F>
  __device__ __forceinline__ void phase(F f) {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  template <typename T>
  __device__ __forceinline__ Span<T> shared(int64_t size) {
    Span<T> taken{reinterpret_cast<T*>(memory_), size};
    memory_ += (size * int64_t(sizeof(T)) + 15) / 16 * 16;
    return taken;
  }

  template <typename T>
  class PerThread {
   public:
    __device__ explicit PerThread(const DeviceBlock&) : value_{} {}
    __device__ __forceinline__ T& operator[](int) { return value_; }

   private:
    T value_;
  };

 private:
  unsigned char* memory_;
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, Kernel::RESIDENT)
    run(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(32) unsigned char memory[];
  DeviceBlock block(memory);
  kernel(block);
}

struct Cuda {
  static constexpr bool DOUBLE = false;  // conv1x1 of float64 uses torch.matmul
  struct Guard : torch::stable::accelerator::DeviceGuard {
    explicit Guard(const torch::stable::Tensor& t) : DeviceGuard(t.get_device_index()) {}
  };

  static int device() {
    int device = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    return device;
  }

  static int64_t multiprocessors() {
    int count = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device()));
    return count;
  }

  // Bytes of shared memory that a block may have.
  static int64_t shared_limit() {
    int most = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device()));
    return most;
  }

  // On the current stream of the current device.
  template <class Kernel>
  static void launch(const Kernel& kernel, int64_t blocks, int64_t shared_bytes) {
    const int here = device();
    if (shared_bytes > 48 * 1024) allow_shared_memory<Kernel>(here);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(here, &stream));
    run<Kernel>
        <<<static_cast<unsigned>(blocks), Kernel::THREADS, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
            kernel);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // More than 48 KB per block must be requested, once per kernel and device. Requests the maximum, because
  // the need of a kernel varies.
  template <class Kernel>
  static void allow_shared_memory(int device) {
    static std::atomic<uint64_t> allowed{0};  // a bit per device
    const uint64_t bit = uint64_t(1) << (device % 64);
    if (allowed.load(std::memory_order_acquire) & bit) return;
    int most = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    STD_CUDA_CHECK(cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    STD_CUDA_CHECK(cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
    allowed.fetch_or(bit, std::memory_order_release);
  }

  // A word of host memory that every device can write. Kernels report singular matrices in it, and the host
  // reads it without synchronization; see singular.h.
  static int64_t* fault_word() {
    static int64_t* const slot = [] {
      // in the default mode, an allocation would abort a CUDA graph capture in progress
      cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
      STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
      void* memory = nullptr;
      const cudaError_t error =
          cudaHostAlloc(&memory, sizeof(int64_t), cudaHostAllocPortable | cudaHostAllocMapped);
      STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
      STD_CUDA_CHECK(error);
      return static_cast<int64_t*>(std::memset(memory, 0, sizeof(int64_t)));
    }();
    return slot;
  }
};

}  // namespace fastflow
