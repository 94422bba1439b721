// fastflow_C::dequantize, its backward and its inverse on the CPU. Bytes per element, float32: 5 (with given
// noise 9), backward 13 (without a logit 8), inverse 5.
//
// A tile has about two thousand elements of one sample, or of several small samples. All tensors are read and
// written in the same order: the order of memory, or the logical order if noise is drawn or the result is
// squeezed. Tiles that are contiguous in this order are processed in place; other layouts and dtypes are
// copied through a scratch buffer.
#include "stable.h"
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/gemm.h"
#include "cpu/simd_math.h"
#include "cpu/tensors.h"
#include "noise/noise.h"
#include "squeeze/squeeze.h"

namespace fastflow::cpu {
namespace {

constexpr int64_t TILE = 2048;  // elements; a pair of rows to squeeze is never split, even if it is longer
constexpr int64_t GRAIN = 16;   // minimum number of tiles per thread

// The arithmetic reads and writes whole vectors, `padded(count)` elements (gemm.h).

template <typename T>
struct PixelMap {
  bool logit;
  // p = (x + u) slope + shift;  1 - p = ((bins - x) - u) slope + rest
  T bins, slope, shift, rest;

  PixelMap(int64_t n_bits, double scale, double shift_, bool logit_)
      : logit(logit_),
        bins(std::ldexp(T(1), n_bits)),
        slope(scale / std::ldexp(1., n_bits)),
        shift(shift_),
        rest(1 - scale - shift_) {}
};

template <typename T>
struct Dequantization {
  PixelMap<T> map;
  int64_t count;
  const uint8_t* x;
  const T* u;
  T *y, *terms;  // terms of the log-det; written with a logit
};

template <int BYTES, typename T>
FASTFLOW_INLINE void dequantize_elements_simd(const Dequantization<T>& d) {
  using M = SimdMath<T, BYTES>;
  const PixelMap<T> m = d.map;
  T* __restrict y = d.y;
  for (int64_t i = 0; i < padded(d.count); ++i) y[i] = d.x[i];
  for (int64_t i = 0; i < padded(d.count); i += M::COUNT) {
    const auto x = M::load(y + i), u = M::load(d.u + i), p = (x + u) * m.slope + m.shift;
    if (!m.logit) {
      M::store(y + i, p);
      continue;
    }
    const auto log_p = M::log(p), log_q = M::log(((m.bins - x) - u) * m.slope + m.rest);
    M::store(y + i, log_p - log_q);
    M::store(d.terms + i, log_p + log_q);
  }
}

template <typename T>
struct DequantizationBackward {
  PixelMap<T> map;
  int64_t count;
  const uint8_t* x;  // x, u and dlog_det are read with a logit only
  const T *u, *dlog_det, *dy;
  T* du;
};

template <int BYTES, typename T>
FASTFLOW_INLINE void dequantize_backward_elements_simd(const DequantizationBackward<T>& d) {
  using M = SimdMath<T, BYTES>;
  const PixelMap<T> m = d.map;
  T* __restrict du = d.du;
  if (m.logit)
    for (int64_t i = 0; i < padded(d.count); ++i) du[i] = d.x[i];
  for (int64_t i = 0; i < padded(d.count); i += M::COUNT) {
    auto g = M::load(d.dy + i);
    if (m.logit) {
      const auto x = M::load(du + i), u = M::load(d.u + i);
      const auto p = (x + u) * m.slope + m.shift, q = ((m.bins - x) - u) * m.slope + m.rest;
      g = (g + M::load(d.dlog_det + i) * (p - q)) / (p * q);
    }
    M::store(du + i, g * m.slope);
  }
}

template <typename T>
struct Quantization {
  PixelMap<T> map;
  T per_bin;
  int64_t count;
  const T* y;
  uint8_t* x;
  typename Simd<T, 16>::Integer* bin;  // scratch
  T* terms;                            // of the log-det; written with a logit
};

template <int BYTES, typename T>
FASTFLOW_INLINE void quantize_elements_simd(const Quantization<T>& d) {
  using M = SimdMath<T, BYTES>;
  const PixelMap<T> m = d.map;
  for (int64_t i = 0; i < padded(d.count); i += M::COUNT) {
    auto p = M::load(d.y + i);
    if (m.logit) {
      // log sigmoid(y) + log sigmoid(-y), and sigmoid(y)
      const auto magnitude = M::abs(p), e = M::exp(-magnitude);
      M::store(d.terms + i, -magnitude - M::log1p(e) * T(2));
      p = (p < T(0) ? e : M::all(1)) / (e + T(1));
    }
    const auto v = (p - m.shift) * d.per_bin;
    // NaN becomes 0
    const auto bin = __builtin_convertvector(M::min(v > T(0) ? v : M::all(0), m.bins - 1), typename M::I);
    std::memcpy(d.bin + i, &bin, BYTES);
  }
  uint8_t* __restrict x = d.x;  // a separate loop, which the compiler vectorizes
  const auto* __restrict bin = d.bin;
  for (int64_t i = 0, count = padded(d.count); i < count; ++i) x[i] = static_cast<uint8_t>(bin[i]);
}

template <typename T>
struct Sum {
  const T* v;
  int64_t count;
  double* sum;
};

template <int BYTES, typename T>
FASTFLOW_INLINE void sum_simd(const Sum<T>& s) {
  double parts[16] = {}, total = 0;
  int64_t i = 0;
  for (; i + 16 <= s.count; i += 16)
    for (int64_t j = 0; j < 16; ++j) parts[j] += s.v[i + j];
  for (; i < s.count; ++i) total += s.v[i];
  for (double part : parts) total += part;
  *s.sum = total;
}

FASTFLOW_MULTIVERSION(dequantize_elements, Dequantization<float>, dequantize_elements_simd)
FASTFLOW_MULTIVERSION(dequantize_elements, Dequantization<double>, dequantize_elements_simd)
FASTFLOW_MULTIVERSION(dequantize_backward_elements, DequantizationBackward<float>,
                      dequantize_backward_elements_simd)
FASTFLOW_MULTIVERSION(dequantize_backward_elements, DequantizationBackward<double>,
                      dequantize_backward_elements_simd)
FASTFLOW_MULTIVERSION(quantize_elements, Quantization<float>, quantize_elements_simd)
FASTFLOW_MULTIVERSION(quantize_elements, Quantization<double>, quantize_elements_simd)
FASTFLOW_MULTIVERSION(sum, Sum<float>, sum_simd)
FASTFLOW_MULTIVERSION(sum, Sum<double>, sum_simd)

// Tiles of a batch, and views of tensors through them.

struct Tile {
  int64_t sample, samples, from, length;  // elements `from` to `from + length` of each sample
  int64_t count() const { return samples * length; }
};

struct Grid {
  int64_t samples, elements;                 // elements per sample
  int64_t samples_per_tile, length, pieces;  // a tile is some samples, or a piece of one

