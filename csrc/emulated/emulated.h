#pragma once
// Runs a CUDA kernel of csrc/ on the CPU, block by block and phase by phase, for tests.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "block.h"

namespace fastflow {

class EmulatedBlock {
 public:
  const int64_t index, count;

  EmulatedBlock(int64_t index, int64_t count, const std::vector<int>& threads, unsigned char* memory,
                int64_t bytes)
      : index(index), count(count), threads_(threads), memory_(memory), bytes_(bytes) {}

  template <class F>
  void phase(F f) {
    for (int thread : threads_) f(thread);
  }

  // Allocates from the block's shared memory.
  template <typename T>
  Span<T> shared(int64_t size) {
    Span<T> taken{reinterpret_cast<T*>(memory_ + used_), size};
    used_ += (size * int64_t(sizeof(T)) + 15) / 16 * 16;
    if (used_ > bytes_)
      throw std::out_of_range("fastflow: a block uses more shared memory than its launch provides");
    return taken;
  }

  // Values that a thread keeps between phases; registers on a GPU.
  template <typename T>
  class PerThread {
   public:
    explicit PerThread(const EmulatedBlock& block) : values_(block.threads_.size()) {}
    T& operator[](int thread) { return values_.at(thread); }

   private:
    std::vector<T> values_;
  };

 private:
  const std::vector<int>& threads_;
  unsigned char* memory_;
  const int64_t bytes_;
  int64_t used_ = 0;
};

struct Emulated {
  static constexpr bool DOUBLE = true;  // float64 distinguishes a wrong index from rounding
  struct Guard {
    template <class Tensor>
    explicit Guard(const Tensor&) {}
  };

  // One by default, so that blocks process several tiles of small tensors too; tests can change it.
  static inline int64_t processors = 1;
  static int64_t multiprocessors() { return processors; }

  // Bytes of shared memory that a block may have, those of an H200 by default; tests can change it.
  static inline int64_t shared = 227 * 1024;
  static int64_t shared_limit() { return shared; }

  // The order of threads and blocks: 0 ascending, 1 descending, any other number is the seed of a shuffle.
  static inline int64_t order = 0;

  template <class Kernel>
  static void launch(const Kernel& kernel, int64_t blocks, int64_t shared_bytes) {
    const std::vector<int> threads = ordered<int>(Kernel::THREADS);
    std::unique_ptr<unsigned char, decltype(&std::free)> memory(
        static_cast<unsigned char*>(std::aligned_alloc(64, shared_bytes / 64 * 64 + 64)), &std::free);
    for (int64_t index : ordered<int64_t>(blocks)) {
      std::memset(memory.get(), 0xff, shared_bytes);  // NaN, so that reads of unwritten memory are detected
      EmulatedBlock block(index, blocks, threads, memory.get(), shared_bytes);
      kernel(block);
    }
  }

  // The word in which kernels report singular matrices; see singular.h.
  static int64_t* fault_word() {
    static int64_t slot = 0;
    return &slot;
  }

 private:
  template <typename T>
  static std::vector<T> ordered(int64_t count) {
    std::vector<T> found(count);
    std::iota(found.begin(), found.end(), T(0));
    if (order == 1) std::reverse(found.begin(), found.end());
    if (order > 1) std::shuffle(found.begin(), found.end(), std::mt19937_64(order));
    return found;
  }
};

}  // namespace fastflow
