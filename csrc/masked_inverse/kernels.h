#pragma once
// The inverse of a masked autoregressive transformation in one pass, and the solve of its gradient: CUDA
// kernels written for block.h, and the host code that launches them on any device. One launch for a layer of
// a flow.
//
// A block handles a tile of samples. Their hidden units stay in shared memory (in global scratch if they do
// not fit), the weights pass through from the L2 cache. Degrees are taken in blocks, as many as ROWS units
// and WEIGHTS weights admit. What units of lower degrees contribute to a block is one product with a dense
// rectangle of each matrix, for all layers at once. The weights inside the block go to shared memory. Then
// come the degrees, one after the other: a phase for each layer adds what this degree contributes to the rest
// of the block, and completes the units of this degree in the next layer. If one degree exceeds ROWS or
// WEIGHTS, it has its layers one after the other, each as a dense product. No masked weight is read by a
// product, so the arithmetic is that of the weights that are not masked.
//
// The order of the sums depends on the network and the dtype only, so neither the number of samples nor the
// size of shared memory changes the bits of a sample.
//
// Bound, predicted, nothing was measured on a GPU: a tile takes about D (L + 2) phases (splines: L + 3), each
// a barrier and a few reads of shared memory. A tile of 8 samples reads 4 bytes of weights from L2 for 8
// products, a tile of 32 for 32. docs/backends.md counts both.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "stable.h"
#include <torch/csrc/stable/ops.h>
#include "block.h"
#include "masked_inverse/arguments.h"
#include "masked_inverse/network.h"
#include "masked_inverse/transformer.h"

namespace fastflow {

// What both kernels share: the memory of a block of threads, and a block of degrees.
template <typename T, int SAMPLES, bool IN_SHARED>
struct MaskedTile {
  static constexpr int THREADS = 256, QUADS = SAMPLES / 4;
  static constexpr int RESIDENT = IN_SHARED || sizeof(T) == 4 ? 2 : 1;  // more registers, or they would spill
  static constexpr int DEGREES = 32, ROWS = 256, WEIGHTS = 32768 / sizeof(T);  // of a block of degrees
  // A thread of a dense product has TOGETHER units of eight samples. It loads 64 bytes of weights at once;
  // with units in scratch 32, for which the registers suffice.
  static constexpr int OCTETS = SAMPLES / 8, TOGETHER = OCTETS == 1 ? 1 : 4,
                       WIDE = (IN_SHARED ? 64 : 32) / (sizeof(T) * TOGETHER);
  using Four = Pack<T, 4>;  // a unit of four samples
  struct Sums {
    Four of[TOGETHER][2];
  };

  KernelNetwork network;
  Span<const T> weights;
  Span<const int64_t> ends;
  Span<T> scratch;  // the units of each block of threads, unless they are in shared memory
  int64_t samples;

  struct Memory {
    Span<int> window;       // [layers, DEGREES + 2]
    Span<int> rows, stage;  // by layer: its first row of `sums`, its first weight of `staged`
    Span<int> picked;       // the number of degrees of the block; 0: one, which exceeds the memory
    Span<T> sums;           // [ROWS, SAMPLES]
    Span<T> staged;         // the weights inside the block; those of a row are an odd number
    Span<T> units;          // [rows of the network, SAMPLES]
    int stride;             // of the window

    // Units of a layer of degrees below the i-th of the window (features: of this degree too).
    FASTFLOW_HD int at(int l, int i) const { return window[l * stride + i]; }
    FASTFLOW_HD int all(int l) const { return at(l, DEGREES + 1); }
  };

  FASTFLOW_HD static int64_t rounded(int64_t elements) { return (elements + 7) / 8 * 8; }  // to 32 bytes
  int64_t shared_bytes() const {
    const int64_t layers = network.last + 2;
    return sizeof(int) * rounded(layers * (DEGREES + 4) + 1) +
           sizeof(T) * (SAMPLES * (ROWS + (IN_SHARED ? network.rows : 0)) + WEIGHTS);
  }
  FASTFLOW_HD int64_t tiles() const { return (samples + SAMPLES - 1) / SAMPLES; }
  FASTFLOW_HD int64_t scratch_of_block() const { return int64_t(SAMPLES) * network.rows; }

  template <class Block>
  FASTFLOW_HD Memory allocate(Block& block) const {
    const int layers = network.last + 2, stride = DEGREES + 2;
    const Span<int> numbers = block.template shared<int>(rounded(layers * (DEGREES + 4) + 1));
    const auto part = [&](int first, int size) { return Span<int>{numbers.data + first, size}; };
    const int64_t size = scratch_of_block();
    return {part(0, layers * stride),
            part(layers * stride, layers),
            part(layers * (stride + 1), layers),
            part(layers * (stride + 2), 1),
            block.template shared<T>(ROWS * SAMPLES),
            block.template shared<T>(WEIGHTS),
            IN_SHARED ? block.template shared<T>(size) : Span<T>{scratch.data + block.index * size, size},
            stride};
  }