  // `unit`: number of elements that must stay in one tile.
  Grid(const Tensor& x, int64_t unit) : samples(x.size(0)), elements(samples ? x.numel() / samples : 0) {
    samples_per_tile = std::max<int64_t>(1, TILE / std::max<int64_t>(1, elements));
    const int64_t aligned = 16 / std::gcd<int64_t>(16, elements);  // whole vectors need no buffer
    if (samples_per_tile > aligned) samples_per_tile -= samples_per_tile % aligned;
    length = std::min(elements, std::max(unit, TILE / unit * unit));
    pieces = elements ? (elements + length - 1) / length : 0;
  }
  int64_t tiles() const { return (samples + samples_per_tile - 1) / samples_per_tile * pieces; }
  int64_t capacity() const { return padded(samples_per_tile * length); }
  Tile operator[](int64_t i) const {
    const int64_t sample = i / pieces * samples_per_tile, from = i % pieces * length;
    return {sample, std::min(samples_per_tile, samples - sample), from, std::min(length, elements - from)};
  }
};

// The order of a sample's dimensions in which elements are numbered, the last one fastest.
std::vector<int64_t> order_of(const Tensor& like, bool by_memory) {
  std::vector<int64_t> order;
  for (int64_t d = 1; d < like.dim(); ++d) order.push_back(d);
  if (by_memory)
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return like.stride(a) > like.stride(b); });
  return order;
}

