// fastflow_C::affine_coupling, its backward and its inverse + backward on the CPU.
//
// Transformed channels and the network's output are processed tile by tile (tiles.h); coupling.h has the
// arithmetic.
#include "stable.h"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "affine_coupling/coupling.h"
#include "checks.h"
#include "cpu/tensors.h"
#include "cpu/tiles.h"

namespace fastflow::cpu {
namespace {

constexpr int64_t GRAIN = 16;  // minimum number of tiles per thread: starting a thread costs about 10 us
constexpr int64_t SLOTS = 32;  // maximum number of partial sums of a factor's gradient

struct Variant {
  bool checkerboard, flip, scale_first, inverse;
  Scale scale;
  int64_t shift_first, raw_first, step;  // channels of h: first of shift and of raw scale, and their step
};

// Copies the channels that pass through, to a tensor of the same dtype.
void pass(const Channels& from, const Channels& to, const Tile& t) {
  for_dtype(from.dtype, [&](auto value) {
    using T = decltype(value);
    copy_lines(to.at<T>(t), to.line, to.step, from.at<T>(t), from.line, from.step, t);
  });
}

// Masks of the positions that a checkerboard transforms; of the channels, for vectors.
template <typename acc>
Buffer<Mask<acc>> active_of(const Tensor& x, const Variant& variant, const Grid& grid) {
  const int64_t first = x.dim() > 2 ? 2 : 1;
  int64_t count = 1;
  for (int64_t d = first; d < x.dim(); ++d) count *= x.size(d);
  Buffer<Mask<acc>> active(std::max(count, grid.vectors ? grid.channels : grid.positions));
  for (int64_t i = 0; i < count; ++i) {
    int64_t parity = 0, rest = i;
    for (int64_t d = x.dim() - 1; d >= first; --d) parity += rest % x.size(d), rest /= x.size(d);
    active.get()[i] = parity % 2 == variant.flip ? -1 : 0;
  }
  if (grid.vectors && x.dim() > 2)
    std::fill_n(active.get(), grid.channels, variant.flip ? 0 : -1);  // the single position is even
  return active;
}

// The transformed channels of a tensor of the shape of x, and those that pass through.
struct CouplingHalves {
  Channels transformed;
  std::optional<Channels> passing;

  CouplingHalves(const Tensor& x, const Variant& variant, const Grid& grid)
      : transformed(x, variant.checkerboard || variant.flip ? 0 : grid.channels, 1, grid) {
    if (!variant.checkerboard) passing.emplace(x, variant.flip ? grid.channels : 0, 1, grid);
  }
};

struct Output {
  Channels shift, raw;

  Output(const Tensor& h, const Variant& variant, const Grid& grid)
      : shift(h, variant.shift_first, variant.step, grid), raw(h, variant.raw_first, variant.step, grid) {}
};

// Operands per channel, position or sample, shared by all tiles.
template <typename acc>
struct SharedOperands {
  std::optional<Buffer<acc>> factor, dlog_det;
  std::optional<Buffer<Mask<acc>>> active;
  const bool active_along_lines;

