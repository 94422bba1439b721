// fastflow_C::masked_inverse and masked_solve on the CPU.
//
// A thread takes a tile of samples through all features; the samples are the lanes of vectors, and a unit is
// a row. As in a triangular solve, features come in blocks. What a block's units and parameters get from
// those before the block is one matrix product for each layer. Inside of the block, the units of a degree are
// a small product with those of the block before them.
//
// Operations per sample: a multiplication and an addition for each weight that is not masked, half of those
// of a dense forward pass. For D features, H units in each of two hidden layers and P parameters of a
// feature, that is H (D + H + P D). Bytes: z, x and the log-det once, and for each tile of 64 samples
// (float64: 32) the weights that are not masked, which stay in the cache or come from the next one. A product
// takes 128 operations for each of those weights, so that operations are the bound: at D = 64, H = 512, P =
// 2, N = 1000 0.36 billion, at D = 784, H = 1024, N = 256 0.89 billion.
#include "stable.h"
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/gemm.h"
#include "cpu/sums.h"
#include "cpu/tensors.h"
#include "cpu/transpose.h"
#include "masked_inverse/arguments.h"
#include "spline/form.h"

namespace fastflow::cpu {
namespace {

constexpr int64_t UNITS = 48;         // of a layer in a block: some panels of a product
constexpr int64_t MOST_DEGREES = 64;  // of a block
constexpr int64_t IN_A_ROW = 128;     // products that are added one by one: longer sums lose more digits

// A network whose units have degrees.
struct Degrees : MaskedNetwork {
  std::vector<int64_t> ends;  // [last, features]

  Degrees(const char* op, const char* name, const Tensor& like, const std::optional<Tensor>& weights,
          const Tensor& ends_, const std::vector<int64_t>& widths, const std::vector<int64_t>& layers,
          int64_t each)
      : MaskedNetwork(op, name, like, weights, ends_, widths, layers, each), ends(last * features) {
    const int64_t* from = ends_.const_data_ptr<int64_t>();
    for (int64_t l = 0; l < last; ++l)
      for (int64_t k = 0, before = 0; k < features; ++k) {
        const int64_t end = from[l * ends_.stride(0) + k * ends_.stride(1)];
        STD_TORCH_CHECK(end >= before && end <= widths[l] && (k < features - 1 || end == widths[l]), op,
                        ": ends: got ", end, " at [", l, ", ", k, "], expected ascending numbers to ",
                        widths[l]);
        ends[l * features + k] = before = end;
      }
  }
  // The first unit of a degree: feature k, or the parameters of feature k.
  int64_t first(int64_t layer, int64_t k) const {
    if (layer == 0) return k;
    if (layer > last) return k * each;
    return k ? ends[(layer - 1) * features + k - 1] : 0;
  }
  // Number of units that the next layer's units of degree k read.
  int64_t known(int64_t layer, int64_t k) const { return layer ? first(layer, k + 1) : k; }
  // Number of degrees in a block.
  int64_t block() const {
    int64_t widest = 1;
    for (int64_t l = 1; l <= last; ++l) widest = std::max(widest, sizes[l]);
    return std::clamp<int64_t>((UNITS * features + widest - 1) / widest, 1, MOST_DEGREES);
  }
  // Units of a layer in a block, at most.
  int64_t widest_block() const {
    int64_t most = 0;
    for (int64_t l = 0; l <= last + 1; ++l)
      for (int64_t k = 0; k < features; k += block())
        most = std::max(most, first(l, std::min(k + block(), features)) - first(l, k));
    return most;
  }
  bool gated(int64_t layer) const { return flags(layer) & GATE; }
  bool activated_by_next(int64_t layer) const { return layer && flags(layer + 1) & BEFORE; }
  bool added_later(int64_t layer) const { return layer + 2 <= last && flags(layer + 2) & SKIP; }
};

// Rows of samples, [N, size], of which columns become rows of a tile.
template <typename T>
struct Rows {
  const T* data = nullptr;  // null: none
  int64_t row = 0;

