// fastflow_C::residual_network and its backward on the CPU.
//
// Samples are rows. Their products with the weights do not depend on each other, so a thread takes its rows
// through all layers, in tiles that stay in the cache. Statistics of a batch divide the layers into parts:
// all rows go through one part before the next one starts. Sums over samples (gradients of weights,
// statistics) are divided by units, so that their bits do not depend on the number of threads.
//
// Multiply-adds per sample: those of the weights forward, twice as many backward.
#include "stable.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/gemm.h"
#include "cpu/sums.h"
#include "cpu/tensors.h"
#include "residual_network/elements.h"

namespace fastflow::cpu {
namespace {

constexpr int64_t TILE = 120;          // rows, full panels of products
constexpr int64_t SUMMED = 1024;       // rows of a product of gradients, which stay in the cache
constexpr int64_t ROWS = 240;          // rows of a weight's gradient that a thread takes at once
constexpr int64_t UNITS = 48;          // units of a sum, or columns of a weight, that are
constexpr int64_t WORK = 1 << 19;      // multiply-adds that are worth a thread
constexpr int64_t ELEMENTS = 1 << 14;  // elements that are

template <typename T>
struct Linear {
  int64_t in, out;
  const T *weight, *bias;
};

// Batch normalization in one place: z = scale * x + shift.
template <typename T>
struct Norm {
  const T *weight, *bias;
  std::vector<double> mean, reciprocal;  // of the standard deviation
  std::vector<T> scale, shift;

  void set(int64_t j, double of_mean, double variance, double eps) {
    mean[j] = of_mean;
    reciprocal[j] = 1 / std::sqrt(variance + eps);
    scale[j] = static_cast<T>(weight[j] * reciprocal[j]);
    shift[j] = static_cast<T>(bias[j] - of_mean * weight[j] * reciprocal[j]);
  }
};

template <typename T>
struct Block {
  std::vector<Norm<T>> norms;  // before each linear layer, or none
  Linear<T> linears[2];
  std::optional<Linear<T>> gate;
};

// A part of the layers, which a thread takes rows [begin, end) through, and what follows after all rows.
struct Stage {
  std::function<void(int64_t, int64_t)> rows;
  std::function<void()> then;
};

template <typename F>
void for_each_part(int64_t count, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, grain), f);
}

template <typename T>
class Network {
 public:
  int64_t samples, features, contexts, hidden, outputs;
  bool gated, of_batch;
  double eps;
  Activation activation;
  Linear<T> first, last;
  std::vector<Block<T>> blocks;
  const T *x, *context;

  Network(const char* op, const Tensor& x_, const std::optional<Tensor>& context_,
          const std::vector<Tensor>& parameters, const std::vector<Tensor>& running, int64_t count,
          const std::string& name, bool batch_norm, double epsilon)
      : samples(x_.size(0)),
        features(x_.size(1)),
        contexts(context_ ? context_->size(1) : 0),
        gated(context_.has_value()),
        of_batch(batch_norm && running.empty()),
        eps(epsilon),
        activation(activation_of(name)) {
    const size_t places = 2 * count * (batch_norm ? 2 : 0);
    const size_t expected = 4 + 2 * count * ((batch_norm ? 4 : 2) + gated);
    STD_TORCH_CHECK(count >= 0 && parameters.size() == expected, op, ": parameters: got ", parameters.size(),
                    " tensors, expected ", expected);
    STD_TORCH_CHECK(running.empty() || running.size() == places, op, ": running: got ", running.size(),
                    " tensors, expected none or ", places);
    expect_dims(op, "parameters[0]", parameters[0], 2);
    expect_dims(op, "the last weight", parameters[expected - 2], 2);
    hidden = parameters[0].size(0);
    outputs = parameters[expected - 2].size(0);
    x = data(op, "x", x_, {samples, features}, x_);
    if (gated) context = data(op, "context", *context_, {samples, contexts}, x_);
    auto next = parameters.begin();
    const auto vector = [&](const Tensor& t) { return data(op, "parameters", t, {hidden}, x_); };
    const auto linear = [&](int64_t in, int64_t out) {
      const T* weight = data(op, "parameters", *next++, {out, in}, x_);
      return Linear<T>{in, out, weight, data(op, "parameters", *next++, {out}, x_)};
    };
    const auto norm = [&] {
      Norm<T> made{vector(next[0]),
                   vector(next[1]),
                   std::vector<double>(hidden),
                   std::vector<double>(hidden),
                   std::vector<T>(hidden),
                   std::vector<T>(hidden)};
      next += 2;
      return made;
    };
    first = linear(features + contexts, hidden);
    for (int64_t b = 0; b < count; ++b) {
      Block<T> block;
      for (Linear<T>& layer : block.linears) {
        if (batch_norm) block.norms.push_back(norm());
        layer = linear(hidden, hidden);
      }
      if (gated) block.gate = linear(contexts, hidden);
      blocks.push_back(std::move(block));
    }
    last = linear(hidden, outputs);
    for (size_t place = 0; place < running.size() / 2; ++place) {
      const T *mean = vector(running[2 * place]), *variance = vector(running[2 * place + 1]);
      for (int64_t j = 0; j < hidden; ++j)
        blocks[place / 2].norms[place % 2].set(j, mean[j], variance[j], eps);
    }
  }

