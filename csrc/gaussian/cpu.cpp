// fastflow_C::gaussian_log_prob and its backward on the CPU, tile by tile (tiles.h).
//
// Bytes per element of z, float32: log-density 4, with a mean and a log scale per element 12; backward 8 (z,
// dz) and 24.
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
constexpr double LOG_2PI = 1.8378770664093454836;

// Operands of e = (z - mean) / scale: the reciprocal scale per channel, or the log scale per element.
template <typename T>
struct Density {
  VectorLoop lines;
  const T* z;
  OperandView<T> mean, reciprocal, log_scale;
  bool standard() const { return !mean.data && !reciprocal.data && !log_scale.data; }
};

// Writes e^2 + 2 log scale of each element.
template <typename T>
struct DensityTerms : Density<T> {
  T* terms;
};

template <typename T>
struct DensitySum : Density<T> {  // the sum of these terms
  double* sum;
};

template <typename T>
struct DensityBackward : Density<T> {
  OperandView<T> dlog_prob;
  T *dz, *dmean, *dlog_scale;  // dmean and dlog_scale may be null
};

// e, and the reciprocal of the scale.
template <bool STANDARD, typename M, typename T, typename V = typename M::V>
FASTFLOW_INLINE V standardized(const Density<T>& d, int64_t l, int64_t i, V& reciprocal) {
  V e = M::load(d.z + i);
  reciprocal = M::all(1);
  if (STANDARD) return e;
  if (d.mean.data) e = e - at<M>(d.mean, l, i);
  if (d.log_scale.data) reciprocal = M::exp(-at<M>(d.log_scale, l, i));
  if (d.reciprocal.data) reciprocal = at<M>(d.reciprocal, l, i);
  return e * reciprocal;
}

template <bool STANDARD, typename M, typename T, typename V = typename M::V>
FASTFLOW_INLINE V term(const Density<T>& d, int64_t l, int64_t i) {
  V reciprocal;
  const V e = standardized<STANDARD, M>(d, l, i, reciprocal);
  return STANDARD || !d.log_scale.data ? e * e : e * e + 2 * at<M>(d.log_scale, l, i);
}

template <int BYTES, typename T>
FASTFLOW_INLINE void density_terms_simd(const DensityTerms<T>& given) {
  const DensityTerms<T> d = given;  // a copy: the compiler assumes that a store may change `given`
  using M = SimdMath<T, BYTES>;
  int64_t i = 0;
  for (int64_t l = 0; l < d.lines.count; ++l)
    for (const int64_t end = (l + 1) * d.lines.length; i < end; i += M::COUNT)
      M::store(d.terms + i, term<false, M>(d, l, i));
}

template <bool STANDARD, int BYTES, typename T>
FASTFLOW_INLINE double sum_of_density(const Density<T>& d) {
  using M = SimdMath<T, BYTES>;
  constexpr int64_t C = M::COUNT, PARTS = STANDARD ? 4 : 1;
  const int64_t lines = STANDARD ? 1 : d.lines.count, length = d.lines.count * d.lines.length / lines;
  typename M::V parts[PARTS] = {};  // several, so that additions do not wait for each other
  double total = 0;
  int64_t i = 0;
  for (int64_t l = 0; l < lines; ++l) {
    const int64_t end = (l + 1) * length;
    for (; i + PARTS * C <= end; i += PARTS * C)
      for (int64_t j = 0; j < PARTS; ++j) parts[j] += term<STANDARD, M>(d, l, i + j * C);
    for (; i + C <= end; i += C) parts[0] += term<STANDARD, M>(d, l, i);
    if (i == end) continue;
    const typename M::V rest = term<STANDARD, M>(d, l, i);  // the last, incomplete vector
    for (int64_t j = 0; i < end; ++i, ++j) total += rest[j];
  }
  for (int64_t j = 1; j < PARTS; ++j) parts[0] += parts[j];
  for (int64_t j = 0; j < C; ++j) total += parts[0][j];
  return total;
}

template <int BYTES, typename T>
FASTFLOW_INLINE void density_sum_simd(const DensitySum<T>& d) {
  *d.sum = d.standard() ? sum_of_density<true, BYTES, T>(d) : sum_of_density<false, BYTES, T>(d);
}