  Rows() = default;
  Rows(const Tensor& t) : data(t.const_data_ptr<T>()), row(t.stride(0)) {}
  Rows(const std::optional<Tensor>& t) {
    if (t) *this = Rows(*t);
  }
  explicit operator bool() const { return data; }
  void load(int64_t sample, int64_t count, int64_t from, int64_t to, T* tile, int64_t width) const {
    transpose({count, to - from, data + sample * row + from, row, tile, width});
  }
};

Tensor rows_of(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 || t.numel() == 0 ? t : torch::stable::contiguous(t);
}
std::optional<Tensor> rows_of(const std::optional<Tensor>& t) {
  return t ? std::optional(rows_of(*t)) : std::nullopt;
}

// Samples of a tile: as many as four vectors, half as many if there are too few tiles for all threads.
template <typename T>
int64_t tile_of(int64_t samples) {
  const int64_t most = 256 / sizeof(T), threads = torch::stable::get_num_threads();
  return samples < most * threads ? most / 2 : most;
}

// Runs f(first tile, last tile, count of samples of a tile), each thread once. The work is about one
// operation for each weight and sample.
template <typename F>
void for_tiles(int64_t samples, int64_t width, int64_t weights, const F& f) {
  const int64_t tiles = (samples + width - 1) / width;
  // starting a thread costs about 10 us, the time of this many operations
  const int64_t grain = std::max<int64_t>(1, (1 << 19) / (width * weights));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    f(begin, end, [&](int64_t tile) { return std::min(width, samples - tile * width); });
  });
}

// Memory of a tile, in rows of `width` elements.
template <typename T>
class Arena {
 public:
  Arena(int64_t rows, int64_t width) : width_(width), memory_(rows * width), next_(memory_.get()) {}
  T* take(int64_t rows) { return (next_ += rows * width_) - rows * width_; }

 private:
  const int64_t width_;
  const Buffer<T> memory_;
  T* next_;
};

// A product over columns `from` to `to`, of which some(first column, sums, start of the sums) adds IN_A_ROW.
// The sums are `count` elements, like `part`.
template <typename T, typename F>
void in_parts(int64_t from, int64_t to, const F& some, Start start, T* sums, T* part, int64_t count) {
  some(from, sums, start);
  for (int64_t p = from + IN_A_ROW; p < to; p += IN_A_ROW) {
    some(p, part, Start::zero);
    add(Addition<T>{count, part, sums});
  }
}

template <typename T>
struct Transformer {
  std::optional<Splines<T>> splines;
  T half_turn, limit;
  AffineInverse<T> affine;
  bool scale_first_in_params;
};

// A context of each sample, whose products with `weights` are added to those of the first layer.
template <typename T>
struct Context {
  int64_t features = 0;
  Rows<T> rows;
  const T* weights = nullptr;
};

// One tile of samples in the inverse.
template <typename T>
class Inverse {
 public:
  Inverse(const Degrees& net, const T* weights, const Rows<T>& added, bool per_sample, const Rows<T>& gates,
          const Context<T>& context, Activation activation, const Transformer<T>& transformer,
          const int64_t* order, const T* waves, int64_t width)
      : net_(net),
        weights_(weights),
        added_(added),
        per_sample_(per_sample),
        gates_(gates),
        context_(context),
        activation_(activation),
        transformer_(transformer),
        order_(order),
        waves_(waves),
        width_(width),
        block_(net.block()),
        arena_(rows(), width) {
    z_ = arena_.take(net.features);
    x_ = arena_.take(net.features);
    log_det_ = arena_.take(1);
    log_slopes_ = arena_.take(1);
    log_slope_ = arena_.take(1);
    units_.push_back(x_), read_.push_back(waves ? arena_.take(net.features) : x_),
        factors_.push_back(nullptr);
    for (int64_t l = 1; l <= net.last; ++l) {
      units_.push_back(arena_.take(net.sizes[l]));
      read_.push_back(separate(l) ? arena_.take(net.sizes[l]) : units_[l]);
      factors_.push_back(net.gated(l) ? arena_.take(net.sizes[l]) : nullptr);
    }
    params_ = arena_.take(block_ * net.each);
    part_ = arena_.take(net.widest_block());
    of_context_ = arena_.take(context.features);
  }

