// fastflow_C::conv1x1, its backward and its inverse + backward on the CPU: y = W x + b at every pixel, C <=
// 64 channels.
//
// Pixels are processed in tiles, either as planes (a row per channel, vectors along pixels: NCHW) or as rows
// (a row per pixel, vectors along channels: channels_last). Contiguous float32 and float64 tiles are
// processed in place; other layouts and dtypes are copied through a scratch buffer.
#include "stable.h"
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <type_traits>

#include "conv1x1/arguments.h"
#include "cpu/gemm.h"
#include "cpu/tensors.h"
#include "strides.h"

namespace fastflow::cpu {
namespace {

// Pixels per tile. Planes: whole vectors for all accumulators of a row. Rows: whole blocks of six rows.
constexpr int64_t PLANES_TILE = 64, ROWS_TILE = 96;

// Element (pixel, channel) is at pixel / positions * n + channel * c + pixel % positions * p.
template <typename T>
struct Images {
  T* data;
  int64_t n, c, p, positions, pixels, channels;

  explicit Images(const Tensor& x)
      : data(static_cast<T*>(const_cast<void*>(x.data_ptr()))),
        n(x.stride(0)),
        c(x.stride(1)),
        p(position_stride(x)),
        positions(1),
        channels(x.size(1)) {
    for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
    pixels = x.size(0) * positions;
    if (positions == 1) p = n;
    if (n == positions * p) positions = pixels;  // all pixels of the batch have one stride
  }
  bool rows() const { return c == 1 && channels > 1; }
  T* at(int64_t pixel) const { return data + pixel / positions * n + pixel % positions * p; }
};

// Calls f(offset in the tile, length, address) for each part of a tile whose pixels have one stride.
template <typename T, typename F>
void for_runs(const Images<T>& x, int64_t first, int64_t count, const F& f) {
  for (int64_t done = 0; done < count;) {
    const int64_t length = std::min(count - done, x.positions - (first + done) % x.positions);
    f(done, length, x.at(first + done));
    done += length;
  }
}

template <typename T>
bool in_one_run(const Images<T>& x, int64_t first, int64_t count) {
  return first % x.positions + count <= x.positions;
}

// A tile in its buffer or in memory. Planes have contiguous pixels, rows contiguous channels.
template <typename T>
struct Tile {
  T* data;
  int64_t row;
};

// p as a pointer to the accumulation dtype; null if T is another dtype.
template <typename acc, typename T>
acc* as(T* p) {
  if constexpr (std::is_same_v<acc, std::remove_const_t<T>>) return const_cast<acc*>(p);
  else return nullptr;
}

template <typename acc, typename T>
void copy(acc* to, const T* from, int64_t step, int64_t count) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<acc>(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<acc>(from[i * step]);
}

template <typename acc, typename T>
class Planes {
 public:
  explicit Planes(int64_t channels) : buffer_(channels * PLANES_TILE) {}

  // Pixels from count to padded(count) are zero.
  Tile<acc> load(const Images<const T>& x, int64_t first, int64_t count, const acc* minus) const {
    if (std::is_same_v<acc, T> && !minus && x.p == 1 && count % 16 == 0 && in_one_run(x, first, count))
      return {as<acc>(x.at(first)), x.c};
    for_runs(x, first, count, [&](int64_t place, int64_t length, const T* from) {
      for (int64_t c = 0; c < x.channels; ++c)
        copy(buffer_.get() + c * PLANES_TILE + place, from + c * x.c, x.p, length);
    });
    for (int64_t c = 0; c < x.channels; ++c) {
      acc* row = buffer_.get() + c * PLANES_TILE;
      if (minus)
        for (int64_t i = 0; i < count; ++i) row[i] -= minus[c];
      std::fill(row + count, row + padded(count), acc(0));
    }
    return {buffer_.get(), PLANES_TILE};
  }
  // The memory for a tile of y: y itself, or the buffer.
  Tile<acc> output(const Images<T>& y, int64_t first, int64_t count) const {
    if (std::is_same_v<acc, T> && y.p == 1 && count % 16 == 0 && in_one_run(y, first, count))
      return {as<acc>(y.at(first)), y.c};
    return {buffer_.get(), PLANES_TILE};
  }
  void store(const Images<T>& y, int64_t first, int64_t count, const Tile<acc>& tile) const {
    if (tile.data != buffer_.get()) return;
    for_runs(y, first, count, [&](int64_t place, int64_t length, T* to) {
      for (int64_t c = 0; c < y.channels; ++c)
        for (int64_t i = 0; i < length; ++i)
          to[c * y.c + i * y.p] = static_cast<T>(tile.data[c * PLANES_TILE + place + i]);
    });
  }