  // The window of the degrees from `base` on.
  FASTFLOW_HD void load_window(int thread, int base, const Memory& m) const {
    thread = opaque(thread);
    const int layers = network.last + 2;
    for (int item = thread; item < layers * m.stride; item += THREADS) {
      const int l = item / m.stride, i = item % m.stride;
      const int64_t k = i > DEGREES ? network.features : least(base + i, network.features);
      int64_t units = l == 0 ? k : k * network.each;
      if (l > 0 && l <= network.last && k > 0) {
        units = ends[(l - 1) * int64_t(network.features) + k - 1];
        units = units < 0 ? 0 : least(units, network.layer[l].width);  // `ends` may have any values
      }
      m.window[item] = static_cast<int>(units);
    }
  }

  // Whether the degrees `from` to `to` of the window fit in a block.
  FASTFLOW_HD bool fits(int from, int to, const Memory& m) const {
    const int end = network.last + 1;
    int64_t units = 0, weights_inside = 0;
    for (int l = 0; l <= end; ++l) {
      bool ascending = true;
      for (int i = from; i < to; ++i) ascending &= m.at(l, i + 1) >= m.at(l, i);
      units += m.at(l, to) - m.at(l, from);
      if (!ascending || units > ROWS) return false;
      if (l > 0) weights_inside += int64_t(m.at(l, to) - m.at(l, from)) * row_stride(l, from, to, m);
    }
    return weights_inside <= WEIGHTS;
  }

  // The most degrees that fit, with the last one `to` (REVERSED) or the first one `from` in the window.
  template <bool REVERSED>
  FASTFLOW_HD void pick(int thread, int edge, int available, const Memory& m) const {
    thread = opaque(thread);
    if (thread >= DEGREES) return;
    const auto from = [&](int degrees) { return REVERSED ? edge - degrees : edge; };
    const auto good = [&](int degrees) {
      return degrees <= available && fits(from(degrees), from(degrees) + degrees, m);
    };
    const int degrees = thread + 1;
    if (good(degrees)) {
      if (good(degrees + 1)) return;
      set(degrees, from(degrees), from(degrees) + degrees, m);
    } else if (degrees == 1) {
      set(0, 0, 0, m);
    }
  }

  // Distance of the rows of a layer's weights inside a block.
  FASTFLOW_HD int row_stride(int l, int from, int to, const Memory& m) const {
    return (m.at(l - 1, to) - m.at(l - 1, from)) | 1;
  }

  FASTFLOW_HD void stage(int thread, int from, int to, const Memory& m) const {
    thread = opaque(thread);
    for (int l = 1; l <= network.last + 1; ++l) {
      const KernelNetwork::Layer& layer = network.layer[l];
      const int row = m.at(l, from), column = m.at(l - 1, from), stride = row_stride(l, from, to, m);
      const int rows = m.at(l, to) - row, columns = m.at(l - 1, to) - column;
      constexpr int BATCH = 8, WARPS = THREADS / 32;  // a warp has rows, and loads eight of them at once
      for (int c = thread % 32; c < columns; c += 32)
        for (int r = thread / 32; r < rows; r += BATCH * WARPS) {
          T found[BATCH];
          FASTFLOW_UNROLL
          for (int b = 0; b < BATCH; ++b) {
            const int64_t here = row + static_cast<int>(least(r + b * WARPS, rows - 1));
            found[b] = weights[layer.weights + here * layer.columns + column + c];
          }
          FASTFLOW_UNROLL
          for (int b = 0; b < BATCH; ++b)
            if (r + b * WARPS < rows) m.staged[m.stage[l] + (r + b * WARPS) * stride + c] = found[b];
        }
    }
  }

  FASTFLOW_HD static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  // The sample of an item of a tile; a sample that exists.
  FASTFLOW_HD int64_t sample(int64_t first, int s) const { return least(first + s, samples - 1); }
  FASTFLOW_HD static int cell(int row, int quad) { return row * SAMPLES + 4 * quad; }
  // Four samples of column `at` of a matrix with rows of `row` elements; 0: the same row for all.
  FASTFLOW_HD Four column(const Span<const T>& from, int64_t row, int64_t first, int quad, int at) const {
    Four found;
    FASTFLOW_UNROLL
    for (int i = 0; i < 4; ++i) found.value[i] = from[sample(first, 4 * quad + i) * row + at];
    return found;
  }
  FASTFLOW_HD static void add(Four& sum, T weight, const Four& v) {
    FASTFLOW_UNROLL
    for (int i = 0; i < 4; ++i) sum.value[i] += weight * v.value[i];
  }