  // The log-det is added to log_det if there is one of an earlier inverse.
  void run(const Rows<T>& z, int64_t sample, int64_t count, T* x, T* log_det, bool earlier = false) {
    sample_ = sample, count_ = count, columns_ = padded(count);
    z.load(sample, count, 0, net_.features, z_, width_);
    if (context_.features) context_.rows.load(sample, count, 0, context_.features, of_context_, width_);
    std::fill_n(log_det_, width_, T(0));
    for (int64_t k = 0; k < net_.features; k += block_) {
      std::fill_n(log_slopes_, width_, T(0));
      block(k, std::min(k + block_, net_.features));
      add(Addition<T>{width_, log_slopes_, log_det_});
    }
    // z is not needed any more
    for (int64_t k = 0; k < net_.features; ++k) std::copy_n(x_ + k * width_, width_, z_ + order_[k] * width_);
    to_rows(ToRows<T>{count, net_.features, width_, z_, x + sample * net_.features});
    for (int64_t i = 0; i < count; ++i)
      log_det[sample + i] = earlier ? log_det[sample + i] + log_det_[i] : log_det_[i];
  }

 private:
  // Whether the activated units are apart from the units.
  bool separate(int64_t l) const { return net_.activated_by_next(l) && net_.added_later(l); }
  int64_t rows() const {
    int64_t total = (waves_ ? 3 : 2) * net_.features + 3 + block_ * net_.each + net_.widest_block() +
                    net_.total_gates() + context_.features;
    for (int64_t l = 1; l <= net_.last; ++l) total += net_.sizes[l] * (separate(l) ? 2 : 1);
    return total;
  }

  // Units `first` to `end` of a layer, from `from` to `to` of the layer before, are written to rows from
  // `first - start` on.
  void product(int64_t l, int64_t first, int64_t end, int64_t from, int64_t to, T* result, int64_t start,
               Start begin) const {
    const int64_t inputs = net_.sizes[l - 1];
    product(weights_ + net_.weights[l] + first * inputs, inputs, read_[l - 1], l, first, end, from, to,
            result, start, begin);
  }
  // The same for any rows of weights, `inputs` apart, and what they are multiplied by.
  void product(const T* weights, int64_t inputs, const T* read, int64_t l, int64_t first, int64_t end,
               int64_t from, int64_t to, T* result, int64_t start, Start begin) const {
    T* rows = result + (first - start) * width_;
    const auto some = [&](int64_t p, T* sums, Start sums_begin) {
      gemm({end - first, columns_, std::min(to - p, IN_A_ROW), weights + p, inputs, 1, read + p * width_,
            width_, sums, width_, sums_begin,
            sums_begin == Start::row ? added_.data + net_.added[l] + first : nullptr});
    };
    in_parts(from, to, some, begin, rows, part_, (end - first) * width_);
  }

  // The products with what was before the block.
  void before(int64_t l, int64_t first, int64_t end, int64_t to, T* result, int64_t start) const {
    if (first == end) return;
    if (per_sample_)
      added_.load(sample_, count_, net_.added[l] + first, net_.added[l] + end,
                  result + (first - start) * width_, width_);
    Start begin = per_sample_ ? Start::result : Start::row;
    if (l == 1 && context_.features) {
      const int64_t inputs = context_.features;
      product(context_.weights + first * inputs, inputs, of_context_, l, first, end, 0, inputs, result, start,
              begin);
      begin = Start::result;
    }
    product(l, first, end, 0, to, result, start, begin);
  }