  int64_t planes() const { return static_cast<int64_t>(blocks.size()) * (gated ? 4 : 2) + 1; }
  int64_t elements() const { return samples * hidden; }
  // Multiply-adds per sample, forward.
  int64_t work() const {
    const int64_t each = 2 * hidden * hidden + contexts * hidden;
    return (features + contexts + outputs) * hidden + static_cast<int64_t>(blocks.size()) * each;
  }
  // All layers in the order of the parameters.
  template <typename F>
  void for_linears(const F& f) const {
    f(first);
    for (const Block<T>& block : blocks) {
      f(block.linears[0]);
      f(block.linears[1]);
      if (block.gate) f(*block.gate);
    }
    f(last);
  }
  // Inputs of the first layer for rows [begin, end).
  void join(int64_t begin, int64_t end, T* to) const {
    for (int64_t i = begin; i < end; ++i) {
      std::copy_n(x + i * features, features, to + i * first.in);
      std::copy_n(context + i * contexts, contexts, to + i * first.in + features);
    }
  }
  // Runs stages, those between two sums over samples at once.
  void run(const std::vector<Stage>& stages, int64_t work_of_a_row) const {
    for (size_t begin = 0, end; begin < stages.size(); begin = end + 1) {
      for (end = begin; end + 1 < stages.size() && !stages[end].then;) ++end;
      const int64_t grain = WORK * static_cast<int64_t>(stages.size()) / (end - begin + 1) / work_of_a_row;
      for_each_part(samples, std::max(grain, PANEL), [&](int64_t from, int64_t to) {
        for (int64_t row = from; row < to; row += TILE)
          for (size_t s = begin; s <= end; ++s) stages[s].rows(row, std::min(to, row + TILE));
      });
      if (stages[end].then) stages[end].then();
    }
  }
  ActivationElements<T> read(const Block<T>& block, int place, int64_t begin, int64_t end, const T* x) const {
    const int64_t rows = end - begin, offset = begin * hidden;
    ActivationElements<T> f{activation, 1, rows * hidden};
    if (!block.norms.empty()) {
      const Norm<T>& norm = block.norms[place];
      f.rows = rows, f.width = hidden, f.scale = norm.scale.data(), f.shift = norm.shift.data();
    }
    f.x = x + offset;
    return f;
  }

 private:
  // Of a contiguous tensor, or of a copy.
  const T* data(const char* op, const char* name, const Tensor& t, IntHeaderOnlyArrayRef sizes,
                const Tensor& like) {
    expect_tensor(op, name, t, sizes, like.scalar_type(), like);
    if (t.is_contiguous()) return t.const_data_ptr<T>();
    copies_.push_back(torch::stable::contiguous(t));
    return copies_.back().template const_data_ptr<T>();
  }