  // sums += products of weight(unit, i) with the units in `count` rows of memory from `row` on. `load(i, w)`
  // loads WIDE weights of each unit from the i-th on, `load_one(i, w, at)` the i-th as number `at` of them.
  template <class Load, class LoadOne>
  FASTFLOW_HD static void add_products(int row, int count, int octet, const Memory& m, const Load& load,
                                       const LoadOne& load_one, Sums& sums) {
    T w[TOGETHER][WIDE];
    const auto add_row = [&](int i, int at) {
      FASTFLOW_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Four found = m.units.template load<4>(cell(row + i + at, 2 * octet + half));
        FASTFLOW_UNROLL
        for (int t = 0; t < TOGETHER; ++t) add(sums.of[t][half], w[t][at], found);
      }
    };
    int i = 0;
    FASTFLOW_ROLLED
    for (; i + WIDE <= count; i += WIDE) {
      load(i, w);
      FASTFLOW_UNROLL
      for (int at = 0; at < WIDE; ++at) add_row(i, at);
    }
    if (i >= count) return;
    FASTFLOW_UNROLL
    for (int at = 0; at < WIDE; ++at)
      load_one(static_cast<int>(least(i + at, count - 1)), w, at);  // not a branch for each
    FASTFLOW_UNROLL
    for (int at = 0; at < WIDE; ++at) {
      if (i + at == count) break;
      add_row(i, at);
    }
  }

 private:
  FASTFLOW_HD void set(int degrees, int from, int to, const Memory& m) const {
    m.picked[0] = degrees;
    int row = 0, weight = 0;
    for (int l = 0; l <= network.last + 1; ++l) {
      m.rows[l] = row;
      m.stage[l] = weight;
      if (degrees) {
        row += m.at(l, to) - m.at(l, from);
        if (l > 0) weight += (m.at(l, to) - m.at(l, from)) * row_stride(l, from, to, m);
      } else {  // only of the features and of the parameters, of one degree
        row += l == 0 ? 1 : 0;
      }
    }
  }
};

// x of z, and log |det dx/dz|.
template <typename T, int SAMPLES, bool IN_SHARED>
struct MaskedInverseKernel : MaskedTile<T, SAMPLES, IN_SHARED> {
  using Tile = MaskedTile<T, SAMPLES, IN_SHARED>;
  using Tile::network, Tile::samples, Tile::cell;
  using Tile::THREADS, Tile::QUADS, Tile::OCTETS, Tile::TOGETHER, Tile::WIDE, Tile::DEGREES, Tile::ROWS;
  using typename Tile::Four, typename Tile::Sums, typename Tile::Memory;

  cpu::Activation activation;
  Transformer<T> transformer;
  Span<const T> z, added, gates;
  Span<const int64_t> order;
  int64_t z_row, z_column, added_row, gates_row;  // strides
  Span<T> x, log_det;
  Span<const T> waves;  // [4, features], or empty: the features are read

  int64_t shared_bytes() const {
    return Tile::shared_bytes() + sizeof(int) * DEGREES +
           sizeof(T) * SAMPLES * ((gates.size ? ROWS : 0) + 1 + transformer.exponentials());
  }

  // What a block of threads has in shared memory besides Memory.
  struct Latents {
    Span<int> feature;  // of a block of degrees
    Span<T> gate;       // in the rows of `sums`
    Span<T> log_det;    // [SAMPLES]
    Span<T> exponential;
  };

  template <class Block>
  FASTFLOW_HD void operator()(Block& block) const {
    const Memory m = Tile::allocate(block);
    const Latents latents{
        block.template shared<int>(DEGREES), block.template shared<T>(gates.size ? ROWS * SAMPLES : 0),
        block.template shared<T>(SAMPLES), block.template shared<T>(transformer.exponentials() * SAMPLES)};
    const int last = network.last;
    for (int64_t tile = block.index; tile < Tile::tiles(); tile += block.count) {
      const int64_t first = tile * SAMPLES;
      for (int k = 0; k < network.features;) {
        block.phase([&](int thread) { Tile::load_window(thread, k, m); });
        block.phase([&](int thread) {
          Tile::template pick<false>(thread, 0, static_cast<int>(Tile::least(DEGREES, network.features - k)),
                                     m);
        });
        const int degrees = m.picked[0];
        if (degrees) {
          block.phase([&](int thread) {
            load_latents(thread, first, k, degrees, latents, m);
            begin(thread, first, degrees, latents, m);
            Tile::stage(thread, 0, degrees, m);
          });
          for (int i = 0; i < degrees; ++i) {
            for (int l = 1; l <= last + 1; ++l) {
              // x of the degree before is new to layer 1, units of this degree are to the others
              const int from = l == 1 ? m.at(0, i ? i - 1 : 0) : m.at(l - 1, i);
              const int to = l == 1 ? m.at(0, i) : m.at(l - 1, i + 1);
              if (from == to && m.at(l, i) == m.at(l, i + 1)) continue;
              block.phase([&](int thread) { add_degree(thread, l, i, degrees, from, to, latents, m); });
            }
            transform(block, first, k + i, i, latents, m);
          }
        } else {
          for (int l = 1; l <= last + 1; ++l)
            block.phase([&](int thread) {
              if (l == 1) load_latents(thread, first, k, 1, latents, m);
              whole(thread, first, l, m);
            });
          transform(block, first, k, 0, latents, m);
        }
        k += degrees ? degrees : 1;
      }
    }
  }

 private:
  // z of a block of degrees, to the rows of layer 0.
  FASTFLOW_HD void load_latents(int thread, int64_t first, int k, int degrees, const Latents& latents,
                                const Memory& m) const {
    thread = opaque(thread);
    for (int item = thread; item < degrees * SAMPLES; item += THREADS) {
      const int i = item / SAMPLES, s = item % SAMPLES;
      int64_t feature = order[k + i];
      if (feature < 0 || feature >= network.features) feature = 0;  // `order` may have any values
      if (s == 0) latents.feature[i] = static_cast<int>(feature);
      m.sums[(m.rows[0] + i) * SAMPLES + s] = z[Tile::sample(first, s) * z_row + feature * z_column];
    }
  }