  void block(int64_t k0, int64_t k1) {
    const Degrees& net = net_;
    for (int64_t l = 1; l <= net.last; ++l) {
      const int64_t first = net.first(l, k0), end = net.first(l, k1);
      before(l, first, end, net.first(l - 1, k0), units_[l], 0);
      if (net.gated(l))
        gates_.load(sample_, count_, net_.gates[l] + first, net_.gates[l] + end, factors_[l] + first * width_,
                    width_);
    }
    const int64_t start = k0 * net.each;
    before(net.last + 1, start, k1 * net.each, net.first(net.last, k0), params_, start);
    for (int64_t k = k0; k < k1; ++k) {
      for (int64_t l = 1; l <= net.last; ++l) {
        const int64_t first = net.first(l, k), end = net.first(l, k + 1);
        if (first == end) continue;
        product(l, first, end, net.first(l - 1, k0), net.known(l - 1, k), units_[l], 0, Start::result);
        finish_units(l, first, end);
      }
      const int64_t first = k * net.each;
      product(net.last + 1, first, first + net.each, net.first(net.last, k0), net.known(net.last, k), params_,
              start, Start::result);
      transform(k, params_ + (first - start) * width_);
      if (waves_) wave(k);
    }
  }

  void finish_units(int64_t l, int64_t first, int64_t end) {
    const int64_t at = first * width_, flags = net_.flags(l);
    const bool next = net_.activated_by_next(l);
    if (!(flags & (GATE | AFTER | SKIP)) && !next) return;
    finish({activation_, (end - first) * width_, units_[l] + at, flags & GATE ? factors_[l] + at : nullptr,
            (flags & AFTER) != 0, flags & SKIP ? units_[l - 2] + at : nullptr,
            next ? read_[l] + at : nullptr});
  }

  void transform(int64_t k, T* params) {
    const T* z = z_ + order_[k] * width_;
    T* x = x_ + k * width_;
    if (transformer_.splines) {
      spline_elements({*transformer_.splines, true, columns_, width_, z, params, x, log_slope_});
      if (transformer_.limit > 0)
        for (int64_t i = 0; i < columns_; ++i)
          if (std::abs(z[i]) > transformer_.limit) x[i] = log_slope_[i] = 0;
      add(Addition<T>{columns_, log_slope_, log_slopes_});
      if (transformer_.half_turn > 0)
        for (int64_t i = 0; i < columns_; ++i) x[i] = turned(x[i], transformer_.half_turn);
      return;
    }
    AffineInverse<T> a = transformer_.affine;
    const bool scale_first = transformer_.scale_first_in_params;
    a.count = columns_, a.z = z, a.x = x, a.log_det = log_slopes_;
    a.raw = params + (scale_first ? 0 : width_), a.shift = params + (scale_first ? width_ : 0);
    invert(a);
  }

  // What layer 1 reads of a feature.
  void wave(int64_t k) {
    const int64_t d = net_.features;
    const T *w = waves_ + k, *x = x_ + k * width_;
    T* read = read_[0] + k * width_;
    for (int64_t i = 0; i < columns_; ++i) read[i] = waved(x[i], w[0], w[d], w[2 * d], w[3 * d]);
  }

  const Degrees& net_;
  const T* weights_;
  const Rows<T> added_;
  const bool per_sample_;
  const Rows<T> gates_;
  const Context<T> context_;
  const Activation activation_;
  const Transformer<T>& transformer_;
  const int64_t* order_;
  const T* waves_;  // [4, features], or null: the features are read
  const int64_t width_, block_;
  Arena<T> arena_;
  T *z_, *x_, *log_det_, *log_slopes_, *log_slope_, *params_, *part_, *of_context_;
  std::vector<T*> units_, read_, factors_;  // of layers 0 to last: units, what the next layer reads, gates
  int64_t sample_ = 0, count_ = 0, columns_ = 0;
};