template <typename F>
void for_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Byte: return f(uint8_t());
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16());
    default: return f(torch::headeronly::Half());
  }
}

template <typename T>
constexpr ScalarType TYPE = std::is_same_v<T, uint8_t> ? ScalarType::Byte
                            : std::is_same_v<T, float> ? ScalarType::Float
                                                       : ScalarType::Double;

template <bool STORE, typename T, typename E>
void copy_run(T* tile, int64_t tile_step, E* memory, int64_t step, int64_t count) {
  const auto each = [=](int64_t tile_step, int64_t step) {
    for (int64_t i = 0; i < count; ++i) {
      if (STORE) memory[i * step] = static_cast<E>(tile[i * tile_step]);
      else tile[i * tile_step] = static_cast<T>(memory[i * step]);
    }
  };
  if (tile_step == 1 && step == 1) each(1, 1);
  else each(tile_step, step);
}

// A view of an image, noise or latent through tiles.
class SampleView {
 public:
  SampleView(const Tensor& x, const std::vector<int64_t>& order) : SampleView(x) {
    for (int64_t d : order) {
      const int64_t size = x.size(d), step = x.stride(d);
      if (size == 1) continue;
      if (!axes_.empty() && axes_.back().step == size * step) axes_.back() = {axes_.back().size * size, step};
      else axes_.push_back({size, step});
    }
    if (axes_.empty()) axes_.push_back({1, 1});
  }
  // Squeezed images.
  SampleView(const Tensor& x, const std::string& squeeze_order) : SampleView(x) {
    height_ = x.size(2), width_ = x.size(3);
    row_ = x.stride(2), column_ = x.stride(3);
    blocks_ = blocks_of(squeeze_order, x.size(1) / 4, x.stride(1));
  }

  // The tile's address if it can be processed in place as T, otherwise null.
  template <typename T>
  T* in_place(const Tile& t) const {
    return is_dense(t) && dtype_ == TYPE<T> && t.count() % 16 == 0
               ? static_cast<T*>(data_) + t.sample * sample_ + t.from
               : nullptr;
  }

  template <bool STORE, typename T>
  void copy(const Tile& t, T* tile) const {
    for_dtype(dtype_, [&](auto value) {
      auto* memory = static_cast<decltype(value)*>(data_) + t.sample * sample_;
      if (is_dense(t)) return copy_run<STORE>(tile, 1, memory + t.from, 1, t.count());
      for (int64_t s = 0; s < t.samples; ++s, tile += t.length, memory += sample_) {
        if (blocks_) copy_blocks<STORE>(t, tile, memory);
        else copy_runs<STORE>(t, tile, memory);
      }
    });
  }

 private:
  struct Axis {
    int64_t size, step;
  };

  bool is_dense(const Tile& t) const {
    return !blocks_ && axes_.size() == 1 && axes_[0].step == 1 && (t.samples == 1 || sample_ == t.length);
  }

  explicit SampleView(const Tensor& x) : data_(x.data_ptr()), dtype_(x.scalar_type()), sample_(x.stride(0)) {}

  template <bool STORE, typename T, typename E>
  void copy_runs(const Tile& t, T* tile, E* memory) const {
    const Axis inner = axes_.back();
    for (int64_t i = t.from; i < t.from + t.length;) {
      int64_t offset = i % inner.size * inner.step, rest = i / inner.size;
      for (size_t a = axes_.size() - 1; a-- > 0; rest /= axes_[a].size)
        offset += rest % axes_[a].size * axes_[a].step;
      const int64_t count = std::min(inner.size - i % inner.size, t.from + t.length - i);
      copy_run<STORE>(tile + (i - t.from), 1, memory + offset, inner.step, count);
      i += count;
    }
  }

  // Pairs of rows of an image.
  template <bool STORE, typename T, typename E>
  void copy_blocks(const Tile& t, T* tile, E* memory) const {
    const int64_t pair = 4 * width_;
    for (int64_t i = t.from / pair; i < (t.from + t.length) / pair; ++i) {
      E* first = memory + i / height_ * blocks_->channel + i % height_ * row_;
      for (int k = 0; k < 4; ++k)
        copy_run<STORE>(tile + k / 2 * 2 * width_ + k % 2, 2, first + blocks_->pixel[k], column_, width_);
      tile += pair;
    }
  }