 private:
  Buffer<acc> buffer_;
};

template <typename acc, typename T>
class Rows {
 public:
  explicit Rows(int64_t channels) : row_(padded(channels)), buffer_(row_ * ROWS_TILE) {}

  // `whole`: rows of padded(channels) elements, zero after the last channel.
  Tile<acc> load(const Images<const T>& x, int64_t first, int64_t count, const acc* minus, bool whole) const {
    if (std::is_same_v<acc, T> && !minus && x.c == 1 && (!whole || x.channels == row_) &&
        in_one_run(x, first, count))
      return {as<acc>(x.at(first)), x.p};
    for_runs(x, first, count, [&](int64_t place, int64_t length, const T* from) {
      for (int64_t i = 0; i < length; ++i) {
        acc* row = buffer_.get() + (place + i) * row_;
        copy(row, from + i * x.p, x.c, x.channels);
        if (minus)
          for (int64_t c = 0; c < x.channels; ++c) row[c] -= minus[c];
        std::fill(row + x.channels, row + row_, acc(0));
      }
    });
    return {buffer_.get(), row_};
  }
  Tile<acc> output(const Images<T>& y, int64_t first, int64_t count) const {
    if (std::is_same_v<acc, T> && y.c == 1 && in_one_run(y, first, count)) return {as<acc>(y.at(first)), y.p};
    return {buffer_.get(), row_};
  }
  void store(const Images<T>& y, int64_t first, int64_t count, const Tile<acc>& tile) const {
    if (tile.data != buffer_.get()) return;
    for_runs(y, first, count, [&](int64_t place, int64_t length, T* to) {
      for (int64_t i = 0; i < length; ++i)
        for (int64_t c = 0; c < y.channels; ++c)
          to[i * y.p + c * y.c] = static_cast<T>(tile.data[(place + i) * row_ + c]);
    });
  }

 private:
  const int64_t row_;
  Buffer<acc> buffer_;
};

// A matrix of weights as the left factor of planes, or its transpose as the right factor of rows.
template <typename acc>
class Weights {
 public:
  explicit Weights(const Tensor& w, bool transposed)
      : data_(w.const_data_ptr<acc>()),
        row_(w.stride(transposed)),
        col_(w.stride(!transposed)),
        n_(w.size(0)),
        by_input_(n_ * n_) {
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j < n_; ++j) by_input_.get()[j * n_ + i] = data_[i * row_ + j * col_];
  }
  void planes(const Tile<acc>& x, int64_t count, const Tile<acc>& y, const acc* bias) const {
    gemm({n_, padded(count), n_, data_, row_, col_, x.data, x.row, y.data, y.row,
          bias ? Start::row : Start::zero, bias});
  }
  void rows(const Tile<acc>& x, int64_t count, const Tile<acc>& y, const acc* bias) const {
    gemm({count, n_, n_, x.data, x.row, 1, by_input_.get(), n_, y.data, y.row,
          bias ? Start::column : Start::zero, bias});
  }