  // Calls use(row, quad, products with the first `count` units of the layer before, and `added`) for the rows
  // of layer l of the first `degrees` degrees of the window. Returns the item that follows, of the next
  // layer.
  template <class Use>
  FASTFLOW_HD int products(int item, int64_t first, int l, int degrees, int count, const Memory& m,
                           const Use& use) const {
    const KernelNetwork::Layer& layer = network.layer[l];
    const int begin = m.at(l, 0), end = m.at(l, degrees),
              items = (end - begin + TOGETHER - 1) / TOGETHER * OCTETS;
    for (; item < items; item += THREADS) {
      const int row = begin + item / OCTETS * TOGETHER, octet = item % OCTETS;
      int64_t start[TOGETHER];
      FASTFLOW_UNROLL
      for (int t = 0; t < TOGETHER; ++t)
        start[t] = layer.weights + Tile::least(row + t, end - 1) * layer.columns;
      Sums sums{};
      Tile::add_products(
          network.layer[l - 1].units, count, octet, m,
          [&](int j, T(&w)[TOGETHER][WIDE]) {
            FASTFLOW_UNROLL
            for (int t = 0; t < TOGETHER; ++t) {
              if (layer.wide) {
                FASTFLOW_UNROLL
                for (int at = 0; at < WIDE; at += 4) {
                  const Four found = Tile::weights.template load<4>(start[t] + j + at);
                  FASTFLOW_UNROLL
                  for (int i = 0; i < 4; ++i) w[t][at + i] = found.value[i];
                }
              } else {
                FASTFLOW_UNROLL
                for (int at = 0; at < WIDE; ++at) w[t][at] = Tile::weights[start[t] + j + at];
              }
            }
          },
          [&](int j, T(&w)[TOGETHER][WIDE], int at) {
            FASTFLOW_UNROLL
            for (int t = 0; t < TOGETHER; ++t) w[t][at] = Tile::weights[start[t] + j];
          },
          sums);
      FASTFLOW_UNROLL
      for (int t = 0; t < TOGETHER; ++t) {
        FASTFLOW_UNROLL
        for (int half = 0; half < 2; ++half)
          if (row + t < end) {
            const int quad = 2 * octet + half;
            Four& sum = sums.of[t][half];
            Tile::add(sum, T(1), Tile::column(added, added_row, first, quad, layer.added + row + t));
            use(row + t, quad, sum);
          }
      }
    }
    return item - items;
  }

  // The sums of a block of degrees: all that lower degrees contribute.
  FASTFLOW_HD void begin(int thread, int64_t first, int degrees, const Latents& latents,
                         const Memory& m) const {
    thread = opaque(thread);
    int item = thread;
    for (int l = 1; l <= network.last + 1; ++l) {
      const KernelNetwork::Layer& layer = network.layer[l];
      const int row = m.rows[l] - m.at(l, 0);
      item = products(item, first, l, degrees, m.at(l - 1, 0), m, [&](int unit, int quad, const Four& sum) {
        m.sums.template store<4>(cell(row + unit, quad), sum);
        if (layer.flags & GATE)
          latents.gate.template store<4>(cell(row + unit, quad),
                                         Tile::column(gates, gates_row, first, quad, layer.gates + unit));
      });
    }
  }

  // One layer of a degree that exceeds the memory of a block of degrees.
  FASTFLOW_HD void whole(int thread, int64_t first, int l, const Memory& m) const {
    thread = opaque(thread);
    const KernelNetwork::Layer& layer = network.layer[l];
    products(thread, first, l, 1, m.at(l - 1, l == 1 ? 0 : 1), m, [&](int unit, int quad, const Four& sum) {
      if (l > network.last) {
        m.sums.template store<4>(cell(m.rows[l] + unit - m.at(l, 0), quad), sum);
      } else {
        Four factors{};
        if (layer.flags & GATE) factors = Tile::column(gates, gates_row, first, quad, layer.gates + unit);
        complete(l, unit, quad, sum, factors, m);
      }
    });
  }

  // What units `from` to `to` of the layer before contribute to the rows of layer l in the block. Completes
  // the units of the i-th degree.
  FASTFLOW_HD void add_degree(int thread, int l, int i, int degrees, int from, int to, const Latents& latents,
                              const Memory& m) const {
    thread = opaque(thread);
    const KernelNetwork::Layer& layer = network.layer[l];
    const int begin = m.at(l, i), now = m.at(l, i + 1), end = from == to ? now : m.at(l, degrees);
    const int row = m.rows[l] - m.at(l, 0), column = m.at(l - 1, 0);
    const int stride = Tile::row_stride(l, 0, degrees, m), v = network.layer[l - 1].units;
    for (int item = thread; item < (end - begin) * QUADS; item += THREADS) {
      const int unit = begin + item / QUADS, quad = item % QUADS;
      const int at = cell(row + unit, quad), w = m.stage[l] + (unit - m.at(l, 0)) * stride - column;
      Four sum = m.sums.template load<4>(at);
      for (int j = from; j < to; ++j)
        Tile::add(sum, m.staged[w + j], m.units.template load<4>(cell(v + j, quad)));
      if (l <= network.last && unit < now) {
        Four factors{};
        if (layer.flags & GATE) factors = latents.gate.template load<4>(at);
        complete(l, unit, quad, sum, factors, m);
      } else {
        m.sums.template store<4>(at, sum);
      }
    }
  }

