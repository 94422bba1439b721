#pragma once
// Ops with parameters of each element, [N, T P, ...], of T of the channels: the first of an order,
// or neighbors. The others are copied.
//
// Tiles of about 128 elements: their parameters are copied into columns, a few KB that stay in the first
// cache. Parameter p of element i is at p * COLUMN + i, so elements are the lanes of vectors.
#include "stable.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/gemm.h"
#include "cpu/tensors.h"
#include "cpu/tiles.h"
#include "cpu/transpose.h"

namespace fastflow::cpu {

inline constexpr int64_t ELEMENTS = 128;  // of a tile
inline constexpr int64_t COLUMN =
    144;  // elements between parameters: a power of two would map them to few cache sets
inline constexpr int64_t GRAIN =
    6;  // minimum number of tiles per thread: starting a thread costs about 10 us

// Elements of a part of the channels of a sample: `channels` of them, at all positions. In `rows` the
// channels of a position are neighbors (channels_last, and vectors), otherwise the positions of a channel.
struct Part {
  const int64_t* order;  // the channels in memory
  int64_t channels, positions;
  bool rows;
  int64_t size() const { return channels * positions; }

  // Calls run(i, channel index, position, count) for runs of neighbors: elements `from` to `to`, i counts
  // from 0.
  template <typename F>
  void runs(int64_t from, int64_t to, const F& run) const {
    const int64_t length = rows ? channels : positions;
    for (int64_t e = from; e < to;) {
      const int64_t line = e / length, at = e % length, count = std::min(length - at, to - e);
      rows ? run(e - from, at, line, count) : run(e - from, line, at, count);
      e += count;
    }
  }
};

// The tiles of a batch: groups of whole samples, or pieces of a sample.
struct ColumnTiles {
  Part transformed, passing;
  int64_t samples, samples_per_tile, pieces, capacity;

  ColumnTiles(const Part& transformed_, const Part& passing_, int64_t samples_)
      : transformed(transformed_), passing(passing_), samples(samples_) {
    const int64_t size = std::max<int64_t>(1, transformed.size());
    samples_per_tile = std::max<int64_t>(1, ELEMENTS / size);
    pieces = size <= ELEMENTS ? 1 : (size + ELEMENTS - 1) / ELEMENTS;
  }
  int64_t count() const { return (samples + samples_per_tile - 1) / samples_per_tile * pieces; }
};

struct ColumnTile {
  int64_t first, last, from, to;  // samples; elements of each
  ColumnTile(const ColumnTiles& tiles, const Part& part, int64_t i)
      : first(i / tiles.pieces * tiles.samples_per_tile),
        last(std::min(first + tiles.samples_per_tile, tiles.samples)),
        from(part.size() * (i % tiles.pieces) / tiles.pieces),
        to(part.size() * (i % tiles.pieces + 1) / tiles.pieces) {}
  int64_t count() const { return (last - first) * (to - from); }
};

// A tensor [N, channels, positions].
struct Strided {
  char* data;
  ScalarType dtype;
  int64_t sample, channel, position;
  explicit Strided(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())),
        dtype(t.scalar_type()),
        sample(t.stride(0)),
        channel(t.stride(1)),
        position(position_stride(t)) {}
};

// Copies elements of x or y, of the channels order[0], order[1], ..., to or from a buffer.
template <bool STORE, typename acc>
void copy_elements(const Strided& x, const Part& part, const ColumnTile& t, acc* buffer) {
  for_dtype(x.dtype, [&](auto value) {
    using T = decltype(value);
    T* data = reinterpret_cast<T*>(x.data);
    acc* to = buffer;
    for (int64_t n = t.first; n < t.last; ++n, to += t.to - t.from)
      part.runs(t.from, t.to, [&](int64_t i, int64_t k, int64_t p, int64_t count) {
        T* at = data + n * x.sample + p * x.position;
        if (part.rows) {
          for (int64_t j = 0; j < count; ++j) {
            T& element = at[part.order[k + j] * x.channel];
            if constexpr (STORE) element = static_cast<T>(to[i + j]);
            else to[i + j] = static_cast<acc>(element);
          }
        } else if constexpr (STORE) {
          copy_line(at + part.order[k] * x.channel, x.position, to + i, 1, count);
        } else {
          copy_line(to + i, 1, at + part.order[k] * x.channel, x.position, count);
        }
      });
  });
}