  void* data_;
  ScalarType dtype_;
  int64_t sample_;
  std::vector<Axis> axes_;
  std::optional<Blocks> blocks_;
  int64_t height_ = 0, width_ = 0, row_ = 0, column_ = 0;  // of squeezed images
};

// An input or output of the arithmetic: the tile in place, or a copy in a buffer of the thread.
template <typename T>
class Operand {
 public:
  Operand(const SampleView& samples, const Grid& grid) : samples_(samples), buffer_(grid.capacity()) {
    std::fill_n(buffer_.get(), grid.capacity(),
                T(0));  // vectors also read the elements after the end of a tile
  }
  const T* load(const Tile& t) const {
    if (const T* in_place = samples_.in_place<T>(t)) return in_place;
    samples_.copy<false>(t, buffer_.get());
    return buffer_.get();
  }
  T* output(const Tile& t) const {
    T* in_place = samples_.in_place<T>(t);
    return in_place ? in_place : buffer_.get();
  }
  void store(const Tile& t) const {
    if (!samples_.in_place<T>(t)) samples_.copy<true>(t, buffer_.get());
  }

 private:
  const SampleView& samples_;
  const Buffer<T> buffer_;
};

// Draws the noise of a tile, in blocks of eight elements of a sample.
template <typename T>
class TileNoise {
 public:
  TileNoise(const Grid& grid, const Tensor& seed, int64_t offset)
      : grid_(grid),
        seed_(static_cast<uint64_t>(*seed.const_data_ptr<int64_t>())),
        offset_(static_cast<uint64_t>(offset)),
        buffer_(grid.samples_per_tile * (grid.length + 2 * UNIFORM) + 16) {
    std::fill_n(buffer_.get(), grid.samples_per_tile * (grid.length + 2 * UNIFORM) + 16, T(0));
  }
  const T* operator()(const Tile& t) const {
    T* const u = buffer_.get();
    const int64_t each = blocks(grid_.elements), first = t.from / UNIFORM;
    draw_uniform({seed_, offset_ + t.sample, each, first,
                  t.samples > 1 ? t.samples * each : blocks(t.from + t.length) - first, u});
    if (t.samples == 1) return u + t.from % UNIFORM;
    for (int64_t s = 1; s < t.samples; ++s) std::copy_n(u + s * each * UNIFORM, t.length, u + s * t.length);
    return u;
  }

 private:
  static int64_t blocks(int64_t numbers) { return (numbers + UNIFORM - 1) / UNIFORM; }
  const Grid& grid_;
  const uint64_t seed_, offset_;
  const Buffer<T> buffer_;
};

// Sums of each sample's terms by tiles, which do not depend on the number of threads.
template <typename T>
class LogDet {
 public:
  LogDet(const Grid& grid, bool sums) : grid_(grid), sums_(sums ? std::max(grid.tiles(), grid.samples) : 0) {}
  void add(int64_t i, const Tile& t, const T* terms) const {
    double* to = grid_.pieces == 1 ? sums_.get() + t.sample : sums_.get() + i;
    for (int64_t s = 0; s < t.samples; ++s) sum({terms + s * t.length, t.length, to + s});
  }
  // Writes constant + sign * sum; only the constant if there is no sign.
  void write(const Tensor& log_det, double constant, std::optional<double> sign) const {
    T* to = log_det.mutable_data_ptr<T>();
    for (int64_t n = 0; n < grid_.samples; ++n) {
      double total = 0;
      for (int64_t i = 0; sign && i < grid_.pieces; ++i) total += sums_.get()[n * grid_.pieces + i];
      to[n] = static_cast<T>(constant + (sign ? *sign * total : 0));
    }
  }

 private:
  const Grid& grid_;
  const Buffer<double> sums_;
};