  std::vector<Tensor> copies_;
};

// Weights of all layers, transposed, so that vectors run along the outputs.
template <typename T>
class Transposed {
 public:
  explicit Transposed(const Network<T>& net) : data_(size(net)) {
    struct Part {
      const Linear<T>* layer;
      T* to;
      int64_t begin, end;  // inputs
    };
    std::vector<Part> parts;
    T* to = data_.get();
    net.for_linears([&](const Linear<T>& layer) {
      places_.push_back(to);
      for (int64_t i = 0; i < layer.in; i += UNITS)
        parts.push_back({&layer, to, i, std::min(layer.in, i + UNITS)});
      to += layer.in * padded(layer.out);
    });
    const int64_t grain = ELEMENTS / (UNITS * std::max<int64_t>(1, net.hidden));
    for_each_part(static_cast<int64_t>(parts.size()), grain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const auto& [layer, place, from, until] = parts[p];
        transpose(Transposition<T>{layer->out, until - from, layer->weight + from, layer->in,
                                   place + from * padded(layer->out), padded(layer->out)});
      }
    });
  }
  // y = x W^T + b for rows [begin, end) of the layer at a position
  void apply(const Linear<T>& layer, int64_t position, int64_t begin, int64_t end, const T* x, T* y) const {
    gemm(Gemm<T>{end - begin, layer.out, layer.in, x + begin * layer.in, layer.in, 1, places_[position],
                 padded(layer.out), y + begin * layer.out, layer.out, Start::column, layer.bias});
  }

 private:
  static int64_t size(const Network<T>& net) {
    int64_t total = 0;
    net.for_linears([&](const Linear<T>& layer) { total += layer.in * padded(layer.out); });
    return total;
  }

  const Buffer<T> data_;
  std::vector<T*> places_;
};

// Mean and variance of the units of h, for a norm.
template <typename T>
void normalize(const Network<T>& net, const T* h, Norm<T>& norm, T* mean, T* variance) {
  const int64_t n = net.samples, width = net.hidden;
  std::vector<double> pivots(h, h + width), sums(width, 0.), squares(width, 0.);
  for_each_part((width + UNITS - 1) / UNITS, ELEMENTS / (UNITS * n), [&](int64_t begin, int64_t end) {
    const int64_t from = begin * UNITS, count = std::min(width, end * UNITS) - from;
    for (int64_t i = 0; i < n; ++i)
      add_deviations_of_each(DeviationSum<T>{1, count, h + i * width + from, pivots.data() + from,
                                             sums.data() + from, squares.data() + from});
  });
  for (int64_t j = 0; j < width; ++j) {
    const double deviation = sums[j] / n;
    mean[j] = static_cast<T>(pivots[j] + deviation);
    variance[j] = static_cast<T>(std::max(0., squares[j] / n - deviation * deviation));
    norm.set(j, pivots[j] + deviation, std::max(0., squares[j] / n - deviation * deviation), net.eps);
  }
}