template <bool STANDARD, int BYTES, typename T>
FASTFLOW_INLINE void gradients_simd(const DensityBackward<T> d) {
  using M = SimdMath<T, BYTES>;
  int64_t i = 0;
  for (int64_t l = 0; l < d.lines.count; ++l)
    for (const int64_t end = (l + 1) * d.lines.length; i < end; i += M::COUNT) {
      typename M::V reciprocal;
      const typename M::V e = standardized<STANDARD, M>(d, l, i, reciprocal), g = at<M>(d.dlog_prob, l, i),
                          dmean = g * e * reciprocal;
      M::store(d.dz + i, -dmean);
      if (STANDARD) continue;
      if (d.dmean) M::store(d.dmean + i, dmean);
      if (d.dlog_scale) M::store(d.dlog_scale + i, g * (e * e - 1));
    }
}

template <int BYTES, typename T>
FASTFLOW_INLINE void density_backward_simd(const DensityBackward<T>& d) {
  d.standard() ? gradients_simd<true, BYTES, T>(d) : gradients_simd<false, BYTES, T>(d);
}

FASTFLOW_MULTIVERSION(density_terms, DensityTerms<float>, density_terms_simd)
FASTFLOW_MULTIVERSION(density_terms, DensityTerms<double>, density_terms_simd)
FASTFLOW_MULTIVERSION(density_sum, DensitySum<float>, density_sum_simd)
FASTFLOW_MULTIVERSION(density_sum, DensitySum<double>, density_sum_simd)
FASTFLOW_MULTIVERSION(density_backward, DensityBackward<float>, density_backward_simd)
FASTFLOW_MULTIVERSION(density_backward, DensityBackward<double>, density_backward_simd)

// A mean or log scale: absent, per channel, or per element.
template <typename acc>
struct Parameter {
  std::optional<Buffer<acc>> channel;
  std::optional<Channels> each;

  Parameter(const std::optional<Tensor>& v, const Grid& grid) {
    if (v && v->dim() == 1) channel.emplace(values_of<acc>(*v));
    else if (v) each.emplace(*v, 0, 1, grid);
  }
};

template <typename acc>
struct Parameters {
  Parameter<acc> mean, log_scale;  // a log scale per channel is replaced by e^-s
  double sum_of_channels = 0;      // of the log scale

  Parameters(const std::optional<Tensor>& mean_, const std::optional<Tensor>& log_scale_, const Grid& grid)
      : mean(mean_, grid), log_scale(log_scale_, grid) {
    if (!log_scale.channel) return;
    acc* s = log_scale.channel->get();
    for (int64_t k = 0; k < grid.channels; ++k) sum_of_channels += s[k], s[k] = std::exp(-s[k]);
  }
};

// A mean or log scale as operands of a tile.
template <typename acc>
class TileParameter {
 public:
  TileParameter(const Parameter<acc>& parameter, const Grid& grid, Buffers<acc>& buffers)
      : channel_(pointer(parameter.channel), grid, buffers) {
    if (parameter.each) each_.emplace(*parameter.each, buffers);
  }
  OperandView<acc> channel(const Tile& t) { return channel_(t); }
  OperandView<acc> each(const Tile& t) const {
    return each_ ? OperandView<acc>{each_->load(t), true, 0} : OperandView<acc>{};
  }
  OperandView<acc> operator()(const Tile& t) { return each_ ? each(t) : channel(t); }

 private:
  PerChannel<acc> channel_;
  std::optional<Operand<acc>> each_;
};

