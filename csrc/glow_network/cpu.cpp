// fastflow_C::glow_network and its backward on the CPU: y = w3 * relu(w2 * relu(w1 * x + b1) + b2) + b3, with
// a 3x3, a 1x1 and a 3x3 convolution.
//
// A thread takes the images of a group through the network in tiles of 64 pixels, so that hidden activations
// stay in the cache. In a tile, each convolution is a matrix product whose vectors run along the pixels: the
// columns of the neighborhoods of x [9 in, 64], then [hidden, 64] twice, then the columns of y [9 out, 64],
// which are added to the pixel's neighbors (col2im).
//
// Operations per pixel: 2 hidden (9 in + hidden + 9 out) forward; backward computes hidden activations again
// and takes 2 hidden (9 in + hidden) + 4 hidden (9 in + hidden + 9 out).
#include "stable.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/gemm.h"
#include "cpu/sums.h"
#include "cpu/tensors.h"

namespace fastflow::cpu {
namespace {

constexpr int64_t TILE = 64, TAPS = 9;

// Images in groups of at least a tile of pixels, with a border of zeros around each image.
struct Groups {
  int64_t images, height, width;
  int64_t images_per_group, count, tiles;
  int64_t plane;  // elements of a channel of a group, with borders
  // Pixels of a tile that are neighbors in a row of an image: their number, and where they start in the tile
  // and in the plane.
  struct Run {
    int64_t length, pixel, place;
  };
  std::vector<std::vector<Run>> runs;  // of each tile

  explicit Groups(const Tensor& x) : images(x.size(0)), height(x.size(2)), width(x.size(3)) {
    images_per_group = std::max<int64_t>(1, TILE / (height * width));
    count = (images + images_per_group - 1) / images_per_group;
    tiles = (pixels() + TILE - 1) / TILE;
    plane = images_per_group * (height + 2) * (width + 2);
    runs.resize(tiles);
    for (int64_t p = 0; p < pixels();) {
      const int64_t length = std::min(width - p % width, TILE - p % TILE);
      runs[p / TILE].push_back(
          {length, p % TILE, place(p / (height * width), p / width % height) + p % width});
      p += length;
    }
  }
  // The first pixel of row i of an image.
  int64_t place(int64_t image, int64_t i) const { return (image * (height + 2) + i + 1) * (width + 2) + 1; }
  int64_t pixels() const { return images_per_group * height * width; }
  int64_t offset(int64_t tap) const { return (tap / 3 - 1) * (width + 2) + tap % 3 - 1; }
};

template <typename T>
void copy(T* to, const T* from, int64_t count) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) std::memcpy(to + i, from + i, 4 * sizeof(T));
  for (; i < count; ++i) to[i] = from[i];
}

template <typename T>
void add_to(T* to, const T* from, int64_t count) {
  typedef T V __attribute__((vector_size(4 * sizeof(T))));
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    V v, w;
    std::memcpy(&v, to + i, sizeof v);
    std::memcpy(&w, from + i, sizeof w);
    v += w;
    std::memcpy(to + i, &v, sizeof v);
  }
  for (; i < count; ++i) to[i] += from[i];
}

// The images of a group, [channels, plane].
template <typename T>
class Planes {
 public:
  Planes(const Groups& groups, int64_t channels)
      : groups_(groups), channels_(channels), data_(channels * groups.plane) {}

  void clear() const { std::fill_n(data_.get(), channels_ * groups_.plane, T(0)); }

  // Images past the last one are zero.
  void load(const Tensor& x, int64_t group) const {
    clear();
    for_rows(x, group, [](T* row, T* image, int64_t step, int64_t width, int64_t) {
      for (int64_t j = 0; j < width; ++j) row[j] = image[j * step];
    });
  }
  void store(const Tensor& y, int64_t group, const T* bias) const {
    for_rows(y, group, [bias](const T* row, T* image, int64_t step, int64_t width, int64_t channel) {
      const T b = bias ? bias[channel] : T(0);
      for (int64_t j = 0; j < width; ++j) image[j * step] = row[j] + b;
    });
  }
  // columns[tap, channel, pixel] = the neighbor of each pixel that is `direction` times the tap's offset
  // away; past the last pixel, zero.
  void gather(int64_t tile, int64_t direction, T* columns) const {
    const auto& runs = groups_.runs[tile];
    const int64_t end = runs.back().pixel + runs.back().length;
    for (int64_t tap = 0; tap < TAPS; ++tap)
      for (int64_t c = 0; c < channels_; ++c, columns += TILE) {
        const T* from = data_.get() + c * groups_.plane + direction * groups_.offset(tap);
        for (const auto& run : runs) copy(columns + run.pixel, from + run.place, run.length);
        std::fill(columns + end, columns + TILE, T(0));
      }
  }
  // Adds the columns to these neighbors.
  void scatter(int64_t tile, int64_t direction, const T* columns) const {
    for (int64_t tap = 0; tap < TAPS; ++tap)
      for (int64_t c = 0; c < channels_; ++c, columns += TILE) {
        T* to = data_.get() + c * groups_.plane + direction * groups_.offset(tap);
        for (const auto& run : groups_.runs[tile]) add_to(to + run.place, columns + run.pixel, run.length);
      }
  }

