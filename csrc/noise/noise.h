#pragma once
// Numbers from Philox4x32-10 (Salmon et al., SC'11), compiled for each instruction set (multiversion.h).
#include <cstdint>

namespace fastflow::cpu {

// Numbers of some blocks, one block after the other, also from one sample into the next.
template <typename T>
struct Draw {
  uint64_t seed, sample;  // sample: of the first block, counted through the whole batch
  int64_t each;           // blocks of a sample
  int64_t block, blocks;  // the first one within its sample, and how many
  T* to;
};

constexpr int64_t UNIFORM = 8, NORMAL = 4;  // numbers of a block
void draw_uniform(const Draw<float>&);
void draw_uniform(const Draw<double>&);
void draw_normal(const Draw<float>&);
void draw_normal(const Draw<double>&);

}  // namespace fastflow::cpu