  // A hidden unit of its sum.
  FASTFLOW_HD void complete(int l, int unit, int quad, Four v, const Four& factors, const Memory& m) const {
    const KernelNetwork::Layer& layer = network.layer[l];
    if (layer.flags & GATE) {
      FASTFLOW_UNROLL
      for (int i = 0; i < 4; ++i) v.value[i] *= factors.value[i];
    }
    if (layer.flags & AFTER) activate(v);
    if (layer.flags & SKIP) Tile::add(v, T(1), m.units.template load<4>(cell(layer.kept + unit, quad)));
    if (layer.flags & KernelNetwork::KEPT) m.units.template store<4>(cell(layer.kept + unit, quad), v);
    if (layer.flags & KernelNetwork::BEFORE_NEXT) activate(v);
    m.units.template store<4>(cell(layer.units + unit, quad), v);
  }
  FASTFLOW_HD void activate(Four& v) const {
    FASTFLOW_UNROLL
    for (int i = 0; i < 4; ++i) v.value[i] = activated(v.value[i], activation);
  }

  // x of the k-th feature, the i-th of the block, from its parameters.
  template <class Block>
  FASTFLOW_HD void transform(Block& block, int64_t first, int k, int i, const Latents& latents,
                             const Memory& m) const {
    const int row = m.rows[network.last + 1] + i * network.each;
    if (transformer.exponentials())
      block.phase([&](int thread) {
        for (int item = thread; item < transformer.exponentials() * SAMPLES; item += THREADS) {
          const int s = item % SAMPLES;
          latents.exponential[item] =
              transformer.exponential(item / SAMPLES, [&](int p) { return m.sums[(row + p) * SAMPLES + s]; });
        }
      });
    block.phase([&](int s) {
      if (s >= SAMPLES) return;
      T log_slope;
      const T found = transformer.inverse(
          m.sums[(m.rows[0] + i) * SAMPLES + s], [&](int p) { return m.sums[(row + p) * SAMPLES + s]; },
          [&](int p) { return latents.exponential[p * SAMPLES + s]; }, log_slope);
      const auto w = [&](int row) { return waves[row * network.features + k]; };
      m.units[(network.layer[0].units + k) * SAMPLES + s] =
          waves.size ? cpu::waved(found, w(0), w(1), w(2), w(3)) : found;
      const T sum = k ? latents.log_det[s] + log_slope : log_slope;
      latents.log_det[s] = sum;
      if (first + s >= samples) return;
      x[(first + s) * network.features + latents.feature[i]] = found;
      if (k + 1 == network.features) log_det[first + s] = sum;
    });
  }
};

// u of J^T u = v + N^T q.
template <typename T, int SAMPLES, bool IN_SHARED>
struct MaskedSolveKernel : MaskedTile<T, SAMPLES, IN_SHARED> {
  using Tile = MaskedTile<T, SAMPLES, IN_SHARED>;
  using Tile::network, Tile::samples, Tile::cell;
  using Tile::THREADS, Tile::QUADS, Tile::OCTETS, Tile::TOGETHER, Tile::WIDE, Tile::DEGREES, Tile::ROWS;
  using typename Tile::Four, typename Tile::Sums, typename Tile::Memory;

  Span<const T> v, slope, jac, dparams, inner, outer;  // rows of samples; the last three may be empty
  Span<T> u;
  Span<const T> of_features;  // may be empty

  int64_t shared_bytes() const {
    const int64_t degrees = of_features.size ? 3 * DEGREES : 2 * DEGREES;
    return Tile::shared_bytes() +
           sizeof(T) * SAMPLES * (degrees + (inner.size ? ROWS : 0) + (outer.size ? ROWS : 0));
  }

  // What a block of threads has in shared memory besides Memory.
  struct Right {
    Span<T> v, slope;      // of a block of degrees, [DEGREES, SAMPLES]
    Span<T> inner, outer;  // in the rows of `sums`
    Span<T> of_features;
  };