 private:
  // Calls f(row of the planes, row of the tensor, its stride, its length, channel).
  template <typename F>
  void for_rows(const Tensor& x, int64_t group, const F& f) const {
    const int64_t first = group * groups_.images_per_group;
    const int64_t images = std::min(groups_.images_per_group, groups_.images - first);
    T* const memory = static_cast<T*>(const_cast<void*>(x.data_ptr()));
    const int64_t stride[] = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
    for (int64_t n = 0; n < images; ++n)
      for (int64_t c = 0; c < channels_; ++c)
        for (int64_t i = 0; i < groups_.height; ++i)
          f(data_.get() + c * groups_.plane + groups_.place(n, i),
            memory + (first + n) * stride[0] + c * stride[1] + i * stride[2], stride[3], groups_.width, c);
  }

  const Groups& groups_;
  const int64_t channels_;
  const Buffer<T> data_;
};

// Elements of a matrix in memory: row r1 * rows0 + r0 and column c1 * columns0 + c0 are at
// r1 * row1 + r0 * row0 + c1 * column1 + c0 * column0.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows1, row1, rows0, row0, columns1, column1, columns0, column0;

  Matrix transposed() const { return {data, columns1, column1, columns0, column0, rows1, row1, rows0, row0}; }
};

// A left factor of products with tiles, in panels of rows.
template <typename T>
class Factor {
 public:
  explicit Factor(const Matrix<T>& m)
      : rows_(m.rows1 * m.rows0),
        columns_(m.columns1 * m.columns0),
        data_((rows_ + PANEL - 1) / PANEL * PANEL * columns_) {
    const int64_t grain = std::max<int64_t>(1, (1 << 15) / columns_);
    torch::stable::parallel_for(0, rows_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* from = m.data + i / m.rows0 * m.row1 + i % m.rows0 * m.row0;
        T* to = data_.get() + i / PANEL * PANEL * columns_ + i % PANEL;
        for (int64_t c1 = 0; c1 < m.columns1; ++c1)
          for (int64_t c0 = 0; c0 < m.columns0; ++c0, to += PANEL)
            *to = from[c1 * m.column1 + c0 * m.column0];
      }
    });
  }
  // y = factor x
  void times(const T* x, T* y) const { multiply(x, y, Start::zero, nullptr, false); }
  // h = relu(factor x + bias)
  void activate(const T* x, const T* bias, T* h) const { multiply(x, h, Start::row, bias, true); }

 private:
  void multiply(const T* x, T* y, Start start, const T* bias, bool relu) const {
    gemm(Gemm<T>{rows_, TILE, columns_, data_.get(), 1, PANEL, x, TILE, y, TILE, start, bias, relu,
                 PANEL * columns_});
  }

  const int64_t rows_, columns_;
  const Buffer<T> data_;
};

// The weights as matrices, with taps outside channels, and the biases, contiguous.
template <typename T>
struct Network {
  int64_t in, hidden, out;
  Matrix<T> w1, w2, w3;  // [hidden, 9 in], [hidden, hidden], [9 out, hidden]
  const T *b1, *b2, *b3;

  // The strides of the 3x3 weights are those of contiguous or channels_last.
  Network(const Tensor& w1_, const Tensor& b1_, const Tensor& w2_, const Tensor& b2_, const Tensor& w3_,
          const Tensor& b3_)
      : in(w1_.size(1)),
        hidden(w1_.size(0)),
        out(w3_.size(0)),
        w1{w1_.const_data_ptr<T>(), 1, 0, hidden, w1_.stride(0), TAPS, w1_.stride(3), in, w1_.stride(1)},
        w2{w2_.const_data_ptr<T>(), 1, 0, hidden, w2_.stride(0), 1, 0, hidden, w2_.stride(1)},
        w3{w3_.const_data_ptr<T>(), TAPS, w3_.stride(3), out, w3_.stride(0), 1, 0, hidden, w3_.stride(1)},
        b1(b1_.const_data_ptr<T>()),
        b2(b2_.const_data_ptr<T>()),
        b3(b3_.const_data_ptr<T>()) {}