// A tensor of `dtype` with the strides of torch.empty_like(like), or squeezed or unsqueezed like the
// result of fastflow.reference.squeeze.
Tensor output_like(const Tensor& like, const std::optional<std::string>& squeeze_order, bool inverse,
                   ScalarType dtype) {
  const Tensor flat = empty_like(like, dtype);
  if (!squeeze_order) return flat;
  const Tensor& source = inverse ? like : flat;
  const int64_t n = like.size(0), c = like.size(1), h = like.size(2), w = like.size(3);
  const bool channels_last = c > 1 && source.stride(1) == 1 && !source.is_contiguous();
  return inverse ? empty_images(flat, n, c / 4, 2 * h, 2 * w, channels_last)
                 : empty_images(flat, n, 4 * c, h / 2, w / 2, channels_last);
}

SampleView continuous_of(const Tensor& y, const std::vector<int64_t>& order,
                         const std::optional<std::string>& squeeze_order) {
  return squeeze_order ? SampleView(y, *squeeze_order) : SampleView(y, order);
}

int64_t unit_of(const Tensor& image, const std::optional<std::string>& squeeze_order) {
  return squeeze_order ? std::max<int64_t>(1, 2 * image.size(3)) : 1;
}

ScalarType accumulator_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename F>
void for_accumulator(ScalarType dtype, const F& f) {
  dtype == ScalarType::Double ? f(double()) : f(float());
}

double log_slope(int64_t n_bits, double scale) { return std::log(scale / std::ldexp(1., n_bits)); }

void check(const char* op, const Tensor& x, const std::optional<std::string>& squeeze_order) {
  expect_dims(op, "x", x, 2);
  expect_dtype(op, "x", x, {ScalarType::Byte});
  if (squeeze_order) expect_squeezable(op, "x", x, false);
}

std::tuple<Tensor, Tensor> dequantize(const Tensor& x_, const std::optional<Tensor>& noise,
                                      const std::optional<Tensor>& seed, int64_t offset, int64_t n_bits,
                                      double scale, double shift, bool logit,
                                      const std::optional<std::string>& squeeze_order, ScalarType dtype) {
  check("dequantize", x_, squeeze_order);
  STD_TORCH_CHECK(noise.has_value() != seed.has_value(), "dequantize: noise, seed: got ",
                  seed ? "both" : "neither", ", expected one of them");
  if (seed) expect_tensor("dequantize", "seed", *seed, {}, ScalarType::Long, x_);
  else expect_floating("dequantize", "noise", *noise, x_.sizes());
  const Tensor y_ = output_like(x_, squeeze_order, false, dtype);
  const Tensor log_det_ = empty(x_, {x_.size(0)}, accumulator_of(dtype));
  const std::vector<int64_t> order = order_of(y_, noise && !squeeze_order);
  const SampleView x(x_, order), y = continuous_of(y_, order, squeeze_order), u(noise ? *noise : x_, order);
  const Grid grid(x_, unit_of(x_, squeeze_order));
  for_accumulator(dtype, [&](auto value) {
    using T = decltype(value);
    const PixelMap<T> map(n_bits, scale, shift, logit);
    const LogDet<T> log_det(grid, logit);
    torch::stable::parallel_for(0, grid.tiles(), GRAIN, [&](int64_t begin, int64_t end) {
      const Operand<uint8_t> pixels(x, grid);
      const Operand<T> given(u, grid), result(y, grid);
      std::optional<TileNoise<T>> drawn;
      if (seed) drawn.emplace(grid, *seed, offset);
      const Buffer<T> terms(grid.capacity());
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = grid[i];
        dequantize_elements({map, tile.count(), pixels.load(tile), seed ? (*drawn)(tile) : given.load(tile),
                             result.output(tile), terms.get()});
        result.store(tile);
        if (logit) log_det.add(i, tile, terms.get());
      }
    });
    log_det.write(log_det_, grid.elements * log_slope(n_bits, scale),
                  logit ? std::optional(-1.) : std::nullopt);
  });
  return {y_, log_det_};
}

