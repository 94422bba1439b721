// fastflow_C::uniform_noise and normal_noise: [n, d] numbers from Philox4x32-10 (Salmon et al., SC'11).
//
// Uniform numbers have the bits of the reference (fastflow/ops/noise/reference.py); normal numbers agree with
// it to rounding. 4 bytes per float32 number, written.
#include "stable.h"

#include "noise/noise.h"

#include <algorithm>

#include "checks.h"
#include "cpu/simd_math.h"
#include "cpu/tensors.h"

namespace fastflow::cpu {
namespace {

enum Stream : uint32_t { UNIFORM_STREAM, NORMAL_STREAM };  // the second word of the counter

constexpr int64_t BLOCKS = 64;      // blocks computed together, in vectors of one word of each
constexpr int64_t GRAIN = 1 << 12;  // minimum number of blocks per thread

struct alignas(64) Words {
  uint32_t word[4][BLOCKS];
};

// Computes words from counters (block, stream, low and high word of the sample). The key is the two words of
// the seed.
FASTFLOW_INLINE void philox(uint64_t seed, Stream stream, const Words& counters, Words& words) {
  const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int64_t i = 0; i < BLOCKS; ++i) {
    uint32_t c0 = counters.word[0][i], c1 = stream, c2 = counters.word[2][i], c3 = counters.word[3][i],
             k0 = low, k1 = high;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {  // unrolled, so that the outer loop is vectorized
      const uint64_t p0 = uint64_t(c0) * 0xD2511F53, p1 = uint64_t(c2) * 0xCD9E8D57;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    words.word[0][i] = c0, words.word[1][i] = c1, words.word[2][i] = c2, words.word[3][i] = c3;
  }
}

// Multiples of 2^-16 from the low, then the high half of each word.
template <typename T>
FASTFLOW_INLINE void uniform(const Words& words, T* __restrict to) {
  for (int64_t i = 0; i < BLOCKS; ++i)
    for (int j = 0; j < 4; ++j) {
      to[UNIFORM * i + 2 * j] = T(static_cast<int32_t>(words.word[j][i] & 0xFFFF)) * T(0x1p-16);
      to[UNIFORM * i + 2 * j + 1] = T(static_cast<int32_t>(words.word[j][i] >> 16)) * T(0x1p-16);
    }
}

// Box-Muller transform of the word pairs (0, 1) and (2, 3).
template <int BYTES, typename T>
FASTFLOW_INLINE void normal(const Words& words, T* __restrict to) {
  using M = SimdMath<T, BYTES>;
  alignas(64) T pair[2][2][BLOCKS];  // cosines, sines
  for (int k = 0; k < 2; ++k)
    for (int64_t i = 0; i < BLOCKS; i += M::COUNT) {
      const auto square = M::log((M::of_words(words.word[2 * k] + i) + T(0.5)) * T(0x1p-32)) * T(-2);
      typename M::V cos, sin;
      M::cos_sin(words.word[2 * k + 1] + i, cos, sin);
      const auto radius = M::sqrt(square);
      M::store(pair[k][0] + i, radius * cos);
      M::store(pair[k][1] + i, radius * sin);
    }
  for (int64_t i = 0; i < BLOCKS; ++i)
    for (int k = 0; k < 2; ++k)
      for (int s = 0; s < 2; ++s) to[NORMAL * i + 2 * k + s] = pair[k][s][i];
}

template <int64_t EACH, int BYTES, typename T>
FASTFLOW_INLINE void draw(const Draw<T>& d) {
  Words counters{}, words;
  alignas(64) T last[EACH * BLOCKS];
  uint64_t sample = d.sample;
  int64_t block = d.block;
  for (int64_t done = 0; done < d.blocks; done += BLOCKS) {
    const int64_t count = std::min(BLOCKS, d.blocks - done);
    for (int64_t i = 0; i < count;) {
      const int64_t of_sample = std::min(count - i, d.each - block);
      for (int64_t j = 0; j < of_sample; ++j, ++i) {
        counters.word[0][i] = static_cast<uint32_t>(block + j);
        counters.word[2][i] = static_cast<uint32_t>(sample);
        counters.word[3][i] = static_cast<uint32_t>(sample >> 32);
      }
      block += of_sample;
      if (block == d.each) block = 0, ++sample;
    }
    philox(d.seed, EACH == UNIFORM ? UNIFORM_STREAM : NORMAL_STREAM, counters, words);
    T* const to = d.to + done * EACH;
    if constexpr (EACH == UNIFORM) uniform(words, count == BLOCKS ? to : last);
    else normal<BYTES>(words, count == BLOCKS ? to : last);
    if (count < BLOCKS) std::copy_n(last, count * EACH, to);
  }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void draw_uniform_simd(const Draw<T>& d) {
  draw<UNIFORM, BYTES>(d);
}
template <int BYTES, typename T>
FASTFLOW_INLINE void draw_normal_simd(const Draw<T>& d) {
  draw<NORMAL, BYTES>(d);
}

}  // namespace

FASTFLOW_MULTIVERSION(draw_uniform, Draw<float>, draw_uniform_simd)
FASTFLOW_MULTIVERSION(draw_uniform, Draw<double>, draw_uniform_simd)
FASTFLOW_MULTIVERSION(draw_normal, Draw<float>, draw_normal_simd)
FASTFLOW_MULTIVERSION(draw_normal, Draw<double>, draw_normal_simd)

namespace {

template <int64_t EACH, typename T>
void fill(const Tensor& out, uint64_t seed, uint64_t offset, void (*numbers)(const Draw<T>&)) {
  const int64_t n = out.size(0), d = out.size(1), each = (d + EACH - 1) / EACH;
  T* const to = out.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, n * each, GRAIN, [&](int64_t begin, int64_t end) {
    const auto drawn = [&](int64_t i, int64_t blocks, T* out) {
      numbers({seed, offset + static_cast<uint64_t>(i / each), each, i % each, blocks, out});
    };
    if (d == each * EACH) return drawn(begin, end - begin, to + begin * EACH);
    T buffer[EACH * BLOCKS];  // the last block of a sample has more numbers than it needs
    for (int64_t i = begin; i < end; i += BLOCKS) {
      const int64_t blocks = std::min(BLOCKS, end - i);
      drawn(i, blocks, buffer);
      for (int64_t j = i; j < i + blocks; ++j) {
        const int64_t first = j % each * EACH;
        std::copy_n(buffer + (j - i) * EACH, std::min(EACH, d - first), to + j / each * d + first);
      }
    }
  });
}

Tensor empty_rows(const char* op, int64_t n, int64_t d, const Tensor& seed, bool as_double) {
  expect_tensor(op, "seed", seed, {}, ScalarType::Long, seed);
  return empty(seed, {n, d}, as_double ? ScalarType::Double : ScalarType::Float);
}

uint64_t value(const Tensor& seed) { return static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()); }

Tensor uniform_noise(int64_t n, int64_t d, const Tensor& seed, int64_t offset, bool as_double) {
  const Tensor out = empty_rows("uniform_noise", n, d, seed, as_double);
  if (as_double) fill<UNIFORM, double>(out, value(seed), offset, draw_uniform);
  else fill<UNIFORM, float>(out, value(seed), offset, draw_uniform);
  return out;
}

Tensor normal_noise(int64_t n, int64_t d, const Tensor& seed, int64_t offset, bool as_double) {
  const Tensor out = empty_rows("normal_noise", n, d, seed, as_double);
  if (as_double) fill<NORMAL, double>(out, value(seed), offset, draw_normal);
  else fill<NORMAL, float>(out, value(seed), offset, draw_normal);
  return out;
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("uniform_noise", TORCH_BOX(&fastflow::cpu::uniform_noise));
  m.impl("normal_noise", TORCH_BOX(&fastflow::cpu::normal_noise));
}