  // Multiply-adds of a pixel, forward.
  int64_t work() const { return hidden * (TAPS * in + hidden + TAPS * out); }
};

// Gradients of what a ReLU that gave h was applied to.
template <typename T>
void mask(T* dh, const T* h, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dh[i] = h[i] <= T(0) ? T(0) : dh[i];
}

template <typename T>
void forward(const Tensor& x_, const Network<T>& net, const Tensor& y_) {
  const Groups groups(x_);
  const Factor<T> w1(net.w1), w2(net.w2), w3(net.w3);
  const int64_t grain = std::max<int64_t>(1, (1 << 19) / (groups.pixels() * net.work()));
  torch::stable::parallel_for(0, groups.count, grain, [&](int64_t begin, int64_t end) {
    const Planes<T> x(groups, net.in), y(groups, net.out);
    const Buffer<T> columns(TAPS * std::max(net.in, net.out) * TILE), h1(net.hidden * TILE),
        h2(net.hidden * TILE);
    for (int64_t group = begin; group < end; ++group) {
      x.load(x_, group);
      y.clear();
      for (int64_t tile = 0; tile < groups.tiles; ++tile) {
        x.gather(tile, 1, columns.get());
        w1.activate(columns.get(), net.b1, h1.get());
        w2.activate(h1.get(), net.b2, h2.get());
        w3.times(h2.get(), columns.get());
        y.scatter(tile, -1, columns.get());
      }
      y.store(y_, group, net.b3);
    }
  });
}

// Sums of a part of the groups: the weights' gradients, transposed as the factors are, with rows that fill
// vectors.
template <typename T>
struct Sums {
  Buffer<T> w1, w2, w3;
  Buffer<double> b1, b2, b3;

  explicit Sums(const Network<T>& net)
      : w1(net.hidden * padded(TAPS * net.in)),
        w2(net.hidden * padded(net.hidden)),
        w3(TAPS * net.out * padded(net.hidden)),
        b1(net.hidden),
        b2(net.hidden),
        b3(net.out) {
    std::fill_n(w1.get(), net.hidden * padded(TAPS * net.in), T(0));
    std::fill_n(w2.get(), net.hidden * padded(net.hidden), T(0));
    std::fill_n(w3.get(), TAPS * net.out * padded(net.hidden), T(0));
    std::fill_n(b1.get(), net.hidden, 0.);
    std::fill_n(b2.get(), net.hidden, 0.);
    std::fill_n(b3.get(), net.out, 0.);
  }
};

// sum += dy x^T of a tile; `transposed` is scratch memory
template <typename T>
void add_product(const T* dy, int64_t rows, const T* x, int64_t columns, T* transposed, T* sum) {
  const int64_t row = padded(columns);
  transpose(Transposition<T>{columns, TILE, x, TILE, transposed, row});
  gemm(Gemm<T>{rows, row, TILE, dy, TILE, 1, transposed, row, sum, row, Start::result});
}

template <typename T>
struct BackwardFactors {
  Factor<T> w1, w2, w1t, w2t, w3t;

  explicit BackwardFactors(const Network<T>& net)
      : w1(net.w1),
        w2(net.w2),
        w1t(net.w1.transposed()),
        w2t(net.w2.transposed()),
        w3t(net.w3.transposed()) {}
};

// Backward of a group, in a thread's memory.
template <typename T>
class Backward {
 public:
  Backward(const Groups& groups, const Network<T>& net, const BackwardFactors<T>& factors)
      : groups_(groups),
        net_(net),
        factors_(factors),
        x_(groups, net.in),
        dx_(groups, net.in),
        dy_(groups, net.out),
        inputs_(TAPS * net.in * TILE),
        outputs_(TAPS * net.out * TILE),
        h1_(net.hidden * TILE),
        h2_(net.hidden * TILE),
        dh_(net.hidden * TILE),
        dh1_(net.hidden * TILE),
        transposed_(padded(std::max(TAPS * net.in, net.hidden)) * TILE) {}