template <typename T>
Transformer<T> transformer_of(const SplineForm& form, const std::string& scale,
                              const std::string& affine_order, const std::string& params_layout,
                              double offset) {
  Transformer<T> transformer{};
  if (form.bins) {
    transformer.splines = form.splines<T>();
    transformer.half_turn = static_cast<T>(form.half_turn());
    transformer.limit = static_cast<T>(form.limit());
  }
  transformer.affine.scale = scale_of(scale);
  transformer.affine.scale_first = affine_order == "scale_first";
  transformer.affine.factor = static_cast<T>(form.factor), transformer.affine.offset = static_cast<T>(offset);
  transformer.scale_first_in_params = params_layout == "scale_shift";
  return transformer;
}

void check_permutation(const char* op, const int64_t* place, int64_t features) {
  std::vector<bool> found(features);
  for (int64_t k = 0; k < features; ++k) {
    STD_TORCH_CHECK(place[k] >= 0 && place[k] < features && !found[place[k]], op, ": order: got ", place[k],
                    " at ", k, ", expected each of 0 to ", features - 1, " once");
    found[place[k]] = true;
  }
}

std::tuple<Tensor, Tensor> masked_inverse(const Tensor& z, const Tensor& weights, const Tensor& added,
                                          const std::optional<Tensor>& gates, const Tensor& ends,
                                          const Tensor& order, const std::vector<int64_t>& widths,
                                          const std::vector<int64_t>& layers, const std::string& activation,
                                          const std::string& scale, const std::string& affine_order,
                                          const std::string& params_layout, double offset, int64_t bins,
                                          double bound, const std::string& tails,
                                          const std::string& convention, double factor, double min_bin,
                                          double min_slope, const std::optional<Tensor>& waves) {
  const char* op = "masked_inverse";
  const SplineForm form{bins, bound, tails, convention, factor, min_bin, min_slope};
  const Degrees net(op, "z", z, weights, ends, widths, layers, bins ? form.parameters(op) : 2);
  const int64_t n = z.size(0), features = net.features;
  const bool per_sample = added.dim() == 2;
  check_masked_inverse(net, z, added, gates, order, waves);
  const Tensor order_ = torch::stable::contiguous(order);
  const int64_t* place = order_.const_data_ptr<int64_t>();
  check_permutation(op, place, features);

  Tensor x = empty(z, {n, features}), log_det = empty(z, {n});
  const Tensor z_ = rows_of(z), weights_ = torch::stable::contiguous(weights), added_ = rows_of(added);
  const std::optional<Tensor> gates_ = rows_of(gates),
                              waves_ =
                                  waves ? std::optional(torch::stable::contiguous(*waves)) : std::nullopt;
  const auto run = [&](auto value) {
    using T = decltype(value);
    const auto transformer = transformer_of<T>(form, scale, affine_order, params_layout, offset);
    const int64_t width = tile_of<T>(n);
    for_tiles(n, width, net.weights[net.last + 2], [&](int64_t begin, int64_t end, const auto& count) {
      Inverse<T> inverse(net, weights_.const_data_ptr<T>(), added_, per_sample, gates_, {},
                         activation_of(activation), transformer, place,
                         waves_ ? waves_->const_data_ptr<T>() : nullptr, width);
      for (int64_t tile = begin; tile < end; ++tile)
        inverse.run(z_, tile * width, count(tile), x.mutable_data_ptr<T>(), log_det.mutable_data_ptr<T>());
    });
  };
  z.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  return {x, log_det};
}