  template <class Block>
  FASTFLOW_HD void operator()(Block& block) const {
    const Memory m = Tile::allocate(block);
    const Right right{block.template shared<T>(DEGREES * SAMPLES),
                      block.template shared<T>(DEGREES * SAMPLES),
                      block.template shared<T>(inner.size ? ROWS * SAMPLES : 0),
                      block.template shared<T>(outer.size ? ROWS * SAMPLES : 0),
                      block.template shared<T>(of_features.size ? DEGREES * SAMPLES : 0)};
    for (int64_t tile = block.index; tile < Tile::tiles(); tile += block.count) {
      const int64_t first = tile * SAMPLES;
      for (int end = network.features; end > 0;) {
        const int base = end > DEGREES ? end - DEGREES : 0,
                  edge = end - base;  // the window ends with the block
        block.phase([&](int thread) { Tile::load_window(thread, base, m); });
        block.phase([&](int thread) { Tile::template pick<true>(thread, edge, edge, m); });
        const int degrees = m.picked[0], from = edge - (degrees ? degrees : 1);
        if (degrees) {
          block.phase([&](int thread) {
            load_right(thread, first, base, from, edge, right, m);
            begin(thread, first, from, edge, right, m);
            Tile::stage(thread, from, edge, m);
          });
          for (int i = edge - 1; i >= from; --i) {
            block.phase([&](int thread) { solve(thread, first, base, i, from, right, m); });
            for (int l = network.last; l >= 0; --l) {
              // layer 0 always has a phase: its barrier separates the reads of the window from its next
              // contents
              if (l > 0 && m.at(l + 1, i) == m.at(l + 1, i + 1) && m.at(l, i) == m.at(l, i + 1)) continue;
              block.phase([&](int thread) { add_degree(thread, l, i, from, edge, right, m); });
            }
          }
        } else {
          block.phase([&](int thread) {
            load_right(thread, first, base, from, edge, right, m);
            products(thread, 0, from, edge, m.at(1, edge), m, [&](int unit, int quad, const Four& sum) {
              m.sums.template store<4>(cell(m.rows[0] + unit - m.at(0, from), quad), sum);
            });
          });
          block.phase([&](int thread) { solve(thread, first, base, from, from, right, m); });
          for (int l = network.last; l > 0; --l)
            block.phase([&](int thread) {
              products(thread, l, from, edge, m.at(l + 1, from), m, [&](int unit, int quad, const Four& sum) {
                complete(l, unit, quad, sum, factor(inner, first, quad, l, unit),
                         factor(outer, first, quad, l, unit), m);
              });
            });
        }
        end = base + from;
      }
    }
  }

 private:
  FASTFLOW_HD int64_t units() const { return network.layer[network.last + 1].added; }  // hidden

  FASTFLOW_HD Four factor(const Span<const T>& of, int64_t first, int quad, int l, int unit) const {
    return of.size ? Tile::column(of, units(), first, quad, network.layer[l].added + unit) : Four{};
  }

  // v and the slopes of a block of degrees; jac, in place of the gradients of the parameters; dparams.
  FASTFLOW_HD void load_right(int thread, int64_t first, int base, int from, int to, const Right& right,
                              const Memory& m) const {
    thread = opaque(thread);
    for (int item = thread; item < (to - from) * SAMPLES; item += THREADS) {
      const int64_t at =
          Tile::sample(first, item % SAMPLES) * network.features + base + from + item / SAMPLES;
      right.v[item] = v[at];
      right.slope[item] = slope[at];
      if (of_features.size) right.of_features[item] = of_features[at];
    }
    const int end = network.last + 1, begin = m.at(end, from), width = network.layer[end].width;
    for (int item = thread; item < (m.at(end, to) - begin) * SAMPLES; item += THREADS) {
      const int s = item % SAMPLES, p = item / SAMPLES;
      const int64_t at = Tile::sample(first, s) * width + begin + p;
      m.units[(network.layer[end].units + begin + p) * SAMPLES + s] = jac[at];
      if (dparams.size) m.sums[(m.rows[end] + p) * SAMPLES + s] = dparams[at];
    }
  }

  // Calls use(unit, quad, sum) for the units of layer l of the degrees `from` to `to` of the window, with the
  // sum over the next layer's units from the given one on.
  template <class Use>
  FASTFLOW_HD int products(int item, int l, int from, int to, int source, const Memory& m,
                           const Use& use) const {
    const KernelNetwork::Layer& next = network.layer[l + 1];
    const int begin = m.at(l, from), end = m.at(l, to),
              items = (end - begin + TOGETHER - 1) / TOGETHER * OCTETS;
    for (; item < items; item += THREADS) {
      const int unit = begin + item / OCTETS * TOGETHER, octet = item % OCTETS;
      int column[TOGETHER];
      FASTFLOW_UNROLL
      for (int t = 0; t < TOGETHER; ++t) column[t] = static_cast<int>(Tile::least(unit + t, end - 1));
      const auto load_one = [&](int i, T(&w)[TOGETHER][WIDE], int at) {
        const int64_t start = next.weights + int64_t(source + i) * next.columns;
        FASTFLOW_UNROLL
        for (int t = 0; t < TOGETHER; ++t) w[t][at] = Tile::weights[start + column[t]];
      };
      Sums sums{};
      Tile::add_products(
          next.units + source, m.all(l + 1) - source, octet, m,
          [&](int i, T(&w)[TOGETHER][WIDE]) {
            FASTFLOW_UNROLL
            for (int at = 0; at < WIDE; ++at) load_one(i + at, w, at);
          },
          load_one, sums);
      FASTFLOW_UNROLL
      for (int t = 0; t < TOGETHER; ++t) FASTFLOW_UNROLL
      for (int half = 0; half < 2; ++half)
        if (unit + t < end) use(unit + t, 2 * octet + half, sums.of[t][half]);
    }
    return item - items;
  }