  void operator()(const Tensor& x, const Tensor& dy, int64_t group, const Tensor& dx,
                  const Sums<T>& sums) const {
    x_.load(x, group);
    dy_.load(dy, group);
    dx_.clear();
    for (int64_t tile = 0; tile < groups_.tiles; ++tile) one(tile, sums);
    dx_.store(dx, group, nullptr);
  }

 private:
  void one(int64_t tile, const Sums<T>& sums) const {
    const int64_t hidden = net_.hidden, count = hidden * TILE;
    x_.gather(tile, 1, inputs_.get());
    factors_.w1.activate(inputs_.get(), net_.b1, h1_.get());
    factors_.w2.activate(h1_.get(), net_.b2, h2_.get());

    dy_.gather(tile, -1, outputs_.get());
    add_product(outputs_.get(), TAPS * net_.out, h2_.get(), hidden, transposed_.get(), sums.w3.get());
    // the tap in the middle has the pixels themselves
    add_lines(Sum<T>{net_.out, TILE, outputs_.get() + TAPS / 2 * net_.out * TILE, sums.b3.get()});
    factors_.w3t.times(outputs_.get(), dh_.get());
    mask(dh_.get(), h2_.get(), count);

    add_product(dh_.get(), hidden, h1_.get(), hidden, transposed_.get(), sums.w2.get());
    add_lines(Sum<T>{hidden, TILE, dh_.get(), sums.b2.get()});
    factors_.w2t.times(dh_.get(), dh1_.get());
    mask(dh1_.get(), h1_.get(), count);

    add_product(dh1_.get(), hidden, inputs_.get(), TAPS * net_.in, transposed_.get(), sums.w1.get());
    add_lines(Sum<T>{hidden, TILE, dh1_.get(), sums.b1.get()});
    factors_.w1t.times(dh1_.get(), inputs_.get());
    dx_.scatter(tile, 1, inputs_.get());
  }

  const Groups& groups_;
  const Network<T>& net_;
  const BackwardFactors<T>& factors_;
  const Planes<T> x_, dx_, dy_;
  const Buffer<T> inputs_, outputs_, h1_, h2_, dh_, dh1_, transposed_;
};

// Writes the sums over the parts, in order, where the matrix of the weight's gradient has them.
template <typename T>
void write(const std::vector<Sums<T>>& parts, Buffer<T> Sums<T>::* sums, const Matrix<T>& gradient) {
  const Matrix<T>& m = gradient;
  const int64_t columns = m.columns1 * m.columns0, row = padded(columns);
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / row);
  torch::stable::parallel_for(0, m.rows1 * m.rows0, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* total = (parts[0].*sums).get() + i * row;
      for (size_t part = 1; part < parts.size(); ++part)
        add(Addition<T>{columns, (parts[part].*sums).get() + i * row, total});
      T* const to = const_cast<T*>(m.data) + i / m.rows0 * m.row1 + i % m.rows0 * m.row0;
      for (int64_t c1 = 0; c1 < m.columns1; ++c1)
        for (int64_t c0 = 0; c0 < m.columns0; ++c0) to[c1 * m.column1 + c0 * m.column0] = *total++;
    }
  });
}

template <typename T>
void write(const std::vector<Sums<T>>& parts, Buffer<double> Sums<T>::* sums, const Tensor& gradient) {
  T* const to = gradient.mutable_data_ptr<T>();
  for (int64_t i = 0; i < gradient.size(0); ++i) {
    double total = 0;
    for (const Sums<T>& part : parts) total += (part.*sums).get()[i];
    to[i] = static_cast<T>(total);
  }
}

// The gradients are contiguous.
template <typename T>
void backward(const Tensor& x, const Network<T>& net, const Tensor& dy, const Tensor& dx, const Tensor& dw1,
              const Tensor& db1, const Tensor& dw2, const Tensor& db2, const Tensor& dw3, const Tensor& db3) {
  const Groups groups(x);
  // One thread sums the groups of a part in order. The parts do not depend on the number of threads.
  const int64_t parts = std::clamp<int64_t>(groups.count * groups.pixels() / (2 * TILE), 1,
                                            std::min<int64_t>(16, groups.count));
  std::vector<Sums<T>> sums;
  for (int64_t part = 0; part < parts; ++part) sums.emplace_back(net);
  const BackwardFactors<T> factors(net);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const Backward<T> of_group(groups, net, factors);
    for (int64_t part = begin; part < end; ++part)
      for (int64_t group = groups.count * part / parts; group < groups.count * (part + 1) / parts; ++group)
        of_group(x, dy, group, dx, sums[part]);
  });
  const Network<T> gradients(dw1, db1, dw2, db2, dw3, db3);
  write(sums, &Sums<T>::w1, gradients.w1);
  write(sums, &Sums<T>::w2, gradients.w2);
  write(sums, &Sums<T>::w3, gradients.w3);
  write(sums, &Sums<T>::b1, db1);
  write(sums, &Sums<T>::b2, db2);
  write(sums, &Sums<T>::b3, db3);
}

