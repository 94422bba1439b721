// fastflow_C::uniform_noise and normal_noise: [n, d] numbers from Philox4x32-10 (Salmon et al., SC'11), the same bits as
// fastflow/reference.py has, normal ones to rounding.
#include "stable.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "arguments.h"
#include "cpu/tensors.h"

namespace fastflow::cpu {
namespace {

enum Stream : uint32_t { UNIFORM, NORMAL };  // the second word of the counter

std::array<uint32_t, 4> philox(uint64_t block, uint32_t stream, uint64_t sample, uint64_t seed) {
  std::array<uint32_t, 4> c{static_cast<uint32_t>(block), stream, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32)};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c[0]) * 0xD2511F53, p1 = uint64_t(c[2]) * 0xCD9E8D57;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1), static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1,
         static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  return c;
}

constexpr int64_t GRAIN = 1 << 9;  // blocks that are worth a thread

// EACH numbers of a block of four words, by f(words, numbers).
template <int64_t EACH, typename T, typename F>
void fill(const Tensor& out, uint64_t seed, uint64_t offset, Stream stream, const F& f) {
  const int64_t n = out.size(0), d = out.size(1), blocks = (d + EACH - 1) / EACH;
  T* to = out.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, n * blocks, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / blocks, block = i % blocks;
      std::array<T, EACH> numbers;
      f(philox(block, stream, offset + sample, seed), numbers);
      std::copy_n(numbers.begin(), std::min(EACH, d - block * EACH), to + sample * d + block * EACH);
    }
  });
}

template <typename T>
void uniform(const Tensor& out, uint64_t seed, uint64_t offset) {
  fill<8, T>(out, seed, offset, UNIFORM, [](const auto& words, auto& numbers) {
    for (int i = 0; i < 4; ++i) {
      numbers[2 * i] = T(words[i] & 0xFFFF) * T(0x1p-16);
      numbers[2 * i + 1] = T(words[i] >> 16) * T(0x1p-16);
    }
  });
}

// Box and Muller.
template <typename T>
void normal(const Tensor& out, uint64_t seed, uint64_t offset) {
  fill<4, T>(out, seed, offset, NORMAL, [](const auto& words, auto& numbers) {
    for (int i = 0; i < 4; i += 2) {
      const T radius = std::sqrt(T(-2) * std::log((T(words[i]) + T(0.5)) * T(0x1p-32)));
      const T angle = T(words[i + 1]) * T(0x1p-32 * 2 * 3.14159265358979323846);
      numbers[i] = radius * std::cos(angle);
      numbers[i + 1] = radius * std::sin(angle);
    }
  });
}

using Fill = void (*)(const Tensor&, uint64_t seed, uint64_t offset);

Tensor noise(const char* op, int64_t n, int64_t d, const Tensor& seed, int64_t offset, bool as_double, Fill fill_float, Fill fill_double) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.dim() == 0, op, ": seed has dtype ", dtype(seed), " and shape ",
                  shape(seed), ", expected Long without dimensions");
  const Tensor out = empty(seed, {n, d}, as_double ? ScalarType::Double : ScalarType::Float);
  (as_double ? fill_double : fill_float)(out, static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()), static_cast<uint64_t>(offset));
  return out;
}

Tensor uniform_noise(int64_t n, int64_t d, const Tensor& seed, int64_t offset, bool as_double) {
  return noise("uniform_noise", n, d, seed, offset, as_double, uniform<float>, uniform<double>);
}

Tensor normal_noise(int64_t n, int64_t d, const Tensor& seed, int64_t offset, bool as_double) {
  return noise("normal_noise", n, d, seed, offset, as_double, normal<float>, normal<double>);
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("uniform_noise", TORCH_BOX(&fastflow::cpu::uniform_noise));
  m.impl("normal_noise", TORCH_BOX(&fastflow::cpu::normal_noise));
}