std::tuple<Tensor, Tensor> masked_inverses(const Tensor& z, const std::optional<Tensor>& context,
                                           const Tensor& parameters, const Tensor& places, const Tensor& ends,
                                           const Tensor& order, const std::vector<int64_t>& widths,
                                           const std::vector<int64_t>& layers, const std::string& activation,
                                           const std::string& scale, const std::string& affine_order,
                                           const std::string& params_layout, double offset, int64_t bins,
                                           double bound, const std::string& tails,
                                           const std::string& convention, double factor, double min_bin,
                                           double min_slope) {
  const char* op = "masked_inverses";
  const SplineForm form{bins, bound, tails, convention, factor, min_bin, min_slope};
  expect_shape(op, "ends", ends, {ANY, ANY, ANY});
  const int64_t maps = ends.size(0), n = z.size(0);
  STD_TORCH_CHECK(maps >= 1, op, ": ends: got no transformation, expected at least 1");
  std::vector<Degrees> nets;
  for (int64_t i = 0; i < maps; ++i)
    nets.emplace_back(op, "z", z, std::nullopt, torch::stable::select(ends, 0, i), widths, layers,
                      bins ? form.parameters(op) : 2);
  const Degrees& net = nets[0];
  const int64_t features = net.features, weights = net.weights[net.last + 2];
  STD_TORCH_CHECK(net.total_gates() == 0, op, ": layers: got gates, expected none");
  if (context) expect_tensor(op, "context", *context, {n, ANY}, z.scalar_type(), z);
  const int64_t of_context = context ? context->size(1) : 0, biases = weights + net.sizes[1] * of_context;
  const int64_t each = biases + net.total();  // parameters of a transformation
  expect_tensor(op, "parameters", parameters, {ANY}, z.scalar_type(), z);
  expect_tensor(op, "places", places, {maps, each}, ScalarType::Long, z);
  expect_tensor(op, "order", order, {maps, features}, ScalarType::Long, z);
  const Tensor order_ = torch::stable::contiguous(order), places_ = torch::stable::contiguous(places);
  const int64_t *orders = order_.const_data_ptr<int64_t>(), *place = places_.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < maps; ++i) check_permutation(op, orders + i * features, features);

  Tensor x = empty(z, {n, features}), log_det = empty(z, {n});
  const Tensor z_ = rows_of(z), parameters_ = torch::stable::contiguous(parameters);
  const std::optional<Tensor> context_ = rows_of(context);
  const auto run = [&](auto value) {
    using T = decltype(value);
    const auto transformer = transformer_of<T>(form, scale, affine_order, params_layout, offset);
    const T* from = parameters_.const_data_ptr<T>();
    const int64_t stored = parameters.numel();
    const Buffer<T> sorted(maps * each);
    for (int64_t i = 0; i < maps * each; ++i) {
      const int64_t at = place[i];
      STD_TORCH_CHECK(at >= -1 && at < stored, op, ": places: got ", at, ", expected -1 to ", stored - 1);
      sorted.get()[i] = at < 0 ? T(0) : from[at];
    }
    const int64_t width = tile_of<T>(n);
    for_tiles(n, width, maps * weights, [&](int64_t begin, int64_t end, const auto& count) {
      for (int64_t i = 0; i < maps; ++i) {
        const T* own = sorted.get() + i * each;
        Rows<T> added;
        added.data = own + biases;
        Inverse<T> inverse(nets[i], own, added, false, {}, {of_context, context_, own + weights},
                           activation_of(activation), transformer, orders + i * features, nullptr, width);
        const Rows<T> inputs(i ? x : z_);
        for (int64_t tile = begin; tile < end; ++tile)
          inverse.run(inputs, tile * width, count(tile), x.mutable_data_ptr<T>(),
                      log_det.mutable_data_ptr<T>(), i > 0);
      }
    });
  };
  z.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  return {x, log_det};
}