template <typename acc>
void log_prob_of(const Tensor& z_, const std::optional<Tensor>& mean_,
                 const std::optional<Tensor>& log_scale_, const Grid& grid, const Tensor& log_prob) {
  const Channels z(z_, 0, 1, grid);
  const Parameters<acc> parameters(mean_, log_scale_, grid);
  const double positions = grid.vectors ? 1 : grid.positions,
               rest = positions * (grid.channels * LOG_2PI / 2 + parameters.sum_of_channels);
  const auto from_sum = [&](double sum) { return static_cast<acc>(-sum / 2 - rest); };
  const int64_t tiles = grid.tiles();
  const Buffer<double> sums(grid.vectors ? 0 : tiles);
  acc* log_prob_ptr = log_prob.mutable_data_ptr<acc>();
  torch::stable::parallel_for(0, tiles, GRAIN, [&](int64_t begin, int64_t end) {
    Buffers<acc> buffers(6, grid);
    const Operand<acc> v(z, buffers);
    TileParameter<acc> mean(parameters.mean, grid, buffers), log_scale(parameters.log_scale, grid, buffers);
    acc* of_elements = buffers.next();
    const Buffer<double> of_lines(grid.lines_per_tile);
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = grid[i];
      const Density<acc> d{
          {grid, tile}, v.load(tile), mean(tile), log_scale.channel(tile), log_scale.each(tile)};
      if (!grid.vectors) {
        density_sum(DensitySum<acc>{d, sums.get() + i});
        continue;
      }
      density_terms(DensityTerms<acc>{d, of_elements});
      std::fill_n(of_lines.get(), tile.lines, 0.);
      add_lines({tile.lines, tile.length, of_elements, of_lines.get()});
      std::transform(of_lines.get(), of_lines.get() + tile.lines, log_prob_ptr + tile.line, from_sum);
    }
  });
  if (grid.vectors && tiles) return;
  for (int64_t n = 0, each = grid.tiles_of_sample(); n < log_prob.numel(); ++n) {
    double sum = 0;
    add_lines({1, each, sums.get() + n * each, &sum});
    log_prob_ptr[n] = from_sum(sum);
  }
}

// The gradient of a mean or log scale: written per element, or summed per channel.
template <typename acc>
class TileGradient {
 public:
  TileGradient(const Parameter<acc>& parameter, const std::optional<Channels>& each, const Grid& grid,
               Buffers<acc>& buffers)
      : channels_(grid.channels) {
    if (each) each_.emplace(*each, buffers);
    if (parameter.channel) sums_.emplace(grid), of_elements_ = buffers.next();
  }
  acc* output(const Tile& t) const { return each_ ? each_->output(t) : of_elements_; }
  void store(const Tile& t) {
    if (each_) each_->store(t);
    if (sums_) sums_->add(of_elements_, t);
  }
  void clear() {
    if (sums_) sums_->clear();
  }
  void take(double* to) {
    if (sums_) sums_->take(to);
    else std::fill_n(to, channels_, 0.);
  }

 private:
  const int64_t channels_;
  std::optional<Operand<acc>> each_;
  std::optional<ChannelSums<acc>> sums_;
  acc* of_elements_ = nullptr;
};

// The tensor of the gradient of a mean or log scale.
class Gradient {
 public:
  Gradient(const Tensor& z, const std::optional<Tensor>& parameter) {
    if (parameter && parameter->dim() > 1) each_.emplace(*parameter);
    else channel_ = parameter ? empty(*parameter, {parameter->size(0)}) : empty(z, {0});
  }
  std::optional<Channels> each(const Grid& grid) const {
    return each_ ? std::optional(Channels(each_->kernel_output(), 0, 1, grid)) : std::nullopt;
  }
  Tensor finalize(const double* sums) {
    if (each_) return each_->finalize();
    for_dtype(channel_.scalar_type(), [&](auto value) { write<decltype(value)>(channel_, sums); });
    return channel_;
  }

 private:
  std::optional<OutputBuffer> each_;
  Tensor channel_;
};