Tensor dequantize_backward(const Tensor& x_, const Tensor& noise, const Tensor& dy_, const Tensor& dlog_det_,
                           int64_t n_bits, double scale, double shift, bool logit,
                           const std::optional<std::string>& squeeze_order) {
  const char* op = "dequantize_backward";
  check(op, x_, squeeze_order);
  expect_floating(op, "noise", noise, x_.sizes());
  if (squeeze_order)
    expect_floating(op, "dy", dy_, {x_.size(0), 4 * x_.size(1), x_.size(2) / 2, x_.size(3) / 2});
  else expect_floating(op, "dy", dy_, x_.sizes());
  expect_floating(op, "dlog_det", dlog_det_, {x_.size(0)});
  const Tensor du_ = empty_like(noise, noise.scalar_type());
  const std::vector<int64_t> order = order_of(du_, !squeeze_order);
  const SampleView x(x_, order), u(noise, order), du(du_, order),
      dy = continuous_of(dy_, order, squeeze_order);
  const Grid grid(x_, unit_of(x_, squeeze_order));
  for_accumulator(noise.scalar_type(), [&](auto value) {
    using T = decltype(value);
    const PixelMap<T> map(n_bits, scale, shift, logit);
    const Buffer<T> dlog_det(grid.samples);
    for_dtype(dlog_det_.scalar_type(), [&](auto of_dlog_det) {
      copy_run<false>(dlog_det.get(), 1, static_cast<decltype(of_dlog_det)*>(dlog_det_.data_ptr()),
                      dlog_det_.stride(0), grid.samples);
    });
    torch::stable::parallel_for(0, grid.tiles(), GRAIN, [&](int64_t begin, int64_t end) {
      const Operand<uint8_t> pixels(x, grid);
      const Operand<T> given(u, grid), upstream(dy, grid), result(du, grid);
      const Buffer<T> spread(grid.capacity());
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = grid[i];
        if (logit)
          for (int64_t s = 0; s < tile.samples; ++s)
            std::fill_n(spread.get() + s * tile.length, tile.length, dlog_det.get()[tile.sample + s]);
        dequantize_backward_elements({map, tile.count(), logit ? pixels.load(tile) : nullptr,
                                      logit ? given.load(tile) : nullptr, spread.get(), upstream.load(tile),
                                      result.output(tile)});
        result.store(tile);
      }
    });
  });
  return du_;
}

std::tuple<Tensor, Tensor> dequantize_inverse(const Tensor& y_, int64_t n_bits, double scale, double shift,
                                              bool logit, const std::optional<std::string>& squeeze_order) {
  expect_batch("dequantize_inverse", "y", y_);
  if (squeeze_order) expect_squeezable("dequantize_inverse", "y", y_, true);
  const Tensor x_ = output_like(y_, squeeze_order, true, ScalarType::Byte);
  const Tensor log_det_ = empty(y_, {y_.size(0)}, accumulator_of(y_.scalar_type()));
  const std::vector<int64_t> order = order_of(x_, !squeeze_order);
  const SampleView x(x_, order), y = continuous_of(y_, order, squeeze_order);
  const Grid grid(x_, unit_of(x_, squeeze_order));
  for_accumulator(y_.scalar_type(), [&](auto value) {
    using T = decltype(value);
    const PixelMap<T> map(n_bits, scale, shift, logit);
    const LogDet<T> log_det(grid, logit);
    torch::stable::parallel_for(0, grid.tiles(), GRAIN, [&](int64_t begin, int64_t end) {
      const Operand<uint8_t> pixels(x, grid);
      const Operand<T> latents(y, grid);
      const Buffer<T> terms(grid.capacity());
      const Buffer<typename Simd<T, 16>::Integer> bins(grid.capacity());
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = grid[i];
        quantize_elements({map, static_cast<T>(std::ldexp(1., n_bits) / scale), tile.count(),
                           latents.load(tile), pixels.output(tile), bins.get(), terms.get()});
        pixels.store(tile);
        if (logit) log_det.add(i, tile, terms.get());
      }
    });
    log_det.write(log_det_, -(grid.elements * log_slope(n_bits, scale)),
                  logit ? std::optional(1.) : std::nullopt);
  });
  return {x_, log_det_};
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&fastflow::cpu::dequantize));
  m.impl("dequantize_backward", TORCH_BOX(&fastflow::cpu::dequantize_backward));
  m.impl("dequantize_inverse", TORCH_BOX(&fastflow::cpu::dequantize_inverse));
}