// One tile of samples in the solve with the transposed Jacobian. The features come from the last one to the
// first, and a unit gets its gradient once those of all parameters that depend on it are known.
template <typename T>
class Solve {
 public:
  Solve(const Degrees& net, const T* weights, const Rows<T>& v, const Rows<T>& slope, const Rows<T>& jac,
        const Rows<T>& dparams, const Rows<T>& inner, const Rows<T>& outer, const Rows<T>& of_features,
        int64_t width)
      : net_(net),
        weights_(weights),
        v_(v),
        slope_(slope),
        jac_(jac),
        dparams_(dparams),
        inner_(inner),
        outer_(outer),
        of_features_(of_features),
        width_(width),
        block_(net.block()),
        arena_(rows(), width) {
    right_ = arena_.take(net.features);
    slopes_ = arena_.take(net.features);
    reads_ = of_features ? arena_.take(net.features) : nullptr;
    sums_.push_back(arena_.take(net.features));
    products_.push_back(nullptr), units_.push_back(nullptr);
    for (int64_t l = 1; l <= net.last; ++l) {
      sums_.push_back(arena_.take(net.sizes[l]));
      products_.push_back(arena_.take(net.sizes[l]));
      units_.push_back(net.flags(l) & SKIP ? arena_.take(net.sizes[l]) : nullptr);
    }
    products_.push_back(arena_.take(net.sizes[net.last + 1]));
    jacs_ = arena_.take(block_ * net.each);
    shifts_ = arena_.take(block_ * net.each);
    part_ = arena_.take(net.widest_block());
    inners_ = arena_.take(net.units());
    outers_ = arena_.take(net.units());
  }

  void run(int64_t sample, int64_t count, T* u) {
    sample_ = sample, count_ = count, columns_ = padded(count);
    v_.load(sample, count, 0, net_.features, right_, width_);
    slope_.load(sample, count, 0, net_.features, slopes_, width_);
    if (reads_) of_features_.load(sample, count, 0, net_.features, reads_, width_);
    for (int64_t k = 0; k < net_.features; ++k)  // samples that fill the last vector
      std::fill(slopes_ + k * width_ + count, slopes_ + k * width_ + columns_, T(1));
    const int64_t blocks = (net_.features + block_ - 1) / block_;
    for (int64_t b = blocks - 1; b >= 0; --b) block(b * block_, std::min((b + 1) * block_, net_.features));
    to_rows(ToRows<T>{count, net_.features, width_, right_, u + sample * net_.features});
  }

 private:
  int64_t rows() const {
    return (of_features_ ? 4 : 3) * net_.features + 4 * net_.units() + net_.total() + 2 * block_ * net_.each +
           net_.widest_block();
  }

  // The gradients of units `first` to `end` of layer l by products `from` to `to` of the next layer, from
  // zero or added to what they are.
  void product(int64_t l, int64_t first, int64_t end, int64_t from, int64_t to, Start begin) const {
    const int64_t inputs = net_.sizes[l];
    const T* weights = weights_ + net_.weights[l + 1] + first;
    T* rows = sums_[l] + first * width_;
    const auto some = [&](int64_t p, T* sums, Start sums_begin) {
      gemm({end - first, columns_, std::min(to - p, IN_A_ROW), weights + p * inputs, 1, inputs,
            products_[l + 1] + p * width_, width_, sums, width_, sums_begin});
    };
    in_parts(from, to, some, begin, rows, part_, (end - first) * width_);
  }

  void block(int64_t k0, int64_t k1) {
    const Degrees& net = net_;
    for (int64_t l = 0; l <= net.last; ++l) {
      const int64_t first = net.first(l, k0), end = net.first(l, k1);
      if (first == end) continue;
      product(l, first, end, net.first(l + 1, k1), net.sizes[l + 1], Start::zero);
      if (l == 0) continue;
      const int64_t column = net.added[l] + first, last = net.added[l] + end;
      if (inner_) inner_.load(sample_, count_, column, last, inners_ + column * width_, width_);
      if (outer_) outer_.load(sample_, count_, column, last, outers_ + column * width_, width_);
    }
    const int64_t start = k0 * net.each;
    jac_.load(sample_, count_, start, k1 * net.each, jacs_, width_);
    if (dparams_) dparams_.load(sample_, count_, start, k1 * net.each, shifts_, width_);
    for (int64_t k = k1 - 1; k >= k0; --k) {
      product(0, k, k + 1, net.first(1, k + 1), net.first(1, k1), Start::result);
      const int64_t first = k * net.each, at = (first - start) * width_;
      T* right = right_ + k * width_;
      solve({columns_, net.each, width_, right, sums_[0] + k * width_, slopes_ + k * width_, jacs_ + at,
             dparams_ ? shifts_ + at : nullptr, reads_ ? reads_ + k * width_ : nullptr, right,
             products_[net.last + 1] + first * width_});
      for (int64_t l = net.last; l >= 1; --l) units(l, net.first(l, k), net.first(l, k + 1), k, k1);
    }
  }