  // The sums of a block of degrees: all that higher degrees contribute.
  FASTFLOW_HD void begin(int thread, int64_t first, int from, int to, const Right& right,
                         const Memory& m) const {
    thread = opaque(thread);
    int item = thread;
    for (int l = 0; l <= network.last; ++l) {
      const int row = m.rows[l] - m.at(l, from);
      item = products(item, l, from, to, m.at(l + 1, to), m, [&](int unit, int quad, const Four& sum) {
        const int at = cell(row + unit, quad);
        m.sums.template store<4>(at, sum);
        if (l > 0 && inner.size) right.inner.template store<4>(at, factor(inner, first, quad, l, unit));
        if (l > 0 && outer.size) right.outer.template store<4>(at, factor(outer, first, quad, l, unit));
      });
    }
  }

  // u of the feature of the i-th degree, and the gradients of its parameters.
  FASTFLOW_HD void solve(int thread, int64_t first, int base, int i, int from, const Right& right,
                         const Memory& m) const {
    thread = opaque(thread);
    const int end = network.last + 1, parameter = m.at(end, i),
              row = m.rows[end] + parameter - m.at(end, from);
    for (int item = thread; item < network.each * SAMPLES; item += THREADS) {
      const int s = item % SAMPLES, p = item / SAMPLES, at = (i - from) * SAMPLES + s;
      T sum = m.sums[(m.rows[0] + i - from) * SAMPLES + s];
      if (of_features.size) sum *= right.of_features[at];
      const T found = (right.v[at] - sum) / right.slope[at];
      T& gradient = m.units[(network.layer[end].units + parameter + p) * SAMPLES + s];
      gradient *= found;
      if (dparams.size) gradient -= m.sums[(row + p) * SAMPLES + s];
      if (p == 0 && first + s < samples) u[(first + s) * network.features + base + i] = found;
    }
  }

  // What the next layer's units of the i-th degree contribute to layer l in the block. Completes the units of
  // this degree.
  FASTFLOW_HD void add_degree(int thread, int l, int i, int from, int to, const Right& right,
                              const Memory& m) const {
    thread = opaque(thread);
    const KernelNetwork::Layer& next = network.layer[l + 1];
    const int begin = m.at(l, from), now = m.at(l, i), end = l ? m.at(l, i + 1) : now;
    const int source = m.at(l + 1, i), after = m.at(l + 1, i + 1);
    const int first = source == after && l ? now : begin, row = m.rows[l] - begin;
    const int stride = Tile::row_stride(l + 1, from, to, m), w = m.stage[l + 1] - m.at(l + 1, from) * stride;
    for (int item = thread; item < (end - first) * QUADS; item += THREADS) {
      const int unit = first + item / QUADS, quad = item % QUADS, at = cell(row + unit, quad);
      Four sum = m.sums.template load<4>(at);
      for (int r = source; r < after; ++r)
        Tile::add(sum, m.staged[w + r * stride + unit - begin],
                  m.units.template load<4>(cell(next.units + r, quad)));
      if (l > 0 && unit >= now) {
        complete(l, unit, quad, sum, inner.size ? right.inner.template load<4>(at) : Four{},
                 outer.size ? right.outer.template load<4>(at) : Four{}, m);
      } else {
        m.sums.template store<4>(at, sum);
      }
    }
  }

  // The gradient of a hidden unit's product, of the gradient of what the next layer reads.
  FASTFLOW_HD void complete(int l, int unit, int quad, Four d, const Four& in, const Four& out,
                            const Memory& m) const {
    const KernelNetwork::Layer& layer = network.layer[l];
    if (outer.size) multiply(d, out);
    if (layer.flags & KernelNetwork::KEPT)
      Tile::add(d, T(1), m.units.template load<4>(cell(layer.kept + unit, quad)));
    if (layer.flags & SKIP) m.units.template store<4>(cell(layer.kept + unit, quad), d);
    if (inner.size) multiply(d, in);
    m.units.template store<4>(cell(layer.units + unit, quad), d);
  }
  FASTFLOW_HD static void multiply(Four& v, const Four& by) {
    FASTFLOW_UNROLL
    for (int i = 0; i < 4; ++i) v.value[i] *= by.value[i];
  }
};

// The ops: host code that launches the kernels.

template <typename T>
Span<const T> span_of(const Tensor& dense) {
  return {dense.const_data_ptr<T>(), dense.numel()};
}
template <typename T>
Span<const T> span_of(const std::optional<Tensor>& dense) {
  return dense ? span_of<T>(*dense) : Span<const T>{};
}
inline std::optional<Tensor> contiguous_of(const std::optional<Tensor>& t) {
  return t ? std::optional(torch::stable::contiguous(*t)) : std::nullopt;
}