// Copies parameters of [N, T P, ...] to or from columns.
template <bool STORE, typename acc>
void copy_parameters(const Strided& h, int64_t each, const Part& part, const ColumnTile& t, acc* columns) {
  for_dtype(h.dtype, [&](auto value) {
    using T = decltype(value);
    T* data = reinterpret_cast<T*>(h.data);
    acc* to = columns;
    for (int64_t n = t.first; n < t.last; ++n, to += t.to - t.from)
      part.runs(t.from, t.to, [&](int64_t i, int64_t k, int64_t p, int64_t count) {
        T* at = data + n * h.sample + k * each * h.channel + p * h.position;
        if constexpr (std::is_same_v<T, acc>) {
          if (part.rows && h.channel == 1) {
            if constexpr (STORE) to_rows(ToRows<acc>{count, each, COLUMN, to + i, at});
            else to_columns(ToColumns<acc>{count, each, COLUMN, at, to + i});
            return;
          }
        }
        for (int64_t j = 0; j < (part.rows ? count : 0); ++j) {
          T* element = at + j * each * h.channel;
          acc* column = to + i + j;
          for (int64_t q = 0; q < each; ++q) {
            if constexpr (STORE) element[q * h.channel] = static_cast<T>(column[q * COLUMN]);
            else column[q * COLUMN] = static_cast<acc>(element[q * h.channel]);
          }
        }
        for (int64_t q = 0; q < (part.rows ? 0 : each); ++q) {
          if constexpr (STORE) copy_line(at + q * h.channel, h.position, to + i + q * COLUMN, 1, count);
          else copy_line(to + i + q * COLUMN, 1, at + q * h.channel, h.position, count);
        }
      });
  });
}

// Copies the channels that pass through; both tensors have one dtype.
inline void pass(const Strided& from, const Strided& to, const Part& part, const ColumnTile& t) {
  for_dtype(from.dtype, [&](auto value) {
    using T = decltype(value);
    for (int64_t n = t.first; n < t.last; ++n)
      part.runs(t.from, t.to, [&](int64_t, int64_t k, int64_t p, int64_t count) {
        const T* source = reinterpret_cast<const T*>(from.data) + n * from.sample + p * from.position;
        T* target = reinterpret_cast<T*>(to.data) + n * to.sample + p * to.position;
        if (part.rows)
          for (int64_t j = k; j < k + count; ++j)
            target[part.order[j] * to.channel] = source[part.order[j] * from.channel];
        else
          copy_line(target + part.order[k] * to.channel, to.position, source + part.order[k] * from.channel,
                    from.position, count);
      });
  });
}

// The order of the channels, the tiles, and the number of parameters of an element.
struct Layout {
  std::vector<int64_t> order;
  int64_t transformed, each;
  bool shared = false;  // the parameters, by all samples: their first dimension is 1

  Layout(const char* op, const char* name, const Tensor& x, const Tensor& params,
         const std::optional<Tensor>& channel_order, int64_t first_channel, int64_t each_,
         bool may_share = false)
      : order(x.size(1)), each(each_) {
    const int64_t channels = x.size(1);
    expect_dims(op, "params", params, 2);
    transformed = params.size(1) / each;
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes[1] = transformed * each;
    shared = may_share && params.size(0) == 1 && sizes[0] != 1;
    if (shared) sizes[0] = 1;
    expect_floating(op, "params", params, sizes);
    STD_TORCH_CHECK(transformed <= channels, op, ": params: got ", transformed * each,
                    " parameters per position of ", name, ", expected at most ", channels * each);
    if (!channel_order) {
      STD_TORCH_CHECK(first_channel >= 0 && first_channel + transformed <= channels, op,
                      ": first_channel: got ", first_channel, ", expected 0 to ", channels - transformed);
      for (int64_t k = 0; k < channels; ++k)
        order[k] = k < transformed                   ? first_channel + k
                   : k < transformed + first_channel ? k - transformed
                                                     : k;
      return;
    }
    expect_shape(op, "channel_order", *channel_order, {channels});
    expect_dtype(op, "channel_order", *channel_order, {ScalarType::Long});
    const auto* values = static_cast<const int64_t*>(channel_order->const_data_ptr());
    std::vector<bool> seen(channels);
    for (int64_t k = 0; k < channels; ++k) {
      const int64_t c = order[k] = values[k * channel_order->stride(0)];
      STD_TORCH_CHECK(c >= 0 && c < channels && !seen[c], op, ": channel_order: got ", c, " at index ", k,
                      ", expected a permutation of 0 to ", channels - 1);
      seen[c] = true;
    }
  }
  ColumnTiles tiles(const Tensor& x, const Tensor& params) const {
    int64_t positions = 1;
    for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
    const bool rows = positions == 1 || (params.stride(1) == 1 && params.size(1) > 1);
    return {{order.data(), transformed, positions, rows},
            {order.data() + transformed, static_cast<int64_t>(order.size()) - transformed, positions, rows},
            x.size(0)};
  }
};

