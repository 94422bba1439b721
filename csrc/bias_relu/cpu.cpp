// fastflow_C::bias_relu, with an optional scale, the same in place, and their backward on the CPU, tile by
// tile (tiles.h).
//
// Bytes per element of x, float32: forward 8, backward 12 (y, dy, dx).
#include "stable.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"
#include "cpu/simd_math.h"
#include "cpu/tensors.h"
#include "cpu/tiles.h"

namespace fastflow::cpu {
namespace {

// More per tile than in other ops: with so little work per element, finding a tile of 512 took a fifth of the
// time.
constexpr int64_t ELEMENTS = 2048;
constexpr int64_t GRAIN = 8;  // minimum number of tiles per thread: starting a thread costs about 10 us

template <typename T>
struct Forward {
  VectorLoop lines;
  bool scaled;
  T least;  // 0, or -inf without ReLU
  const T* x;
  OperandView<T> bias, scale;
  T* y;
};

template <typename T>
struct Backward {
  VectorLoop lines;
  T dead;  // outputs up to this have no gradient: 0, or NaN, which no output is below, without ReLU
  const T *y, *dy;
  OperandView<T> scale;
  T *dx, *masked, *dlog_scale;  // the last two only with a scale: dy where y is positive, and that times y
};

// The arguments are copies: the compiler assumes that a store may change what a reference refers to.
template <bool SCALED, int BYTES, typename T>
FASTFLOW_INLINE void rectified(const Forward<T> f) {
  using M = Simd<T, BYTES>;
  int64_t i = 0;
  for (int64_t l = 0; l < f.lines.count; ++l)
    for (const int64_t end = (l + 1) * f.lines.length; i < end; i += M::COUNT) {
      typename M::V v = M::load(f.x + i) + at<M>(f.bias, l, i);
      if (SCALED) v *= at<M>(f.scale, l, i);
      M::store(f.y + i, M::max(v, f.least));
    }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void forward_simd(const Forward<T>& f) {
  f.scaled ? rectified<true, BYTES, T>(f) : rectified<false, BYTES, T>(f);
}

template <bool SCALED, int BYTES, typename T>
FASTFLOW_INLINE void gradients_simd(const Backward<T> b) {
  using M = Simd<T, BYTES>;
  int64_t i = 0;
  for (int64_t l = 0; l < b.lines.count; ++l)
    for (const int64_t end = (l + 1) * b.lines.length; i < end; i += M::COUNT) {
      const typename M::V y = M::load(b.y + i), dy = M::load(b.dy + i);
      const typename M::V masked = y <= b.dead ? typename M::V{} : dy;
      M::store(b.dx + i, SCALED ? masked * at<M>(b.scale, l, i) : masked);
      if (!SCALED) continue;
      M::store(b.masked + i, masked);
      M::store(b.dlog_scale + i, masked * y);
    }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void backward_simd(const Backward<T>& b) {
  b.dlog_scale ? gradients_simd<true, BYTES, T>(b) : gradients_simd<false, BYTES, T>(b);
}

FASTFLOW_MULTIVERSION(forward, Forward<float>, forward_simd)
FASTFLOW_MULTIVERSION(forward, Forward<double>, forward_simd)
FASTFLOW_MULTIVERSION(backward, Backward<float>, backward_simd)
FASTFLOW_MULTIVERSION(backward, Backward<double>, backward_simd)

// e^log_scale per channel, ones without a log_scale.
template <typename acc>
Buffer<acc> scale_of(const std::optional<Tensor>& log_scale, int64_t channels) {
  Buffer<acc> scale(channels);
  std::fill_n(scale.get(), channels, acc(1));
  if (!log_scale) return scale;
  const Buffer<acc> s = values_of<acc>(*log_scale);
  for (int64_t k = 0; k < channels; ++k) scale.get()[k] = std::exp(s.get()[k]);
  return scale;
}

// y_ may be x_.
template <typename acc>
void write_output(const Tensor& x_, const Tensor& bias_, const std::optional<Tensor>& log_scale, bool relu,
                  const Tensor& y_) {
  const Grid grid(x_, x_.size(1), y_, ELEMENTS);
  const Channels x(x_, 0, 1, grid), y(y_, 0, 1, grid);
  const Buffer<acc> biases = values_of<acc>(bias_), scales = scale_of<acc>(log_scale, grid.channels);
  torch::stable::parallel_for(0, grid.tiles(), GRAIN, [&](int64_t begin, int64_t end) {
    Buffers<acc> buffers(4, grid);
    const Operand<acc> in(x, buffers), out(y, buffers);
    PerChannel<acc> bias(biases.get(), grid, buffers), scale(scales.get(), grid, buffers);
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = grid[i];
      forward(Forward<acc>{{grid, tile},
                           log_scale.has_value(),
                           relu ? acc(0) : -std::numeric_limits<acc>::infinity(),
                           in.load(tile),
                           bias(tile),
                           scale(tile),
                           out.output(tile)});
      out.store(tile);
    }
  });
}

// dlog_scale is written with a log_scale only.
template <typename acc>
void write_gradients(const Tensor& y_, const Tensor& dy_, const std::optional<Tensor>& log_scale, bool relu,
                     const Tensor& dx_, const Tensor& dbias, const Tensor& dlog_scale) {
  const Grid grid(y_, y_.size(1), dx_, ELEMENTS);
  const Channels y(y_, 0, 1, grid), dy(dy_, 0, 1, grid), dx(dx_, 0, 1, grid);
  const Slots slots(grid);
  const Buffer<acc> scales = scale_of<acc>(log_scale, grid.channels);
  const int64_t values = (log_scale ? 2 : 1) * grid.channels;
  const Buffer<double> sums(std::max<int64_t>(1, slots.count) * values);
  std::fill_n(sums.get(), values, 0.);
  torch::stable::parallel_for(0, slots.count, slots.grain(GRAIN), [&](int64_t begin, int64_t end) {
    Buffers<acc> buffers(6, grid);
    const Operand<acc> out(y, buffers), given(dy, buffers), found(dx, buffers);
    PerChannel<acc> scale(scales.get(), grid, buffers);
    acc* const masked = log_scale ? buffers.next() : nullptr;
    acc* const products = log_scale ? buffers.next() : nullptr;
    ChannelSums<acc> sums_of_masked(grid), sums_of_products(grid);
    for (int64_t slot = begin; slot < end; ++slot) {
      sums_of_masked.clear();
      sums_of_products.clear();
      for (int64_t i = slots.first(slot); i < slots.first(slot + 1); ++i) {
        const Tile tile = grid[i];
        acc* const output = found.output(tile);
        backward(Backward<acc>{{grid, tile},
                               relu ? acc(0) : std::numeric_limits<acc>::quiet_NaN(),
                               out.load(tile),
                               given.load(tile),
                               scale(tile),
                               output,
                               masked,
                               products});
        found.store(tile);
        sums_of_masked.add(masked ? masked : output, tile);
        if (products) sums_of_products.add(products, tile);
      }
      sums_of_masked.take(sums.get() + slot * values);
      if (products) sums_of_products.take(sums.get() + slot * values + grid.channels);
    }
  });
  add_slots(sums.get(), slots.count, values);
  for (int64_t k = 0; k < grid.channels; ++k) sums.get()[k] *= scales.get()[k];
  write<acc>(dbias, sums.get());
  if (log_scale) write<acc>(dlog_scale, sums.get() + grid.channels);
}

void check(const char* op, const Tensor& x, const Tensor& bias, const std::optional<Tensor>& log_scale) {
  expect_batch(op, "x", x);
  expect_floating(op, "bias", bias, {x.size(1)});
  if (log_scale) expect_floating(op, "log_scale", *log_scale, {x.size(1)});
}

Tensor bias_relu(const Tensor& x, const Tensor& bias, const std::optional<Tensor>& log_scale, bool relu) {
  check("bias_relu", x, bias, log_scale);
  OutputBuffer y(x);
  for_accumulator(x, [&](auto acc) {
    write_output<decltype(acc)>(with_position_stride(x), bias, log_scale, relu, y.kernel_output());
  });
  return y.finalize();
}

void bias_relu_(Tensor x, const Tensor& bias, const std::optional<Tensor>& log_scale, bool relu) {
  check("bias_relu_", x, bias, log_scale);
  const Tensor out = with_position_stride(x);
  for_accumulator(x, [&](auto acc) { write_output<decltype(acc)>(out, bias, log_scale, relu, out); });
  if (out.get() != x.get()) torch::stable::copy_(x, out);
}

std::tuple<Tensor, Tensor, Tensor> bias_relu_backward(const Tensor& y, const Tensor& dy,
                                                      const std::optional<Tensor>& log_scale, bool relu) {
  expect_batch("bias_relu_backward", "y", y);
  expect_floating("bias_relu_backward", "dy", dy, y.sizes());
  if (log_scale) expect_floating("bias_relu_backward", "log_scale", *log_scale, {y.size(1)});
  OutputBuffer dx(dy);
  const Tensor dbias = empty(y, {y.size(1)}, accumulator_of(y)),
               dlog_scale = empty(y, {log_scale ? y.size(1) : 0}, accumulator_of(y));
  for_accumulator(y, [&](auto acc) {
    write_gradients<decltype(acc)>(with_position_stride(y), with_position_stride(dy), log_scale, relu,
                                   dx.kernel_output(), dbias, dlog_scale);
  });
  return {dx.finalize(), dbias, dlog_scale};
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("bias_relu", TORCH_BOX(&fastflow::cpu::bias_relu));
  m.impl("bias_relu_", TORCH_BOX(&fastflow::cpu::bias_relu_));
  m.impl("bias_relu_backward", TORCH_BOX(&fastflow::cpu::bias_relu_backward));
}
