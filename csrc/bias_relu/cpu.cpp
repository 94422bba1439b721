// fastflow_C::bias_relu, the same in place, and their backward on the CPU, tile by tile (tiles.h).
//
// Bytes per element of x, float32: forward 8, backward 12 (y, dy, dx).
#include "stable.h"

#include <algorithm>
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
  const T* x;
  OperandView<T> bias;
  T* y;
};

template <typename T>
struct Backward {
  int64_t count;
  const T *y, *dy;
  T* dx;
};

template <int BYTES, typename T>
FASTFLOW_INLINE void forward_simd(const Forward<T>& given) {
  const Forward<T> f = given;  // a copy: the compiler assumes that a store may change `given`
  using M = Simd<T, BYTES>;
  int64_t i = 0;
  for (int64_t l = 0; l < f.lines.count; ++l)
    for (const int64_t end = (l + 1) * f.lines.length; i < end; i += M::COUNT)
      M::store(f.y + i, M::max(M::load(f.x + i) + at<M>(f.bias, l, i), T(0)));
}

template <int BYTES, typename T>
FASTFLOW_INLINE void backward_simd(const Backward<T>& given) {
  const Backward<T> b = given;
  using M = Simd<T, BYTES>;
  for (int64_t i = 0; i < b.count; i += M::COUNT) {
    const typename M::V dy = M::load(b.dy + i);
    M::store(b.dx + i, M::load(b.y + i) <= T(0) ? typename M::V{} : dy);
  }
}

FASTFLOW_MULTIVERSION(forward, Forward<float>, forward_simd)
FASTFLOW_MULTIVERSION(forward, Forward<double>, forward_simd)
FASTFLOW_MULTIVERSION(backward, Backward<float>, backward_simd)
FASTFLOW_MULTIVERSION(backward, Backward<double>, backward_simd)

// y_ may be x_.
template <typename acc>
void write_output(const Tensor& x_, const Tensor& bias_, const Tensor& y_) {
  const Grid grid(x_, x_.size(1), y_, ELEMENTS);
  const Channels x(x_, 0, 1, grid), y(y_, 0, 1, grid);
  const Buffer<acc> biases = values_of<acc>(bias_);
  torch::stable::parallel_for(0, grid.tiles(), GRAIN, [&](int64_t begin, int64_t end) {
    Buffers<acc> buffers(3, grid);
    const Operand<acc> in(x, buffers), out(y, buffers);
    PerChannel<acc> bias(biases.get(), grid, buffers);
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = grid[i];
      forward(Forward<acc>{{grid, tile}, in.load(tile), bias(tile), out.output(tile)});
      out.store(tile);
    }
  });
}

template <typename acc>
void write_gradients(const Tensor& y_, const Tensor& dy_, const Tensor& dx_, const Tensor& dbias) {
  const Grid grid(y_, y_.size(1), dx_, ELEMENTS);
  const Channels y(y_, 0, 1, grid), dy(dy_, 0, 1, grid), dx(dx_, 0, 1, grid);
  const Slots slots(grid);
  const Buffer<double> sums(std::max<int64_t>(1, slots.count) * grid.channels);
  std::fill_n(sums.get(), grid.channels, 0.);
  torch::stable::parallel_for(0, slots.count, slots.grain(GRAIN), [&](int64_t begin, int64_t end) {
    Buffers<acc> buffers(3, grid);
    const Operand<acc> out(y, buffers), given(dy, buffers), found(dx, buffers);
    ChannelSums<acc> sums_of_dx(grid);
    for (int64_t slot = begin; slot < end; ++slot) {
      sums_of_dx.clear();
      for (int64_t i = slots.first(slot); i < slots.first(slot + 1); ++i) {
        const Tile tile = grid[i];
        acc* const masked = found.output(tile);
        backward(Backward<acc>{tile.count(), out.load(tile), given.load(tile), masked});
        found.store(tile);
        sums_of_dx.add(masked, tile);
      }
      sums_of_dx.take(sums.get() + slot * grid.channels);
    }
  });
  add_slots(sums.get(), slots.count, grid.channels);
  write<acc>(dbias, sums.get());
}

void check(const char* op, const Tensor& x, const Tensor& bias) {
  expect_batch(op, "x", x);
  expect_floating(op, "bias", bias, {x.size(1)});
}

Tensor bias_relu(const Tensor& x, const Tensor& bias) {
  check("bias_relu", x, bias);
  OutputBuffer y(x);
  for_accumulator(
      x, [&](auto acc) { write_output<decltype(acc)>(with_position_stride(x), bias, y.kernel_output()); });
  return y.finalize();
}

void bias_relu_(Tensor x, const Tensor& bias) {
  check("bias_relu_", x, bias);
  const Tensor out = with_position_stride(x);
  for_accumulator(x, [&](auto acc) { write_output<decltype(acc)>(out, bias, out); });
  if (out.get() != x.get()) torch::stable::copy_(x, out);
}

std::tuple<Tensor, Tensor> bias_relu_backward(const Tensor& y, const Tensor& dy) {
  expect_batch("bias_relu_backward", "y", y);
  expect_floating("bias_relu_backward", "dy", dy, y.sizes());
  OutputBuffer dx(dy);
  const Tensor dbias = empty(y, {y.size(1)}, accumulator_of(y));
  for_accumulator(y, [&](auto acc) {
    write_gradients<decltype(acc)>(with_position_stride(y), with_position_stride(dy), dx.kernel_output(),
                                   dbias);
  });
  return {dx.finalize(), dbias};
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("bias_relu", TORCH_BOX(&fastflow::cpu::bias_relu));
  m.impl("bias_relu_", TORCH_BOX(&fastflow::cpu::bias_relu_));
  m.impl("bias_relu_backward", TORCH_BOX(&fastflow::cpu::bias_relu_backward));
}