  SharedOperands(const Tensor& x, const std::optional<Tensor>& factor_, const Variant& variant,
                 const Grid& grid)
      : active_along_lines(grid.vectors || !grid.rows) {
    if (factor_) factor.emplace(values_of<acc>(*factor_));
    if (variant.checkerboard) active.emplace(active_of<acc>(x, variant, grid));
  }
};

template <typename acc>
void forward(const Tensor& x_, const Tensor& h_, const std::optional<Tensor>& factor_, const Variant& variant,
             const Grid& grid, const Tensor& y_, const Tensor& log_det) {
  const CouplingHalves x(x_, variant, grid), y(y_, variant, grid);
  const Output h(h_, variant, grid);
  const SharedOperands<acc> given(x_, factor_, variant, grid);
  const bool additive = variant.scale == Scale::none;
  const int64_t tiles = grid.tiles();
  const Buffer<double> sums(tiles);
  acc* log_det_ptr = log_det.mutable_data_ptr<acc>();
  torch::stable::parallel_for(0, tiles, GRAIN, [&](int64_t begin, int64_t end) {
    Buffers<acc> buffers(6, grid);
    Buffers<Mask<acc>> masks(1, grid);
    const Operand<acc> v(x.transformed, buffers), out(y.transformed, buffers), shift(h.shift, buffers),
        raw(h.raw, buffers);
    BroadcastOperand<acc> factor(pointer(given.factor), grid.rows, buffers);
    BroadcastOperand<Mask<acc>> active(pointer(given.active), given.active_along_lines, masks);
    acc* log_s = buffers.next();
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = grid[i];
      couple({variant.scale, variant.scale_first, variant.inverse, tile.count(), v.load(tile),
              shift.load(tile), additive ? nullptr : raw.load(tile), factor(tile), active(tile),
              out.output(tile), log_s});
      out.store(tile);
      if (x.passing) pass(*x.passing, *y.passing, tile);
      if (additive) continue;
      if (!grid.vectors) sums.get()[i] = sum(log_s, tile.count());
      for (int64_t l = 0; grid.vectors && l < tile.lines; ++l)
        log_det_ptr[tile.line + l] = static_cast<acc>(sum(log_s + l * tile.length, tile.length));
    }
  });
  if (additive || !tiles) std::fill_n(log_det_ptr, log_det.numel(), acc(0));
  else if (!grid.vectors)
    for (int64_t n = 0, each = grid.tiles_of_sample(); n < grid.samples; ++n)
      log_det_ptr[n] = static_cast<acc>(sum(sums.get() + n * each, each));
}

// Adds a tile of the factor's gradient to the sums of its channels.
template <typename acc>
void add(const acc* tile_sums, const Tile& t, const Grid& grid, double* sums) {
  for (int64_t l = 0; l < t.lines; ++l) {
    const acc* line = tile_sums + l * t.length;
    if (!grid.rows) sums[t.line + l] += sum(line, t.length);
    else
      for (int64_t i = 0; i < t.length; ++i) sums[i] += line[i];
  }
}

// With `x_out_`, x_ is the output of the forward direction and x_out_ receives its input.
template <typename acc>
void backward(const Tensor& x_, const Tensor& h_, const std::optional<Tensor>& factor_, const Tensor& dy_,
              const Tensor& dlog_det_, const Variant& variant, const Grid& grid,
              const std::optional<Tensor>& x_out_, const Tensor& dx_, const Tensor& dh_, double* dfactor) {
  const CouplingHalves x(x_, variant, grid), dy(dy_, variant, grid), dx(dx_, variant, grid),
      x_out(x_out_ ? *x_out_ : x_, variant, grid);
  const Output h(h_, variant, grid), dh(dh_, variant, grid);
  SharedOperands<acc> given(x_, factor_, variant, grid);
  given.dlog_det.emplace(values_of<acc>(dlog_det_));
  const bool additive = variant.scale == Scale::none, reads_h = !additive || x_out_;
  // One thread sums the tiles of a slot in order, and the slots are added in order. The slots do not depend
  // on the number of threads.
  const int64_t tiles = grid.tiles(), slots = dfactor ? std::min(SLOTS, tiles) : tiles;
  const Buffer<double> sums(dfactor ? slots * grid.channels : 0);
  torch::stable::parallel_for(
      0, slots, slots ? std::max<int64_t>(1, GRAIN * slots / tiles / 2) : 1, [&](int64_t begin, int64_t end) {
        Buffers<acc> buffers(11, grid);
        Buffers<Mask<acc>> masks(1, grid);
        const Operand<acc> v(x.transformed, buffers), shift(h.shift, buffers), raw(h.raw, buffers),
            dout(dy.transformed, buffers);
        const Operand<acc> back(x_out.transformed, buffers), dv(dx.transformed, buffers),
            dshift(dh.shift, buffers), draw(dh.raw, buffers);
        BroadcastOperand<acc> factor(pointer(given.factor), grid.rows, buffers),
            dlog_det(pointer(given.dlog_det), false, buffers);
        BroadcastOperand<Mask<acc>> active(pointer(given.active), given.active_along_lines, masks);
        acc* factors = dfactor ? buffers.next() : nullptr;
        for (int64_t slot = begin; slot < end; ++slot) {
          double* sum_of_slot = dfactor ? sums.get() + slot * grid.channels : nullptr;
          if (dfactor) std::fill_n(sum_of_slot, grid.channels, 0.);
          for (int64_t i = tiles * slot / slots; i < tiles * (slot + 1) / slots; ++i) {
            const Tile tile = grid[i];
            // one dlog_det per sample is broadcast over a line as long as the tile
            Tile of_sample = tile;
            if (!grid.vectors) of_sample = {0, tile.sample, 0, 1, tile.count()};
            couple_backward({variant.scale, variant.scale_first, variant.inverse, tile.count(),
                             reads_h ? v.load(tile) : nullptr, reads_h ? shift.load(tile) : nullptr,
                             additive ? nullptr : raw.load(tile), factor(tile), active(tile), dout.load(tile),
                             dlog_det(of_sample), x_out_ ? back.output(tile) : nullptr, dv.output(tile),
                             dshift.output(tile), additive ? nullptr : draw.output(tile), factors});
            dv.store(tile);
            dshift.store(tile);
            if (!additive) draw.store(tile);
            if (x_out_) back.store(tile);
            if (dx.passing) pass(*dy.passing, *dx.passing, tile);
            if (x_out_ && x.passing) pass(*x.passing, *x_out.passing, tile);
            if (dfactor) add(factors, tile, grid, sum_of_slot);
          }
        }
      });
  if (!dfactor) return;
  std::fill_n(dfactor, grid.channels, 0.);
  for (int64_t slot = 0; slot < slots; ++slot)
    for (int64_t k = 0; k < grid.channels; ++k) dfactor[k] += sums.get()[slot * grid.channels + k];
}

Variant variant_of(const Tensor& x, const std::string& mask, bool flip, const std::string& scale,
                   const std::string& order, const std::string& h_order, bool inverse) {
  const bool checkerboard = mask == "checkerboard", interleaved = h_order == "interleaved",
             additive = scale == "none";
  const int64_t channels = checkerboard ? x.size(1) : x.size(1) / 2, second = interleaved ? 1 : channels;
  const Scale scales = additive                ? Scale::none
                       : scale == "exp"        ? Scale::exp
                       : scale == "sigmoid"    ? Scale::sigmoid
                       : scale == "soft_clamp" ? Scale::soft_clamp
                                               : Scale::tanh;
  const bool raw_first = h_order == "scale_shift";
  return {checkerboard,
          flip,
          order == "scale_first",
          inverse,
          scales,
          additive || !raw_first ? 0 : second,
          additive || raw_first ? 0 : second,
          interleaved && !additive ? 2 : 1};
}

void check(const char* op, const char* name, const Tensor& x, const Tensor& h,
           const std::optional<Tensor>& factor, const std::string& mask, const std::string& scale) {
  expect_batch(op, name, x);
  const bool checkerboard = mask == "checkerboard";
  if (!checkerboard) expect_channels(op, name, x, 2);
  const int64_t transformed = checkerboard ? x.size(1) : x.size(1) / 2;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[1] = scale == "none" ? transformed : 2 * transformed;
  expect_floating(op, "h", h, sizes);
  if (factor) expect_floating(op, "factor", *factor, {transformed});
}

std::tuple<Tensor, Tensor> affine_coupling(const Tensor& x, const Tensor& h,
                                           const std::optional<Tensor>& factor, const std::string& mask,
                                           bool flip, const std::string& scale, const std::string& order,
                                           const std::string& h_order, bool inverse) {
  check("affine_coupling", "x", x, h, factor, mask, scale);
  const Variant variant = variant_of(x, mask, flip, scale, order, h_order, inverse);
  OutputBuffer y(x);
  Tensor log_det = empty(x, {x.size(0)}, accumulator_of(x));
  const Grid grid(x, variant.checkerboard ? x.size(1) : x.size(1) / 2, y.kernel_output());
  for_accumulator(x, [&](auto acc) {
    forward<decltype(acc)>(with_position_stride(x), with_position_stride(h), factor, variant, grid,
                           y.kernel_output(), log_det);
  });
  return {y.finalize(), log_det};
}

// Returns x (with `from_output`; otherwise `source`), dx, dh and dfactor.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_of(const Tensor& source, const Tensor& h,
                                                       const std::optional<Tensor>& factor, const Tensor& dy,
                                                       const Tensor& dlog_det, const Variant& variant,
                                                       bool from_output) {
  OutputBuffer dx(dy), dh(h);
  std::optional<OutputBuffer> x;
  if (from_output) x.emplace(source);
  const Grid grid(source, variant.checkerboard ? source.size(1) : source.size(1) / 2, dx.kernel_output());
  const Tensor dfactor =
      factor ? empty(*factor, {grid.channels}) : empty(source, {0}, accumulator_of(source));
  const Buffer<double> sums(grid.channels);
  for_accumulator(source, [&](auto acc) {
    backward<decltype(acc)>(with_position_stride(source), with_position_stride(h), factor,
                            with_position_stride(dy), dlog_det, variant, grid,
                            x ? std::optional(x->kernel_output()) : std::nullopt, dx.kernel_output(),
                            dh.kernel_output(), factor ? sums.get() : nullptr);
  });
  if (factor)
    for_dtype(factor->scalar_type(), [&](auto value) { write<decltype(value)>(dfactor, sums.get()); });
  return {x ? x->finalize() : source, dx.finalize(), dh.finalize(), dfactor};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward(
    const Tensor& x, const Tensor& h, const std::optional<Tensor>& factor, const Tensor& dy,
    const Tensor& dlog_det, const std::string& mask, bool flip, const std::string& scale,
    const std::string& order, const std::string& h_order, bool inverse) {
  check("affine_coupling_backward", "x", x, h, factor, mask, scale);
  expect_gradients("affine_coupling_backward", x, dy, dlog_det);
  auto [same, dx, dh, dfactor] = backward_of(
      x, h, factor, dy, dlog_det, variant_of(x, mask, flip, scale, order, h_order, inverse), false);
  return {dx, dh, dfactor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> affine_coupling_inverse_backward(
    const Tensor& y, const Tensor& h, const std::optional<Tensor>& factor, const Tensor& dy,
    const Tensor& dlog_det, const std::string& mask, bool flip, const std::string& scale,
    const std::string& order, const std::string& h_order) {
  check("affine_coupling_inverse_backward", "y", y, h, factor, mask, scale);
  expect_gradients("affine_coupling_inverse_backward", y, dy, dlog_det);
  return backward_of(y, h, factor, dy, dlog_det, variant_of(y, mask, flip, scale, order, h_order, false),
                     true);
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("affine_coupling", TORCH_BOX(&fastflow::cpu::affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&fastflow::cpu::affine_coupling_backward));
  m.impl("affine_coupling_inverse_backward", TORCH_BOX(&fastflow::cpu::affine_coupling_inverse_backward));
}