 private:
  const acc* data_;
  const int64_t row_, col_, n_;
  Buffer<acc> by_input_;
};

template <typename acc>
const acc* vector_of(const std::optional<Tensor>& v) {
  return v ? v->const_data_ptr<acc>() : nullptr;
}

// Minimum number of tiles per thread, with `products` matrix products each: starting a thread costs about
// 10 us.
int64_t grain_of(int64_t tile, int64_t channels, int64_t products) {
  return std::max<int64_t>(1, (1 << 19) / (products * tile * channels * (channels + 8)));
}

template <typename acc, typename T>
void forward(const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& y_) {
  const Images<const T> x(x_);
  const Images<T> y(y_);
  const Weights<acc> w(weight, false);
  const acc* b = vector_of<acc>(bias);
  const int64_t tile = y.rows() ? ROWS_TILE : PLANES_TILE, tiles = (x.pixels + tile - 1) / tile;
  torch::stable::parallel_for(0, tiles, grain_of(tile, x.channels, 1), [&](int64_t begin, int64_t end) {
    const auto each = [&](const auto& f) {
      for (int64_t t = begin; t < end; ++t) f(t * tile, std::min(tile, x.pixels - t * tile));
    };
    if (y.rows()) {
      const Rows<acc, T> from(x.channels), to(x.channels);
      each([&](int64_t first, int64_t count) {
        const Tile<acc> out = to.output(y, first, count);
        w.rows(from.load(x, first, count, nullptr, false), count, out, b);
        to.store(y, first, count, out);
      });
    } else {
      const Planes<acc, T> from(x.channels), to(x.channels);
      each([&](int64_t first, int64_t count) {
        const Tile<acc> out = to.output(y, first, count);
        w.planes(from.load(x, first, count, nullptr), count, out, b);
        to.store(y, first, count, out);
      });
    }
  });
}

// `source` is x, or y if `weight_inverse` is given; x is then computed too.
template <typename acc, typename T>
void backward(const Tensor& source_, const Tensor& weight, const std::optional<Tensor>& weight_inverse,
              const std::optional<Tensor>& bias, const Tensor& dy_, const Tensor& x_, const Tensor& dx_,
              const Tensor& dweight, const Tensor& dbias) {
  const Images<const T> source(source_), dy(dy_);
  const Images<T> x(x_), dx(dx_);
  const Weights<acc> w(weight, true);
  std::optional<Weights<acc>> inverse;
  if (weight_inverse) inverse.emplace(*weight_inverse, false);
  const acc* b = vector_of<acc>(bias);
  const int64_t channels = dx.channels, row = padded(channels);
  const int64_t tile = dx.rows() ? ROWS_TILE : PLANES_TILE, tiles = (dx.pixels + tile - 1) / tile;
  // One thread sums the tiles of a part in order, and the parts are added in order. The parts do not depend
  // on the number of threads.
  const int64_t parts = std::min<int64_t>(32, (tiles - 1) / grain_of(tile, channels, inverse ? 3 : 2) + 1);
  const int64_t size = (channels + 1) * row;
  const Buffer<acc> sums(parts * size);
  const acc one = 1;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    // [input][output], then the bias
    const auto add = [&](acc* sum, const acc* v, int64_t v_row, int64_t v_col, int64_t count,
                         const Tile<acc>& g) {
      gemm({channels, row, count, v, v_row, v_col, g.data, g.row, sum, row, Start::result, nullptr});
      gemm({1, row, count, &one, 0, 0, g.data, g.row, sum + channels * row, row, Start::result, nullptr});
    };
    const auto each = [&](const auto& f) {
      for (int64_t part = begin; part < end; ++part) {
        acc* sum = sums.get() + part * size;
        std::fill_n(sum, size, acc(0));
        for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t)
          f(t * tile, std::min(tile, dx.pixels - t * tile), sum);
      }
    };
    if (dx.rows()) {
      const Rows<acc, T> from(channels), gradient(channels), to(channels);
      each([&](int64_t first, int64_t count, acc* sum) {
        const Tile<acc> g = gradient.load(dy, first, count, nullptr, true);
        Tile<acc> v = from.load(source, first, count, b, false);
        if (inverse) {
          const Tile<acc> out = to.output(x, first, count);
          inverse->rows(v, count, out, nullptr);
          to.store(x, first, count, out);
          add(sum, out.data, 1, out.row, count, g);
        } else {
          add(sum, v.data, 1, v.row, count, g);
        }
        const Tile<acc> out = to.output(dx, first, count);
        w.rows(g, count, out, nullptr);
        to.store(dx, first, count, out);
      });
    } else {
      const Planes<acc, T> from(channels), gradient(channels), to(channels);
      const Buffer<acc> transposed(PLANES_TILE * row);
      each([&](int64_t first, int64_t count, acc* sum) {
        const Tile<acc> g = gradient.load(dy, first, count, nullptr);
        transpose({channels, count, g.data, g.row, transposed.get(), row});
        Tile<acc> v = from.load(source, first, count, b);
        if (inverse) {
          const Tile<acc> out = to.output(x, first, count);
          inverse->planes(v, count, out, nullptr);
          to.store(x, first, count, out);
          add(sum, out.data, out.row, 1, count, {transposed.get(), row});
        } else {
          add(sum, v.data, v.row, 1, count, {transposed.get(), row});
        }
        const Tile<acc> out = to.output(dx, first, count);
        w.planes(g, count, out, nullptr);
        to.store(dx, first, count, out);
      });
    }
  });
  acc* dw_ptr = dweight.mutable_data_ptr<acc>();
  acc* db_ptr = dbias.mutable_data_ptr<acc>();
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) sums.get()[i] += sums.get()[part * size + i];
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t j = 0; j < channels; ++j) dw_ptr[i * channels + j] = sums.get()[j * row + i];
    db_ptr[i] = sums.get()[channels * row + i];
  }
}