// `sums`: [slots, 2, channels]; the first slot receives the gradients per channel.
template <typename acc>
void backward_of(const Tensor& z_, const std::optional<Tensor>& mean_,
                 const std::optional<Tensor>& log_scale_, const Tensor& dlog_prob_, const Grid& grid,
                 const Slots& slots, const Tensor& dz_, const Gradient& dmean_, const Gradient& dlog_scale_,
                 double* sums) {
  const Channels z(z_, 0, 1, grid), dz(dz_, 0, 1, grid);
  const Parameters<acc> parameters(mean_, log_scale_, grid);
  const std::optional<Channels> each_mean = dmean_.each(grid), each_log_scale = dlog_scale_.each(grid);
  const Buffer<acc> dlog_prob = values_of<acc>(dlog_prob_);
  torch::stable::parallel_for(0, slots.count, slots.grain(GRAIN), [&](int64_t begin, int64_t end) {
    Buffers<acc> buffers(9, grid);
    const Operand<acc> v(z, buffers), dv(dz, buffers);
    TileParameter<acc> mean(parameters.mean, grid, buffers), log_scale(parameters.log_scale, grid, buffers);
    TileGradient<acc> dmean(parameters.mean, each_mean, grid, buffers),
        dlog_scale(parameters.log_scale, each_log_scale, grid, buffers);
    PerSample<acc> g(dlog_prob.get(), grid, buffers);
    for (int64_t slot = begin; slot < end; ++slot) {
      dmean.clear();
      dlog_scale.clear();
      for (int64_t i = slots.first(slot); i < slots.first(slot + 1); ++i) {
        const Tile tile = grid[i];
        density_backward(DensityBackward<acc>{
            {{grid, tile}, v.load(tile), mean(tile), log_scale.channel(tile), log_scale.each(tile)},
            g(tile),
            dv.output(tile),
            dmean.output(tile),
            dlog_scale.output(tile)});
        dv.store(tile);
        dmean.store(tile);
        dlog_scale.store(tile);
      }
      dmean.take(sums + slot * 2 * grid.channels);
      dlog_scale.take(sums + (slot * 2 + 1) * grid.channels);
    }
  });
  add_slots(sums, slots.count, 2 * grid.channels);
}

std::optional<Tensor> with_position_stride(const std::optional<Tensor>& parameter) {
  return parameter && parameter->dim() > 1 ? std::optional(fastflow::with_position_stride(*parameter))
                                           : parameter;
}

void check(const char* op, const Tensor& z, const std::optional<Tensor>& mean,
           const std::optional<Tensor>& log_scale) {
  expect_batch(op, "z", z);
  const auto check_parameter = [&](const char* name, const std::optional<Tensor>& v) {
    if (v)
      v->dim() == 1 ? expect_floating(op, name, *v, {z.size(1)}) : expect_floating(op, name, *v, z.sizes());
  };
  check_parameter("mean", mean);
  check_parameter("log_scale", log_scale);
}

Tensor gaussian_log_prob(const Tensor& z_, const std::optional<Tensor>& mean,
                         const std::optional<Tensor>& log_scale) {
  check("gaussian_log_prob", z_, mean, log_scale);
  const Tensor z = fastflow::with_position_stride(z_), log_prob = empty(z, {z.size(0)}, accumulator_of(z));
  const Grid grid(z, z.size(1), z);
  for_accumulator(z, [&](auto acc) {
    log_prob_of<decltype(acc)>(z, with_position_stride(mean), with_position_stride(log_scale), grid,
                               log_prob);
  });
  return log_prob;
}

std::tuple<Tensor, Tensor, Tensor> gaussian_log_prob_backward(const Tensor& z,
                                                              const std::optional<Tensor>& mean,
                                                              const std::optional<Tensor>& log_scale,
                                                              const Tensor& dlog_prob) {
  check("gaussian_log_prob_backward", z, mean, log_scale);
  expect_floating("gaussian_log_prob_backward", "dlog_prob", dlog_prob, {z.size(0)});
  OutputBuffer dz(z);
  Gradient dmean(z, mean), dlog_scale(z, log_scale);
  const Grid grid(z, z.size(1), dz.kernel_output());
  const Slots slots(grid);
  const Buffer<double> sums(std::max<int64_t>(1, slots.count) * 2 * grid.channels);
  std::fill_n(sums.get(), 2 * grid.channels, 0.);
  for_accumulator(z, [&](auto acc) {
    backward_of<decltype(acc)>(fastflow::with_position_stride(z), with_position_stride(mean),
                               with_position_stride(log_scale), dlog_prob, grid, slots, dz.kernel_output(),
                               dmean, dlog_scale, sums.get());
  });
  return {dz.finalize(), dmean.finalize(sums.get()), dlog_scale.finalize(sums.get() + grid.channels)};
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("gaussian_log_prob", TORCH_BOX(&fastflow::cpu::gaussian_log_prob));
  m.impl("gaussian_log_prob_backward", TORCH_BOX(&fastflow::cpu::gaussian_log_prob_backward));
}
