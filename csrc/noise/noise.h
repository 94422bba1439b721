#pragma once
// Numbers from Philox4x32-10 (Salmon et al., SC'11), compiled for each instruction set (multiversion.h).
#include <cstdint>

namespace fastflow::cpu {

// Numbers of consecutive blocks, which may span several samples.
template <typename T>
struct Draw {
  uint64_t seed, sample;  // sample: index of the first block's sample in the whole batch
  int64_t each;           // blocks per sample
  int64_t block, blocks;  // index of the first block in its sample, and number of blocks
  T* to;
};

constexpr int64_t UNIFORM = 8, NORMAL = 4;  // numbers per block
void draw_uniform(const Draw<float>&);
void draw_uniform(const Draw<double>&);
void draw_normal(const Draw<float>&);
void draw_normal(const Draw<double>&);

}  // namespace fastflow::cpu
