// fastflow_C::actnorm, its backward, its inverse + backward and its statistics on the CPU, tile by tile
// (tiles.h).
//
// Bytes per element of x, float32: forward and inverse 8, backward 12 (x, dy, dx), inverse + backward 16 (y,
// dy, x, dx), statistics 4. The log-det is the same for every sample and is computed from the parameters.
#include "stable.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "checks.h"
#include "cpu/simd_math.h"
#include "cpu/tensors.h"
#include "cpu/tiles.h"

namespace fastflow::cpu {
namespace {

constexpr int64_t GRAIN = 32;  // minimum number of tiles per thread: starting a thread costs about 10 us

// y = scale (x + bias), scale = e^log_scale; inverse y = scale x - bias, scale = e^-log_scale.
template <typename T>
struct Scaling {
  VectorLoop lines;
  bool inverse;
  const T* x;
  OperandView<T> scale, bias;
  T* y;
};

// Gradients from the direction's input x. With `x_out`, x is the output of the forward direction, and its
// input is written to x_out; `back` is the scale of the inverse.
template <typename T>
struct ScalingBackward {
  VectorLoop lines;
  bool inverse;
  const T *x, *dy;
  OperandView<T> scale, bias, back;
  T *dx, *dlog_scale, *x_out;  // dlog_scale: the contribution of each element
};

template <bool INVERSE, int BYTES, typename T>
FASTFLOW_INLINE void scaled(const Scaling<T> s) {
  using M = SimdMath<T, BYTES>;
  int64_t i = 0;
  for (int64_t l = 0; l < s.lines.count; ++l)
    for (const int64_t end = (l + 1) * s.lines.length; i < end; i += M::COUNT) {
      const typename M::V x = M::load(s.x + i), scale = at<M>(s.scale, l, i), bias = at<M>(s.bias, l, i);
      M::store(s.y + i, INVERSE ? x * scale - bias : (x + bias) * scale);
    }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void scale_simd(const Scaling<T>& s) {
  s.inverse ? scaled<true, BYTES, T>(s) : scaled<false, BYTES, T>(s);
}

template <bool FROM_OUTPUT, int BYTES, typename T>
FASTFLOW_INLINE void gradients_simd(const ScalingBackward<T> s) {
  using M = SimdMath<T, BYTES>;
  int64_t i = 0;
  for (int64_t l = 0; l < s.lines.count; ++l)
    for (const int64_t end = (l + 1) * s.lines.length; i < end; i += M::COUNT) {
      const typename M::V dx = M::load(s.dy + i) * at<M>(s.scale, l, i);
      typename M::V x = M::load(s.x + i);  // becomes the factor of the scale
      if (FROM_OUTPUT) {
        x *= at<M>(s.back, l, i);
        M::store(s.x_out + i, x - at<M>(s.bias, l, i));
      } else if (!s.inverse) {
        x += at<M>(s.bias, l, i);
      }
      M::store(s.dx + i, dx);
      M::store(s.dlog_scale + i, dx * x);
    }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void scale_backward_simd(const ScalingBackward<T>& s) {
  s.x_out ? gradients_simd<true, BYTES, T>(s) : gradients_simd<false, BYTES, T>(s);
}

FASTFLOW_MULTIVERSION(scale, Scaling<float>, scale_simd)
FASTFLOW_MULTIVERSION(scale, Scaling<double>, scale_simd)
FASTFLOW_MULTIVERSION(scale_backward, ScalingBackward<float>, scale_backward_simd)
FASTFLOW_MULTIVERSION(scale_backward, ScalingBackward<double>, scale_backward_simd)

// The parameters per channel.
template <typename acc>
struct Parameters {
  Buffer<acc> log_scale, bias, scale, back;  // back: the scale of the other direction

  Parameters(const Tensor& log_scale_, const Tensor& bias_, bool inverse)
      : log_scale(values_of<acc>(log_scale_)),
        bias(values_of<acc>(bias_)),
        scale(bias_.numel()),
        back(bias_.numel()) {
    for (int64_t k = 0; k < bias_.numel(); ++k) {
      const acc s = log_scale.get()[k];
      scale.get()[k] = std::exp(inverse ? -s : s), back.get()[k] = std::exp(inverse ? s : -s);
    }
  }
};

int64_t positions_of_sample(const Grid& grid) { return grid.vectors ? 1 : grid.positions; }

template <typename acc>
void forward(const Tensor& x_, const Tensor& log_scale, const Tensor& bias_, bool inverse, const Grid& grid,
             const Tensor& y_, const Tensor& log_det) {
  const Channels x(x_, 0, 1, grid), y(y_, 0, 1, grid);
  const Parameters<acc> parameters(log_scale, bias_, inverse);
  torch::stable::parallel_for(0, grid.tiles(), GRAIN, [&](int64_t begin, int64_t end) {
    Buffers<acc> buffers(4, grid);
    const Operand<acc> v(x, buffers), out(y, buffers);
    PerChannel<acc> factor(parameters.scale.get(), grid, buffers), bias(parameters.bias.get(), grid, buffers);
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = grid[i];
      scale(Scaling<acc>{{grid, tile}, inverse, v.load(tile), factor(tile), bias(tile), out.output(tile)});
      out.store(tile);
    }
  });
  double sum = 0;
  add_lines({1, grid.channels, parameters.log_scale.get(), &sum});
  sum *= positions_of_sample(grid);
  std::fill_n(log_det.mutable_data_ptr<acc>(), log_det.numel(), static_cast<acc>(inverse ? -sum : sum));
}

// With `x_out_`, x_ is the output of the forward direction and x_out_ receives its input. `gradients`
// receives dlog_scale and dbias.
template <typename acc>
void backward(const Tensor& x_, const Tensor& log_scale, const Tensor& bias_, const Tensor& dy_,
              const Tensor& dlog_det_, bool inverse, const Grid& grid, const std::optional<Tensor>& x_out_,
              const Tensor& dx_, double* gradients) {
  const Channels x(x_, 0, 1, grid), dy(dy_, 0, 1, grid), dx(dx_, 0, 1, grid),
      x_out(x_out_ ? *x_out_ : x_, 0, 1, grid);
  const Parameters<acc> parameters(log_scale, bias_, inverse);
  const Slots slots(grid);
  const Buffer<double> sums(std::max<int64_t>(1, slots.count) * 2 * grid.channels);
  std::fill_n(sums.get(), 2 * grid.channels, 0.);
  torch::stable::parallel_for(0, slots.count, slots.grain(GRAIN), [&](int64_t begin, int64_t end) {
    Buffers<acc> buffers(8, grid);
    const Operand<acc> v(x, buffers), g(dy, buffers), dv(dx, buffers), input(x_out, buffers);
    PerChannel<acc> factor(parameters.scale.get(), grid, buffers), bias(parameters.bias.get(), grid, buffers);
    PerChannel<acc> back(parameters.back.get(), grid, buffers);
    acc* dlog_scale = buffers.next();
    ChannelSums<acc> sums_of_dlog_scale(grid), sums_of_dy(grid);
    for (int64_t slot = begin; slot < end; ++slot) {
      sums_of_dlog_scale.clear();
      sums_of_dy.clear();
      for (int64_t i = slots.first(slot); i < slots.first(slot + 1); ++i) {
        const Tile tile = grid[i];
        const acc* dout = g.load(tile);
        scale_backward(ScalingBackward<acc>{{grid, tile},
                                            inverse,
                                            v.load(tile),
                                            dout,
                                            factor(tile),
                                            bias(tile),
                                            back(tile),
                                            dv.output(tile),
                                            dlog_scale,
                                            x_out_ ? input.output(tile) : nullptr});
        dv.store(tile);
        if (x_out_) input.store(tile);
        sums_of_dlog_scale.add(dlog_scale, tile);
        sums_of_dy.add(dout, tile);
      }
      sums_of_dlog_scale.take(sums.get() + slot * 2 * grid.channels);
      sums_of_dy.take(sums.get() + (slot * 2 + 1) * grid.channels);
    }
  });
  add_slots(sums.get(), slots.count, 2 * grid.channels);
  double dlog_det = 0;
  add_lines({1, dlog_det_.numel(), values_of<acc>(dlog_det_).get(), &dlog_det});
  dlog_det *= positions_of_sample(grid);
  for (int64_t k = 0; k < grid.channels; ++k) {
    const double dlog_scale = sums.get()[k] + dlog_det, sum_of_dy = sums.get()[grid.channels + k];
    gradients[k] = inverse ? -dlog_scale : dlog_scale;
    gradients[grid.channels + k] = inverse ? -sum_of_dy : sum_of_dy * parameters.scale.get()[k];
  }
}

// The count, the mean and the sum of squared deviations of each channel over the tiles of a slot. Deviations
// are taken from the channel's first value in the slot, because a sum of squares loses all digits of a
// variance that is small compared with the mean.
template <typename T>
class Moments {
 public:
  explicit Moments(const Grid& grid)
      : grid_(grid),
        size_(grid.rows ? grid.lines_per_tile * grid.length : grid.channels),
        counts_(grid.channels),
        pivots_(size_),
        sums_(size_),
        squares_(size_) {}
  void clear() {
    std::fill_n(counts_.get(), grid_.channels, 0);
    for (const auto* v : {&sums_, &squares_}) std::fill_n(v->get(), size_, 0.);
  }
  void add(const T* values, const Tile& t) {
    if (grid_.rows) {  // one sum per element of a tile, as in ChannelSums
      if (!counts_.get()[0])
        for (int64_t i = 0; i < size_; ++i) pivots_.get()[i] = pivot(values[i % grid_.channels]);
      for (int64_t k = 0; k < grid_.channels; ++k) counts_.get()[k] += t.lines;
      add_deviations_of_each({t.lines, t.length, values, pivots_.get(), sums_.get(), squares_.get()});
      return;
    }
    for (int64_t l = 0, k = t.line; l < t.lines; ++l, ++k) {
      if (!counts_.get()[k]) pivots_.get()[k] = pivot(values[l * t.length]);
      counts_.get()[k] += t.length;
    }
    add_deviations_of_lines(
        {t.lines, t.length, values, pivots_.get() + t.line, sums_.get() + t.line, squares_.get() + t.line});
  }
  // Writes count, mean and squares to [3, channels].
  void take(double* to) const {
    for (int64_t k = 0; k < grid_.channels; ++k) {
      const double count = counts_.get()[k];
      double sum = 0, square = 0;
      for (int64_t i = k; i < size_; i += grid_.channels) sum += sums_.get()[i], square += squares_.get()[i];
      to[k] = count;
      to[grid_.channels + k] = count ? pivots_.get()[k] + sum / count : 0;
      to[2 * grid_.channels + k] = count ? square - sum * sum / count : 0;
    }
  }

 private:
  static double pivot(double value) { return std::isfinite(value) ? value : 0; }

  const Grid& grid_;
  const int64_t size_;
  const Buffer<int64_t> counts_;
  const Buffer<double> pivots_, sums_, squares_;
};

// Mean and variance of each channel.
template <typename acc>
void statistics(const Tensor& x_, const Grid& grid, double* mean, double* var) {
  const Channels x(x_, 0, 1, grid);
  const Slots slots(grid);
  const Buffer<double> moments(slots.count * 3 * grid.channels);
  torch::stable::parallel_for(0, slots.count, slots.grain(GRAIN), [&](int64_t begin, int64_t end) {
    Buffers<acc> buffers(1, grid);
    const Operand<acc> v(x, buffers);
    Moments<acc> of_slot(grid);
    for (int64_t slot = begin; slot < end; ++slot) {
      of_slot.clear();
      for (int64_t i = slots.first(slot); i < slots.first(slot + 1); ++i)
        of_slot.add(v.load(grid[i]), grid[i]);
      of_slot.take(moments.get() + slot * 3 * grid.channels);
    }
  });
  const double count = static_cast<double>(grid.samples) * grid.positions;
  for (int64_t k = 0; k < grid.channels; ++k) {
    const auto of_slot = [&](int64_t slot, int64_t kind) {
      return moments.get()[(slot * 3 + kind) * grid.channels + k];
    };
    double sum = 0, squares = 0;
    for (int64_t slot = 0; slot < slots.count; ++slot) sum += of_slot(slot, 0) * of_slot(slot, 1);
    mean[k] = sum / count;
    for (int64_t slot = 0; slot < slots.count; ++slot) {
      const double deviation = of_slot(slot, 1) - mean[k];
      squares += of_slot(slot, 2) + of_slot(slot, 0) * deviation * deviation;
    }
    var[k] = squares < 0 ? 0 : squares / count;
  }
}

void check(const char* op, const char* name, const Tensor& x, const Tensor& log_scale, const Tensor& bias) {
  expect_batch(op, name, x);
  expect_floating(op, "log_scale", log_scale, {x.size(1)});
  expect_floating(op, "bias", bias, {x.size(1)});
}

std::tuple<Tensor, Tensor> actnorm(const Tensor& x, const Tensor& log_scale, const Tensor& bias,
                                   bool inverse) {
  check("actnorm", "x", x, log_scale, bias);
  OutputBuffer y(x);
  const Tensor log_det = empty(x, {x.size(0)}, accumulator_of(x));
  const Grid grid(x, x.size(1), y.kernel_output());
  for_accumulator(x, [&](auto acc) {
    forward<decltype(acc)>(with_position_stride(x), log_scale, bias, inverse, grid, y.kernel_output(),
                           log_det);
  });
  return {y.finalize(), log_det};
}

void write_as(const Tensor& v, const double* from) {
  for_dtype(v.scalar_type(), [&](auto value) { write<decltype(value)>(v, from); });
}

// Returns x (with `from_output`; otherwise `source`), dx, dlog_scale and dbias.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_of(const Tensor& source, const Tensor& log_scale,
                                                       const Tensor& bias, const Tensor& dy,
                                                       const Tensor& dlog_det, bool inverse,
                                                       bool from_output) {
  OutputBuffer dx(dy);
  std::optional<OutputBuffer> x;
  if (from_output) x.emplace(source);
  const Grid grid(source, source.size(1), dx.kernel_output());
  const Buffer<double> gradients(2 * grid.channels);
  for_accumulator(source, [&](auto acc) {
    backward<decltype(acc)>(with_position_stride(source), log_scale, bias, with_position_stride(dy), dlog_det,
                            inverse, grid, x ? std::optional(x->kernel_output()) : std::nullopt,
                            dx.kernel_output(), gradients.get());
  });
  const Tensor dlog_scale = empty(log_scale, {grid.channels}), dbias = empty(bias, {grid.channels});
  write_as(dlog_scale, gradients.get());
  write_as(dbias, gradients.get() + grid.channels);
  return {x ? x->finalize() : source, dx.finalize(), dlog_scale, dbias};
}

std::tuple<Tensor, Tensor, Tensor> actnorm_backward(const Tensor& x, const Tensor& log_scale,
                                                    const Tensor& bias, const Tensor& dy,
                                                    const Tensor& dlog_det, bool inverse) {
  check("actnorm_backward", "x", x, log_scale, bias);
  expect_gradients("actnorm_backward", x, dy, dlog_det);
  auto [same, dx, dlog_scale, dbias] = backward_of(x, log_scale, bias, dy, dlog_det, inverse, false);
  return {dx, dlog_scale, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> actnorm_inverse_backward(const Tensor& y, const Tensor& log_scale,
                                                                    const Tensor& bias, const Tensor& dy,
                                                                    const Tensor& dlog_det) {
  check("actnorm_inverse_backward", "y", y, log_scale, bias);
  expect_gradients("actnorm_inverse_backward", y, dy, dlog_det);
  return backward_of(y, log_scale, bias, dy, dlog_det, false, true);
}

std::tuple<Tensor, Tensor> actnorm_statistics(const Tensor& x_) {
  expect_batch("actnorm_statistics", "x", x_);
  const Tensor x = with_position_stride(x_);
  const Grid grid(x, x.size(1), x);
  const Buffer<double> both(2 * grid.channels);
  for_accumulator(
      x, [&](auto acc) { statistics<decltype(acc)>(x, grid, both.get(), both.get() + grid.channels); });
  const Tensor mean = empty(x, {grid.channels}, accumulator_of(x)),
               var = empty(x, {grid.channels}, accumulator_of(x));
  write_as(mean, both.get());
  write_as(var, both.get() + grid.channels);
  return {mean, var};
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("actnorm", TORCH_BOX(&fastflow::cpu::actnorm));
  m.impl("actnorm_backward", TORCH_BOX(&fastflow::cpu::actnorm_backward));
  m.impl("actnorm_inverse_backward", TORCH_BOX(&fastflow::cpu::actnorm_inverse_backward));
  m.impl("actnorm_statistics", TORCH_BOX(&fastflow::cpu::actnorm_statistics));
}