template <typename F>
void for_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float(), float());
    case ScalarType::Double: return f(double(), double());
    case ScalarType::BFloat16: return f(float(), torch::headeronly::BFloat16());
    default: return f(float(), torch::headeronly::Half());
  }
}

std::optional<Tensor> packed(const std::optional<Tensor>& v) {
  return v ? std::optional(torch::stable::contiguous(*v)) : std::nullopt;
}

Tensor conv1x1(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_conv1x1("conv1x1", "x", x, weight, bias);
  OutputBuffer y(x);
  if (x.numel())
    for_dtype(x, [&](auto acc, auto value) {
      forward<decltype(acc), decltype(value)>(with_position_stride(x), weight, packed(bias),
                                              y.kernel_output());
    });
  return y.finalize();
}

// Returns x (without an inverse: `source`), dx, dweight and dbias.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_of(const Tensor& source, const Tensor& weight,
                                                       const std::optional<Tensor>& inverse,
                                                       const std::optional<Tensor>& bias, const Tensor& dy) {
  const int64_t channels = source.size(1);
  OutputBuffer dx(source);
  std::optional<OutputBuffer> x;
  if (inverse) x.emplace(source);
  const auto found = [&](const Tensor& dweight, const Tensor& dbias) {
    return std::tuple(x ? x->finalize() : source, dx.finalize(), dweight, dbias);
  };
  if (!source.numel())
    return found(torch::stable::new_zeros(weight, {channels, channels}),
                 torch::stable::new_zeros(weight, {channels}));
  const Tensor dweight = empty(weight, {channels, channels}), dbias = empty(weight, {channels});
  for_dtype(source, [&](auto acc, auto value) {
    backward<decltype(acc), decltype(value)>(with_position_stride(source), weight, inverse, packed(bias),
                                             with_position_stride(dy), x ? x->kernel_output() : source,
                                             dx.kernel_output(), dweight, dbias);
  });
  return found(dweight, dbias);
}

std::tuple<Tensor, Tensor, Tensor> conv1x1_backward(const Tensor& x, const Tensor& weight, const Tensor& dy) {
  check_conv1x1_backward(x, weight, dy);
  auto [same, dx, dweight, dbias] = backward_of(x, weight, std::nullopt, std::nullopt, dy);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv1x1_inverse_backward(const Tensor& y, const Tensor& weight,
                                                                    const Tensor& weight_inverse,
                                                                    const std::optional<Tensor>& bias,
                                                                    const Tensor& dy) {
  check_conv1x1_inverse_backward(y, weight, weight_inverse, bias, dy);
  return backward_of(y, weight, weight_inverse, bias, dy);
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("conv1x1", TORCH_BOX(&fastflow::cpu::conv1x1));
  m.impl("conv1x1_backward", TORCH_BOX(&fastflow::cpu::conv1x1_backward));
  m.impl("conv1x1_inverse_backward", TORCH_BOX(&fastflow::cpu::conv1x1_inverse_backward));
}