void check(const char* op, const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
           const Tensor& b2, const Tensor& w3, const Tensor& b3) {
  expect_shape(op, "x", x, {ANY, ANY, ANY, ANY});
  expect_dtype(op, "x", x, {ScalarType::Float, ScalarType::Double});
  expect_dims(op, "w1", w1, 4);
  expect_dims(op, "w3", w3, 4);
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, op, ": x: got shape ",
                  to_string(x.sizes()), ", expected at least one channel and pixel");
  const int64_t hidden = w1.size(0), out = w3.size(0);
  STD_TORCH_CHECK(hidden > 0, op, ": w1: got no outputs, expected at least one");
  const ScalarType type = x.scalar_type();
  expect_tensor(op, "w1", w1, {hidden, x.size(1), 3, 3}, type, x);
  if (w2.dim() == 2) expect_tensor(op, "w2", w2, {hidden, hidden}, type, x);
  else expect_tensor(op, "w2", w2, {hidden, hidden, 1, 1}, type, x);
  expect_tensor(op, "w3", w3, {out, hidden, 3, 3}, type, x);
  expect_tensor(op, "b1", b1, {hidden}, type, x);
  expect_tensor(op, "b2", b2, {hidden}, type, x);
  expect_tensor(op, "b3", b3, {out}, type, x);
}

// A 3x3 weight, or a contiguous copy if its taps have no single stride.
Tensor with_tap_stride(const Tensor& w) {
  return w.stride(2) == 3 * w.stride(3) ? w : torch::stable::contiguous(w);
}

template <typename F>
void with_network(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                  const Tensor& w3, const Tensor& b3, const F& f) {
  const Tensor k1 = with_tap_stride(w1), k3 = with_tap_stride(w3), c1 = torch::stable::contiguous(b1),
               c2 = torch::stable::contiguous(b2), c3 = torch::stable::contiguous(b3);
  if (x.scalar_type() == ScalarType::Double) f(Network<double>(k1, c1, w2, c2, k3, c3));
  else f(Network<float>(k1, c1, w2, c2, k3, c3));
}

Tensor glow_network(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                    const Tensor& w3, const Tensor& b3, bool /*tf32*/) {
  check("glow_network", x, w1, b1, w2, b2, w3, b3);
  const bool channels_last = x.size(1) > 1 && x.stride(1) == 1 && !x.is_contiguous();
  const Tensor y = empty_images(x, x.size(0), w3.size(0), x.size(2), x.size(3), channels_last);
  if (y.numel()) with_network(x, w1, b1, w2, b2, w3, b3, [&](const auto& net) { forward(x, net, y); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> glow_network_backward(
    const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& w3,
    const Tensor& b3, bool /*tf32*/, const Tensor& dy) {
  check("glow_network_backward", x, w1, b1, w2, b2, w3, b3);
  expect_tensor("glow_network_backward", "dy", dy, {x.size(0), w3.size(0), x.size(2), x.size(3)},
                x.scalar_type(), x);
  const auto zeros = [](const Tensor& v) { return torch::stable::new_zeros(v, v.sizes()); };
  const Tensor dx = torch::stable::empty_like(x), dw1 = zeros(w1), db1 = zeros(b1), dw2 = zeros(w2),
               db2 = zeros(b2), dw3 = zeros(w3), db3 = zeros(b3);
  if (x.size(0) * x.size(2) * x.size(3) > 0)
    with_network(x, w1, b1, w2, b2, w3, b3,
                 [&](const auto& net) { backward(x, net, dy, dx, dw1, db1, dw2, db2, dw3, db3); });
  return {dx, dw1, db1, dw2, db2, dw3, db3};
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("glow_network", TORCH_BOX(&fastflow::cpu::glow_network));
  m.impl("glow_network_backward", TORCH_BOX(&fastflow::cpu::glow_network_backward));
}