// Writes y unless it is null, hidden unless it is null, and statistics of the batch.
template <typename T>
void forward(Network<T>& net, T* y, T* kept, T* statistics) {
  const int64_t count = net.elements(), each = net.gated ? 4 : 2;
  const Transposed<T> weights(net);
  const Buffer<T> joined(net.gated ? net.samples * net.first.in : 0), read(count),
      own(kept ? (net.gated ? 0 : count) : 4 * count);
  // the input of a block, the output of its first layer, that of the second one, the gates
  const auto plane = [&, kept](int64_t b, int64_t place) {
    if (kept && place < each) return kept + (b * each + place) * count;
    return own.get() + (kept ? 0 : place * count);
  };
  std::vector<Stage> stages;
  T* const h = plane(0, 0);
  stages.push_back({[&, h](int64_t begin, int64_t end) {
    if (net.gated) net.join(begin, end, joined.get());
    weights.apply(net.first, 0, begin, end, net.gated ? joined.get() : net.x, h);
  }});
  const auto statistics_after = [&](int64_t b, int place, const T* values) {
    if (net.of_batch)
      stages.back().then = [&net, &norm = net.blocks[b].norms[place], values, width = net.hidden,
                            to = statistics + (2 * b + place) * 2 * net.hidden] {
        normalize(net, values, norm, to, to + width);
      };
  };
  const int64_t blocks = static_cast<int64_t>(net.blocks.size());
  for (int64_t b = 0; b < blocks; ++b) {
    const Block<T>& block = net.blocks[b];
    const int64_t position = 1 + b * (net.gated ? 3 : 2);
    T *const in = plane(b, 0), *const between = plane(b, 1), *const update = plane(b, 2),
             *const gates = net.gated ? plane(b, 3) : nullptr, *const out = plane(b + 1, 0);
    statistics_after(b, 0, in);
    stages.push_back({[&, position, in, between](int64_t begin, int64_t end) {
      auto f = net.read(block, 0, begin, end, in);
      f.out = read.get() + begin * net.hidden;
      activate(f);
      weights.apply(block.linears[0], position, begin, end, read.get(), between);
    }});
    statistics_after(b, 1, between);
    stages.push_back({[&, position, in, between, update, gates, out](int64_t begin, int64_t end) {
      auto f = net.read(block, 1, begin, end, between);
      f.out = read.get() + begin * net.hidden;
      activate(f);
      weights.apply(block.linears[1], position + 1, begin, end, read.get(), update);
      if (gates) weights.apply(*block.gate, position + 2, begin, end, net.context, gates);
      const int64_t offset = begin * net.hidden;
      gate(GateElements<T>{(end - begin) * net.hidden, in + offset, update + offset,
                           gates ? gates + offset : nullptr, out + offset});
    }});
  }
  const int64_t position = 1 + blocks * (net.gated ? 3 : 2);
  if (y)
    stages.push_back({[&, position, h = plane(blocks, 0)](int64_t begin, int64_t end) {
      weights.apply(net.last, position, begin, end, h, y);
    }});
  net.run(stages, net.work());
}

// Gradients of the weights and biases of all layers: of each, the gradient of its outputs and its inputs.
template <typename T>
struct WeightGradient {
  const Linear<T>* layer;
  const T *gradient, *inputs;
  T *weight, *bias;
};

template <typename T>
void sum_weights(const Network<T>& net, const std::vector<WeightGradient<T>>& of) {
  struct Part {
    const WeightGradient<T>* of;
    int64_t begin, end;  // outputs
  };
  std::vector<Part> parts;
  for (const auto& w : of)
    for (int64_t i = 0; i < w.layer->out; i += ROWS)
      parts.push_back({&w, i, std::min(w.layer->out, i + ROWS)});
  const int64_t grain = WORK * static_cast<int64_t>(parts.size()) / (net.samples * net.work() + 1);
  for_each_part(static_cast<int64_t>(parts.size()), grain, [&](int64_t first, int64_t end_of_parts) {
    std::vector<T> sum;
    for (int64_t p = first; p < end_of_parts; ++p) {
      const auto& [w, begin, end] = parts[p];
      const int64_t in = w->layer->in, out = w->layer->out, rows = end - begin;
      T* const to = w->weight + begin * in;
      double biases[ROWS] = {};
      for (int64_t n = 0; n < net.samples; n += SUMMED) {
        const int64_t count = std::min(SUMMED, net.samples - n);
        const T* from = w->gradient + n * out + begin;
        if (n) sum.resize(rows * in);
        gemm(Gemm<T>{rows, in, count, from, 1, out, w->inputs + n * in, in, n ? sum.data() : to, in});
        if (n) add(Addition<T>{rows * in, sum.data(), to});
        add_rows(RowSums<T>{count, rows, out, from, biases});
      }
      for (int64_t j = 0; j < rows; ++j) w->bias[begin + j] = static_cast<T>(biases[j]);
    }
  });
}

