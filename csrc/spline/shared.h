#pragma once
// Splines that all samples share, one of each channel and position: parameters [1, T P, ...].
//
// A table of each spline's bins is made once. Samples are the lanes of vectors. Gradients of the tables are
// added in float64, in the order of the tiles, so they do not depend on the number of threads.
#include <algorithm>
#include <optional>

#include "cpu/columns.h"
#include "cpu/sums.h"
#include "spline/spline.h"

namespace fastflow::cpu {

inline constexpr int64_t SAMPLES = 128;  // of a tile of shared splines

template <typename T>
struct SharedSplines {
  const Splines<T> form;
  const Strided params;
  const int64_t each, row;
  ColumnTiles tiles;  // of whole samples
  const int64_t count;
  Buffer<T> memory;

  SharedSplines(const Splines<T>& form_, const Tensor& x, const Tensor& params_, const Layout& layout)
      : form(form_),
        params(params_),
        each(layout.each),
        row(padded(form_.bins)),
        tiles(layout.tiles(x, params_)),
        count(tiles.transformed.size()),
        memory(count * TABLE_ROWS * row) {
    tiles.samples_per_tile = SAMPLES, tiles.pieces = 1;
    Buffer<T> columns(each * LANES);
    for (int64_t i = 0; i < count; ++i) {
      copy(i, columns.get());
      spline_table({form, row, LANES, columns.get(), memory.get() + i * TABLE_ROWS * row});
    }
  }
  static constexpr int64_t LANES = 16;

  const T* table(int64_t i) const { return memory.get() + i * TABLE_ROWS * row; }
  int64_t channel(int64_t i) const { return i / tiles.transformed.positions; }
  int64_t position(int64_t i) const { return i % tiles.transformed.positions; }
  // The minimum number of tiles per thread.
  int64_t grain() const { return std::max<int64_t>(1, 64 / std::max<int64_t>(1, count)); }

  // The parameters of spline i in each of 16 lanes.
  void copy(int64_t i, T* columns) const {
    for_dtype(params.dtype, [&](auto value) {
      const auto* from = reinterpret_cast<const decltype(value)*>(params.data) +
                         channel(i) * each * params.channel + position(i) * params.position;
      for (int64_t p = 0; p < each; ++p)
        std::fill_n(columns + p * LANES, LANES, static_cast<T>(from[p * params.channel]));
    });
  }
  // Copies the elements of spline i, of the samples of a tile, to or from a line.
  template <bool STORE>
  void copy_line_of(const Strided& x, int64_t i, const ColumnTile& t, T* line) const {
    for_dtype(x.dtype, [&](auto value) {
      auto* at = reinterpret_cast<decltype(value)*>(x.data) + t.first * x.sample +
                 tiles.transformed.order[channel(i)] * x.channel + position(i) * x.position;
      if constexpr (STORE) copy_line(at, x.sample, line, 1, t.last - t.first);
      else copy_line(line, 1, at, x.sample, t.last - t.first);
    });
  }
};

template <typename T>
void shared_spline(const SharedSplines<T>& s, const Tensor& x_, bool inverse, const Tensor& y_,
                   const Tensor& log_det) {
  const Strided x(x_), y(y_);
  T* log_det_ptr = log_det.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, s.tiles.count(), s.grain(), [&](int64_t begin, int64_t end) {
    Buffer<T> memory(2 * SAMPLES);
    Buffer<double> sums(SAMPLES);
    T *v = zeroed(memory, 2 * SAMPLES), *log_slope = v + SAMPLES;
    for (int64_t i = begin; i < end; ++i) {
      const ColumnTile t(s.tiles, s.tiles.transformed, i);
      const int64_t count = t.last - t.first;
      zeroed(sums, SAMPLES);
      for (int64_t j = 0; j < s.count; ++j) {
        s.template copy_line_of<false>(x, j, t, v);
        spline_elements({s.form, inverse, padded(count), 0, v, nullptr, v, log_slope, s.table(j), s.row});
        s.template copy_line_of<true>(y, j, t, v);
        add_each({1, count, log_slope, sums.get()});
      }
      pass(x, y, s.tiles.passing, ColumnTile(s.tiles, s.tiles.passing, i));
      for (int64_t n = 0; n < count; ++n) log_det_ptr[t.first + n] = static_cast<T>(sums.get()[n]);
    }
  });
}

template <typename T>
void shared_spline_backward(const SharedSplines<T>& s, Given given, const Tensor& v_, const Tensor& g_,
                            const Tensor& dlog_det_, const std::optional<Tensor>& x_out_, const Tensor& dv_,
                            const Tensor& dparams_) {
  const Strided v(v_), g(g_), dv(dv_), dparams(dparams_), x_out(x_out_ ? *x_out_ : dv_);
  const Buffer<T> dlog_det = values_of<T>(dlog_det_);
  const int64_t size = TABLE_ROWS * s.row, of_tile = s.count * size;
  Buffer<double> dtables(std::max<int64_t>(1, s.tiles.count()) * of_tile);
  zeroed(dtables, std::max<int64_t>(1, s.tiles.count()) * of_tile);
  torch::stable::parallel_for(0, s.tiles.count(), s.grain(), [&](int64_t begin, int64_t end) {
    Buffer<T> memory(4 * SAMPLES);
    T *in = memory.get(), *upstream = in + SAMPLES, *dlog = upstream + SAMPLES, *out = dlog + SAMPLES;
    for (int64_t i = begin; i < end; ++i) {
      const ColumnTile t(s.tiles, s.tiles.transformed, i), rest(s.tiles, s.tiles.passing, i);
      const int64_t count = t.last - t.first;
      for (int64_t j = 0; j < s.count; ++j) {
        zeroed(memory, 4 * SAMPLES);  // lanes without an element add nothing
        s.template copy_line_of<false>(v, j, t, in);
        s.template copy_line_of<false>(g, j, t, upstream);
        std::copy_n(dlog_det.get() + t.first, count, dlog);
        spline_elements_backward({s.form, given, padded(count), 0, in, nullptr, upstream, dlog,
                                  x_out_ ? out : nullptr, upstream, nullptr, s.table(j), s.row,
                                  dtables.get() + i * of_tile + j * size});
        s.template copy_line_of<true>(dv, j, t, upstream);
        if (x_out_) s.template copy_line_of<true>(x_out, j, t, out);
      }
      pass(g, dv, s.tiles.passing, rest);
      if (x_out_) pass(v, x_out, s.tiles.passing, rest);
    }
  });
  for (int64_t i = 1; i < s.tiles.count(); ++i)
    for (int64_t k = 0; k < of_tile; ++k) dtables.get()[k] += dtables.get()[i * of_tile + k];
  Buffer<T> columns(s.each * (s.LANES + 1));
  T* line = columns.get() + s.each * s.LANES;
  for (int64_t j = 0; j < s.count; ++j) {
    s.copy(j, columns.get());
    spline_table_backward({s.form, s.row, s.LANES, columns.get(), dtables.get() + j * size, line});
    for_dtype(dparams.dtype, [&](auto value) {
      auto* to = reinterpret_cast<decltype(value)*>(dparams.data) + s.channel(j) * s.each * dparams.channel +
                 s.position(j) * dparams.position;
      copy_line(to, dparams.channel, line, 1, s.each);
    });
  }
}

}  // namespace fastflow::cpu