// Launches Kernel with tiles of 32 samples if there are two for each multiprocessor, otherwise of 8. The
// units are in scratch if shared memory is too small. `rest`: the members of the kernel.
template <class Device, typename T, template <typename, int, bool> class Kernel, class... Rest>
void launch_tiles(const char* op, const Tensor& like, const KernelNetwork& network, const Tensor& weights,
                  const Tensor& ends, const Rest&... rest) {
  const int64_t samples = like.size(0), processors = Device::multiprocessors(),
                limit = Device::shared_limit();
  const auto launched = [&](auto tile, auto in_shared) {
    using Launched = Kernel<T, tile, in_shared>;
    Launched kernel{{network, span_of<T>(weights), span_of<int64_t>(ends), {}, samples}, rest...};
    if (kernel.shared_bytes() > limit) return false;
    int64_t blocks = std::min<int64_t>(kernel.tiles(), (int64_t(1) << 31) - 1);
    if (!in_shared) blocks = std::min(blocks, Launched::RESIDENT * processors);
    const int64_t size = in_shared ? 0 : blocks * kernel.scratch_of_block();
    const Tensor scratch = torch::stable::new_empty(like, {size});
    kernel.scratch = {scratch.mutable_data_ptr<T>(), size};
    Device::launch(kernel, blocks, kernel.shared_bytes());
    return true;
  };
  using Few = std::integral_constant<int, 8>;
  if constexpr (sizeof(T) == 4) {
    using Many = std::integral_constant<int, 32>;
    if (samples >= 2 * Many::value * processors && launched(Many(), std::true_type())) return;
  }
  STD_TORCH_CHECK(launched(Few(), std::true_type()) || launched(Few(), std::false_type()), op,
                  ": a block needs more than ", limit, " bytes of shared memory");
}

template <class Device>
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
  const TransformerForm form{scale,
                             affine_order,
                             params_layout,
                             offset,
                             {bins, bound, tails, convention, factor, min_bin, min_slope}};
  const MaskedNetwork net(op, "z", z, weights, ends, widths, layers, form.parameters(op));
  check_masked_inverse(net, z, added, gates, order, waves);
  const typename Device::Guard guard(z);
  const Tensor x = torch::stable::new_empty(z, {z.size(0), net.features}),
               log_det = torch::stable::new_empty(z, {z.size(0)});
  if (z.size(0) == 0) return {x, log_det};
  const auto contiguous = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const Tensor w = contiguous(weights), a = contiguous(added), e = contiguous(ends), o = contiguous(order);
  const std::optional<Tensor> g = contiguous_of(gates), waves_ = contiguous_of(waves);
  const auto run = [&](auto value) {
    using T = decltype(value);
    const int64_t z_size = (z.size(0) - 1) * z.stride(0) + (net.features - 1) * z.stride(1) + 1;
    launch_tiles<Device, T, MaskedInverseKernel>(
        op, z, KernelNetwork(op, net, w, 0), w, e, cpu::activation_of(activation), form.transformer<T>(),
        Span<const T>{z.const_data_ptr<T>(), z_size}, span_of<T>(a), span_of<T>(g), span_of<int64_t>(o),
        z.stride(0), z.stride(1), a.dim() == 2 ? net.total() : 0, net.total_gates(),
        Span<T>{x.mutable_data_ptr<T>(), x.numel()}, Span<T>{log_det.mutable_data_ptr<T>(), log_det.numel()},
        span_of<T>(waves_));
  };
  z.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  return {x, log_det};
}

template <class Device>
Tensor masked_solve(const Tensor& v, const Tensor& slope, const Tensor& jac,
                    const std::optional<Tensor>& dparams, const std::optional<Tensor>& inner,
                    const std::optional<Tensor>& outer, const Tensor& weights, const Tensor& ends,
                    const std::vector<int64_t>& widths, const std::vector<int64_t>& layers,
                    const std::optional<Tensor>& of_features) {
  const char* op = "masked_solve";
  expect_shape(op, "jac", jac, {ANY, ANY, ANY});
  const MaskedNetwork net(op, "v", v, weights, ends, widths, layers, jac.size(2));
  check_masked_solve(net, v, slope, jac, dparams, inner, outer, of_features);
  STD_TORCH_CHECK(net.each < 256, op, ": jac: got ", net.each,
                  " parameters of a feature, expected less than 256");
  const typename Device::Guard guard(v);
  const Tensor u = torch::stable::new_empty(v, {v.size(0), net.features});
  if (v.size(0) == 0) return u;
  const auto contiguous = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const Tensor w = contiguous(weights), e = contiguous(ends), v_ = contiguous(v), s = contiguous(slope),
               j = contiguous(jac);
  const std::optional<Tensor> q = contiguous_of(dparams), in = contiguous_of(inner),
                              out = contiguous_of(outer), reads = contiguous_of(of_features);
  const auto run = [&](auto value) {
    using T = decltype(value);
    launch_tiles<Device, T, MaskedSolveKernel>(op, v, KernelNetwork(op, net, w, 1), w, e, span_of<T>(v_),
                                               span_of<T>(s), span_of<T>(j), span_of<T>(q), span_of<T>(in),
                                               span_of<T>(out), Span<T>{u.mutable_data_ptr<T>(), u.numel()},
                                               span_of<T>(reads));
  };
  v.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  return u;
}

}  // namespace fastflow