// dx = dy W for rows [begin, end)
template <typename T>
void pull(const Linear<T>& layer, int64_t begin, int64_t end, const T* dy, T* dx) {
  gemm(Gemm<T>{end - begin, layer.in, layer.out, dy + begin * layer.out, layer.out, 1, layer.weight, layer.in,
               dx + begin * layer.in, layer.in});
}

// The gradient by x of a norm, from the one by its result, and the gradients of its parameters.
template <typename T>
struct NormBackward {
  std::vector<T> factor, mean_dz, slope, mean;

  void sum(const Network<T>& net, const Norm<T>& norm, const T* x, const T* dz, T* dweight, T* dbias) {
    const int64_t n = net.samples, width = net.hidden;
    std::vector<double> sums(width, 0.), products(width, 0.);
    for_each_part((width + UNITS - 1) / UNITS, ELEMENTS / (UNITS * n), [&](int64_t begin, int64_t end) {
      const int64_t from = begin * UNITS, count = std::min(width, end * UNITS) - from;
      add_rows(RowSums<T>{n, count, width, dz + from, sums.data() + from, x + from, norm.mean.data() + from,
                          products.data() + from});
    });
    for (auto* v : {&factor, &mean_dz, &slope, &mean}) v->resize(width);
    for (int64_t j = 0; j < width; ++j) {
      dbias[j] = static_cast<T>(sums[j]);
      dweight[j] = static_cast<T>(products[j] * norm.reciprocal[j]);
      factor[j] = norm.scale[j];
      mean[j] = static_cast<T>(norm.mean[j]);
      mean_dz[j] = static_cast<T>(net.of_batch ? sums[j] / n : 0);
      slope[j] = static_cast<T>(net.of_batch ? products[j] / n * norm.reciprocal[j] * norm.reciprocal[j] : 0);
    }
  }
  void apply(int64_t rows, int64_t width, const T* x, const T* dz, const T* added, T* out) const {
    norm_backward(NormGradients<T>{rows, width, x, dz, factor.data(), mean_dz.data(), slope.data(),
                                   mean.data(), added, out});
  }
};