template <typename acc>
acc* zeroed(Buffer<acc>& memory, int64_t size) {  // the last vector of a tile reads beyond its elements
  std::fill_n(memory.get(), size, acc(0));
  return memory.get();
}

// Calls run(count, v, columns, log_slope) for each tile; it replaces v.
template <typename acc, typename F>
void for_columns(const Tensor& x_, const Tensor& params_, const Layout& layout, const Tensor& y_,
                 const Tensor& log_det, const F& run) {
  const Strided x(x_), params(params_), y(y_);
  const ColumnTiles tiles = layout.tiles(x_, params_);
  const Buffer<double> sums(tiles.pieces > 1 ? tiles.count() : 0);
  acc* log_det_ptr = log_det.mutable_data_ptr<acc>();
  torch::stable::parallel_for(0, tiles.count(), GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t size = (layout.each + 2) * COLUMN;
    Buffer<acc> memory(size);
    acc *columns = zeroed(memory, size), *v = columns + layout.each * COLUMN, *log_slope = v + COLUMN;
    for (int64_t i = begin; i < end; ++i) {
      const ColumnTile t(tiles, tiles.transformed, i);
      copy_elements<false>(x, tiles.transformed, t, v);
      copy_parameters<false>(params, layout.each, tiles.transformed, t, columns);
      run(padded(t.count()), v, columns, log_slope);
      copy_elements<true>(y, tiles.transformed, t, v);
      pass(x, y, tiles.passing, ColumnTile(tiles, tiles.passing, i));
      const int64_t each = t.to - t.from;
      if (tiles.pieces > 1) sums.get()[i] = sum(log_slope, each);
      else
        for (int64_t n = t.first; n < t.last; ++n)
          log_det_ptr[n] = static_cast<acc>(sum(log_slope + (n - t.first) * each, each));
    }
  });
  if (tiles.pieces > 1)
    for (int64_t n = 0; n < tiles.samples; ++n)
      log_det_ptr[n] = static_cast<acc>(sum(sums.get() + n * tiles.pieces, tiles.pieces));
}

// Calls run(count, v, columns, g, dlog_slope, out) for each tile. It replaces g and the columns by gradients;
// with `x_out_`, v is the output of the forward direction and `out` receives its input.
template <typename acc, typename F>
void for_columns_backward(const Tensor& v_, const Tensor& params_, const Tensor& g_, const Tensor& dlog_det_,
                          const Layout& layout, const std::optional<Tensor>& x_out_, const Tensor& dv_,
                          const Tensor& dparams_, const F& run) {
  const Strided v(v_), params(params_), g(g_), dv(dv_), dparams(dparams_), x_out(x_out_ ? *x_out_ : dv_);
  const ColumnTiles tiles = layout.tiles(v_, params_);
  const Buffer<acc> dlog_det = values_of<acc>(dlog_det_);
  torch::stable::parallel_for(
      0, tiles.count(), std::max<int64_t>(1, GRAIN / 2), [&](int64_t begin, int64_t end) {
        const int64_t size = (layout.each + 4) * COLUMN;
        Buffer<acc> memory(size);
        acc *columns = zeroed(memory, size), *in = columns + layout.each * COLUMN, *upstream = in + COLUMN,
            *dlog = upstream + COLUMN, *out = dlog + COLUMN;
        for (int64_t i = begin; i < end; ++i) {
          const ColumnTile t(tiles, tiles.transformed, i), rest(tiles, tiles.passing, i);
          copy_elements<false>(v, tiles.transformed, t, in);
          copy_elements<false>(g, tiles.transformed, t, upstream);
          copy_parameters<false>(params, layout.each, tiles.transformed, t, columns);
          for (int64_t n = t.first; n < t.last; ++n)
            std::fill_n(dlog + (n - t.first) * (t.to - t.from), t.to - t.from, dlog_det.get()[n]);
          run(padded(t.count()), in, columns, upstream, dlog, x_out_ ? out : nullptr);
          copy_elements<true>(dv, tiles.transformed, t, upstream);
          copy_parameters<true>(dparams, layout.each, tiles.transformed, t, columns);
          pass(g, dv, tiles.passing, rest);
          if (!x_out_) continue;
          copy_elements<true>(x_out, tiles.transformed, t, out);
          pass(v, x_out, tiles.passing, rest);
        }
      });
}

}  // namespace fastflow::cpu