  void units(int64_t l, int64_t first, int64_t end, int64_t k, int64_t k1) {
    if (first == end) return;
    product(l, first, end, net_.first(l + 1, k), net_.first(l + 1, k1), Start::result);
    const int64_t at = first * width_, factor = (net_.added[l] + first) * width_;
    pull({(end - first) * width_, sums_[l] + at, outer_ ? outers_ + factor : nullptr,
          net_.added_later(l) ? units_[l + 2] + at : nullptr, inner_ ? inners_ + factor : nullptr,
          units_[l] ? units_[l] + at : nullptr, products_[l] + at});
  }

  const Degrees& net_;
  const T* weights_;
  const Rows<T> v_, slope_, jac_, dparams_, inner_, outer_, of_features_;
  const int64_t width_, block_;
  Arena<T> arena_;
  T *right_, *slopes_, *reads_, *jacs_, *shifts_, *part_, *inners_, *outers_;
  // of layers 0 to last (+ 1): sums of gradients; gradients of products; of units that are added to others
  std::vector<T*> sums_, products_, units_;
  int64_t sample_ = 0, count_ = 0, columns_ = 0;
};

Tensor masked_solve(const Tensor& v, const Tensor& slope, const Tensor& jac,
                    const std::optional<Tensor>& dparams, const std::optional<Tensor>& inner,
                    const std::optional<Tensor>& outer, const Tensor& weights, const Tensor& ends,
                    const std::vector<int64_t>& widths, const std::vector<int64_t>& layers,
                    const std::optional<Tensor>& of_features) {
  const char* op = "masked_solve";
  expect_shape(op, "jac", jac, {ANY, ANY, ANY});
  const int64_t each = jac.size(2);
  const Degrees net(op, "v", v, weights, ends, widths, layers, each);
  const int64_t n = v.size(0), features = net.features;
  check_masked_solve(net, v, slope, jac, dparams, inner, outer, of_features);

  Tensor u = empty(v, {n, features});
  const Tensor v_ = rows_of(v), slope_ = rows_of(slope), jac_ = torch::stable::contiguous(jac),
               weights_ = torch::stable::contiguous(weights);
  const std::optional<Tensor> inner_ = rows_of(inner), outer_ = rows_of(outer), reads = rows_of(of_features),
                              dparams_ =
                                  dparams ? std::optional(torch::stable::contiguous(*dparams)) : std::nullopt;
  const auto run = [&](auto value) {
    using T = decltype(value);
    const int64_t width = tile_of<T>(n);
    for_tiles(n, width, net.weights[net.last + 2], [&](int64_t begin, int64_t end, const auto& count) {
      Solve<T> solve(net, weights_.const_data_ptr<T>(), v_, slope_, jac_, dparams_, inner_, outer_, reads,
                     width);
      for (int64_t tile = begin; tile < end; ++tile)
        solve.run(tile * width, count(tile), u.mutable_data_ptr<T>());
    });
  };
  v.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  return u;
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("masked_inverse", TORCH_BOX(&fastflow::cpu::masked_inverse));
  m.impl("masked_inverses", TORCH_BOX(&fastflow::cpu::masked_inverses));
  m.impl("masked_solve", TORCH_BOX(&fastflow::cpu::masked_solve));
}