template <typename T>
void backward(const Network<T>& net, const T* hidden, const T* dy, T* dx, T* dcontext, T* dparameters) {
  const int64_t count = net.elements(), width = net.hidden, each = net.gated ? 4 : 2;
  const int64_t blocks = static_cast<int64_t>(net.blocks.size());
  const bool normed = blocks && !net.blocks[0].norms.empty();
  // per block: gradients by the update, by the gates and by the first layer's output, and what the two layers
  // read
  constexpr int64_t PLANES = 5;
  const Buffer<T> own((blocks * PLANES + 2) * count), joined(net.samples * net.first.in),
      pulled(net.samples * std::max(net.first.in, net.contexts));
  const auto plane = [&](int64_t b, int64_t place) { return own.get() + (b * PLANES + place) * count; };
  T *const d = plane(blocks, 0), *const by_read = plane(blocks, 1);
  std::vector<NormBackward<T>> norms(normed ? 2 * blocks : 0);
  std::vector<WeightGradient<T>> sums;
  T* next = dparameters;
  const auto vector = [&] { return std::exchange(next, next + width); };
  const auto sum_of = [&](const Linear<T>& layer, const T* gradient, const T* inputs) {
    T* const weight = next;
    next += layer.in * layer.out + layer.out;
    sums.push_back({&layer, gradient, inputs, weight, next - layer.out});
  };
  std::vector<std::vector<Stage>> of_blocks;  // the first block runs last
  sum_of(net.first, d, net.gated ? joined.get() : net.x);
  for (int64_t b = 0; b < blocks; ++b) {
    const Block<T>& block = net.blocks[b];
    const T *const in = hidden + b * each * count, *const between = in + count;
    const T *const update = net.gated ? in + 2 * count : nullptr, *const gates =
                                                                      net.gated ? in + 3 * count : nullptr;
    T *const dupdate = plane(b, 0), *const dgates = plane(b, 1), *const dbetween = plane(b, 2),
             *const read0 = plane(b, 3), *const read1 = plane(b, 4);
    T* dnorm[2][2] = {};
    for (int place = 0; place < 2; ++place) {
      if (normed)
        for (T*& p : dnorm[place]) p = vector();
      sum_of(block.linears[place], place ? dupdate : dbetween, place ? read1 : read0);
    }
    if (net.gated) sum_of(*block.gate, dgates, net.context);
    std::vector<Stage> stages;
    stages.push_back({[=, &net, &block, &pulled](int64_t begin, int64_t end) {
      const int64_t offset = begin * width, elements = (end - begin) * width;
      if (net.gated) {
        gate_backward(GateGradients<T>{elements, d + offset, update + offset, gates + offset,
                                       dupdate + offset, dgates + offset});
        if (dcontext) {
          pull(*block.gate, begin, end, dgates, pulled.get());
          add(Addition<T>{(end - begin) * net.contexts, pulled.get() + begin * net.contexts,
                          dcontext + begin * net.contexts});
        }
      } else {
        std::copy_n(d + offset, elements, dupdate + offset);
      }
      pull(block.linears[1], begin, end, dupdate, dbetween);
      auto f = net.read(block, 1, begin, end, between);
      f.out = read1 + offset;
      f.gradient = f.gradient_out = dbetween + offset;
      activate(f);
    }});
    const auto sum_norm = [&](int place, const T* x, const T* dz) {
      if (normed)
        stages.back().then = [&net, x, dz, &norm = block.norms[place], &of = norms[2 * b + place],
                              weight = dnorm[place][0],
                              bias = dnorm[place][1]] { of.sum(net, norm, x, dz, weight, bias); };
    };
    sum_norm(1, between, dbetween);
    stages.push_back({[=, &net, &block, &norms](int64_t begin, int64_t end) {
      const int64_t offset = begin * width;
      if (normed)
        norms[2 * b + 1].apply(end - begin, width, between + offset, dbetween + offset, nullptr,
                               dbetween + offset);
      pull(block.linears[0], begin, end, dbetween, by_read);
      auto f = net.read(block, 0, begin, end, in);
      f.out = read0 + offset;
      f.gradient = by_read + offset;
      f.added = normed ? nullptr : d + offset;
      f.gradient_out = (normed ? by_read : d) + offset;
      activate(f);
    }});
    sum_norm(0, in, by_read);
    if (normed)
      stages.push_back({[=, &norms](int64_t begin, int64_t end) {
        const int64_t offset = begin * width;
        norms[2 * b].apply(end - begin, width, in + offset, by_read + offset, d + offset, d + offset);
      }});
    of_blocks.push_back(std::move(stages));
  }
  sum_of(net.last, dy, hidden + blocks * each * count);

  std::vector<Stage> stages;
  stages.push_back({[&](int64_t begin, int64_t end) {
    pull(net.last, begin, end, dy, d);
    if (net.gated) net.join(begin, end, joined.get());
  }});
  for (int64_t b = blocks; b-- > 0;)
    for (Stage& stage : of_blocks[b]) stages.push_back(std::move(stage));
  stages.push_back({[&](int64_t begin, int64_t end) {
    pull(net.first, begin, end, d, pulled.get());
    for (int64_t i = begin; i < end; ++i) {
      const T* from = pulled.get() + i * net.first.in;
      std::copy_n(from, net.features, dx + i * net.features);
      for (int64_t j = 0; dcontext && j < net.contexts; ++j)
        dcontext[i * net.contexts + j] += from[net.features + j];
    }
  }});
  net.run(stages, net.work());
  sum_weights(net, sums);
}

template <typename F>
void for_dtype(const char* op, const Tensor& x, const F& f) {
  expect_shape(op, "x", x, {ANY, ANY});
  expect_dtype(op, "x", x, {ScalarType::Float, ScalarType::Double});
  STD_TORCH_CHECK(x.size(0) > 0, op, ": x: got no samples, expected at least one");
  x.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}

std::tuple<Tensor, Tensor, Tensor> residual_network(const Tensor& x, const std::optional<Tensor>& context,
                                                    const std::vector<Tensor>& parameters,
                                                    const std::vector<Tensor>& running, int64_t blocks,
                                                    const std::string& activation, bool batch_norm,
                                                    double eps, bool keep, bool /*context_gradient*/) {
  std::optional<Tensor> y, hidden, statistics;
  for_dtype("residual_network", x, [&](auto t) {
    using T = decltype(t);
    Network<T> net("residual_network", x, context, parameters, running, blocks, activation, batch_norm, eps);
    y = empty(x, {net.samples, net.outputs});
    hidden = keep ? empty(x, {net.planes(), net.samples, net.hidden}) : empty(x, {0});
    statistics = net.of_batch && blocks ? empty(x, {4 * blocks, net.hidden}) : empty(x, {0});
    forward(net, y->mutable_data_ptr<T>(), keep ? hidden->mutable_data_ptr<T>() : nullptr,
            statistics->mutable_data_ptr<T>());
  });
  return {*y, *hidden, *statistics};
}

std::tuple<Tensor, Tensor, Tensor> residual_network_backward(
    const Tensor& x, const std::optional<Tensor>& context, const std::vector<Tensor>& parameters,
    const std::vector<Tensor>& running, const Tensor& hidden, const Tensor& statistics, int64_t blocks,
    const std::string& activation, bool batch_norm, double eps, bool context_gradient, const Tensor& dy_) {
  const char* op = "residual_network_backward";
  std::optional<Tensor> dx, dcontext, dparameters;
  for_dtype(op, x, [&](auto t) {
    using T = decltype(t);
    Network<T> net(op, x, context, parameters, running, blocks, activation, batch_norm, eps);
    const Tensor dy = torch::stable::contiguous(dy_);
    expect_tensor(op, "dy", dy, {net.samples, net.outputs}, x.scalar_type(), x);
    std::optional<Buffer<T>> again;
    const T* kept;
    if (hidden.numel()) {
      expect_tensor(op, "hidden", hidden, {net.planes(), net.samples, net.hidden}, x.scalar_type(), x);
      kept = hidden.const_data_ptr<T>();
      if (net.of_batch && blocks) {
        expect_tensor(op, "statistics", statistics, {4 * blocks, net.hidden}, x.scalar_type(), x);
        const T* from = statistics.const_data_ptr<T>();
        for (int64_t place = 0; place < 2 * blocks; ++place, from += 2 * net.hidden)
          for (int64_t j = 0; j < net.hidden; ++j)
            net.blocks[place / 2].norms[place % 2].set(j, from[j], from[net.hidden + j], eps);
      }
    } else {
      again.emplace(net.planes() * net.elements());
      std::vector<T> found(4 * blocks * net.hidden);
      forward<T>(net, nullptr, again->get(), found.data());
      kept = again->get();
    }
    int64_t total = 0;
    for (const Tensor& p : parameters) total += p.numel();
    const bool wanted = context_gradient && context;
    dx = empty(x, {net.samples, net.features});
    dcontext = wanted ? torch::stable::new_zeros(*context, {net.samples, net.contexts}) : empty(x, {0});
    dparameters = empty(x, {total});
    backward<T>(net, kept, dy.const_data_ptr<T>(), dx->mutable_data_ptr<T>(),
                wanted ? dcontext->mutable_data_ptr<T>() : nullptr, dparameters->mutable_data_ptr<T>());
  });
  return {*dx, *dcontext, *dparameters};
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("residual_network", TORCH_BOX(&fastflow::cpu::residual_network));
  m.impl("residual_network_backward", TORCH_BOX(&fastflow::cpu::residual_network_backward));
}
