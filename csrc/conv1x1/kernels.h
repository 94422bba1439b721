#pragma once
// 1x1 convolution of C <= 64 channels in one pass over memory, y = W x + b at every pixel: CUDA kernels
// written for block.h, and the host code that launches them on any device.
//
// Bound: 8 bytes per element of x in float32 for forward (reads x, writes y), 16 for inverse + backward
// (reads y, dy; writes x, dx), 12 for backward from x. Arithmetic: 2 C operations for these 8 bytes, 6 C
// for 16. An H200 (4.3 TB/s of copy bandwidth, 67 TFLOP/s of float32 by its datasheet) can do 15.6 operations
// per byte; C = 24 needs 6, C = 48 needs 12 and 18.
#include <algorithm>
#include <optional>
#include <tuple>

#include "stable.h"
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include "conv1x1/arguments.h"
#include "conv1x1/images.h"

namespace fastflow {

// Distance of pixels in shared memory: 16 bytes each of 8 neighboring pixels then cover all 32 banks.
constexpr int row_stride(int channels) { return 4 * (channels / 4 | 1); }

// Loads W into shared memory, [output][input], zero-padded from C x C.
template <typename T>
struct Weight {
  Matrix<T> matrix;

  template <int CMAX, int THREADS>
  FASTFLOW_HD void load(int thread, int channels, const Span<T>& w) const {
    for (int i = thread; i < CMAX * CMAX; i += THREADS) {
      const int co = i / CMAX, ci = i % CMAX;
      w[i] = co < channels && ci < channels ? matrix(co, ci) : T(0);
    }
  }
};

// Four outputs of PIXELS pixels, whose inputs v are in registers: s[r][i] += sum over ci of w[co + r][ci]
// v[ci][i].
template <int CMAX, int PIXELS, typename T>
FASTFLOW_HD void multiply(const Span<T>& w, int channels, int co, const T (&v)[CMAX][PIXELS],
                          T (&s)[4][PIXELS]) {
  FASTFLOW_UNROLL
  for (int eight = 0; eight < CMAX; eight += 8)
    if (eight < channels) {
      FASTFLOW_UNROLL
      for (int r = 0; r < 4; ++r) {
        FASTFLOW_UNROLL
        for (int four = eight; four < eight + 8; four += 4) {
          const Pack<T, 4> weights = w.template load<4>((co + r) * CMAX + four);
          FASTFLOW_UNROLL
          for (int j = 0; j < 4; ++j) {
            FASTFLOW_UNROLL
            for (int i = 0; i < PIXELS; ++i) s[r][i] += weights.value[j] * v[four + j][i];
          }
        }
      }
    }
}

// Loads that a thread issues before it uses the first: the largest divisor, up to `most`, of the loads it has
// to issue. A multiprocessor must have some 40 KB in flight to reach the bandwidth of an H200's memory.
constexpr int loads_at_once(int loads, int most) {
  int found = std::min(loads, most);
  while (loads % found) --found;
  return found;
}

// Copies `size` <= TILE pixels from `first` on between memory and rows of shared memory. If a pixel's
// channels are contiguous in memory, neighboring threads copy neighboring groups of four; otherwise a thread
// copies a pixel. Both are coalesced. Loads are batched: no branch, division or store separates those of a
// batch. With SELECT a thread does not skip a load: it loads the first element and selects zero. A predicate
// takes fewer registers, but in some kernels nvcc makes a branch of it, in which the load is waited for.
template <typename T, int CMAX, int TILE, int THREADS, bool SELECT>
struct Tile {
  using acc = accumulator<T>;
  static constexpr int ROW = row_stride(CMAX), GROUPS = CMAX / 4;
  static constexpr int BATCH = loads_at_once(TILE * GROUPS / THREADS, CMAX % 24 ? 8 : 6);
  // values of single channels that are loaded at once
  static constexpr int PLANES = CMAX % 24 ? 16 : 24;

  // Subtracts the bias, if any. Rows after the last pixel and channels after the last are zero.
  FASTFLOW_HD static void load(int thread, const Images<const T>& x, int64_t first, int size,
                               const Span<const acc>& bias, const Span<acc>& rows) {
    const int filled = filled_rows(x, first, size);
    const auto start = x.start(first);
    if (x.rows && x.packed) {
      for (int i = thread; i < size * GROUPS; i += BATCH * THREADS)
        load_groups(i, x, start.base, filled, size, bias, rows);
    } else if (x.rows) {
      FASTFLOW_ROLLED
      for (int i = thread; i < size * GROUPS; i += THREADS) {
        const int row = i / GROUPS;
        load_channels<4>(row, i % GROUPS * 4, row < filled ? x.offset(start, row) : -1, x, bias, rows);
      }
    } else {
      for (int row = thread; row < size; row += THREADS) {
        const int64_t at = row < filled ? x.offset(start, row) : -1;
        FASTFLOW_ROLLED
        for (int channel = 0; channel < CMAX; channel += PLANES)
          load_channels<PLANES>(row, channel, at, x, bias, rows);
      }
    }
  }

  // Stores every parts-th group of four channels, from `part` on.
  FASTFLOW_HD static void store(int thread, const Images<T>& y, int64_t first, int size,
                                const Span<acc>& rows, int part = 0, int parts = 1) {
    const int filled = filled_rows(y, first, size);
    const auto start = y.start(first);
    if (y.rows) {
      FASTFLOW_ROLLED
      for (int i = thread; i < filled * GROUPS; i += THREADS)
        store_group(i / GROUPS, i % GROUPS * 4, y.offset(start, i / GROUPS), y, rows, part, parts);
    } else {
      for (int row = thread; row < filled; row += THREADS) {
        const int64_t at = y.offset(start, row);
        FASTFLOW_ROLLED
        for (int channel = 0; channel < CMAX; channel += 4)
          store_group(row, channel, at, y, rows, part, parts);
      }
    }
  }

 private:
  template <class Memory>
  FASTFLOW_HD static int filled_rows(const Images<Memory>& x, int64_t first, int size) {
    return at_most(x.pixels - first, size);
  }

  // Groups i, i + THREADS, ... of four channels, of a tile of `filled` pixels that begins at `base`.
  FASTFLOW_HD static void load_groups(int i, const Images<const T>& x, int64_t base, int filled, int size,
                                      const Span<const acc>& bias, const Span<acc>& rows) {
    Pack<T, 4> found[BATCH] = {};
    bool inside[BATCH];
    FASTFLOW_UNROLL
    for (int b = 0; b < BATCH; ++b) {
      const int row = (i + b * THREADS) / GROUPS, channel = (i + b * THREADS) % GROUPS * 4;
      inside[b] = row < filled && channel < x.channels;
      const int at = row * static_cast<int>(x.p) + channel;  // of packed rows, p is small
      if (SELECT || inside[b]) found[b] = x.span.template load<4>(base + (inside[b] ? at : 0));
    }
    Pack<acc, 4> v[BATCH];
    FASTFLOW_UNROLL
    for (int b = 0; b < BATCH; ++b) {
      FASTFLOW_UNROLL
      for (int j = 0; j < 4; ++j)
        v[b].value[j] = !SELECT || inside[b] ? static_cast<acc>(found[b].value[j]) : acc(0);
    }
    if (bias.size) {
      FASTFLOW_UNROLL
      for (int b = 0; b < BATCH; ++b) {
        const int channel = (i + b * THREADS) % GROUPS * 4;
        FASTFLOW_UNROLL
        for (int j = 0; j < 4; ++j)
          if (inside[b]) v[b].value[j] -= bias[channel + j];
      }
    }
    FASTFLOW_UNROLL
    for (int b = 0; b < BATCH; ++b) {
      const int row = (i + b * THREADS) / GROUPS, channel = (i + b * THREADS) % GROUPS * 4;
      if (row < size) rows.template store<4>(row * ROW + channel, v[b]);
    }
  }

  // COUNT channels of a pixel, one at a time.
  template <int COUNT>
  FASTFLOW_HD static void load_channels(int row, int channel, int64_t base, const Images<const T>& x,
                                        const Span<const acc>& bias, const Span<acc>& rows) {
    T found[COUNT] = {};
    FASTFLOW_UNROLL
    for (int j = 0; j < COUNT; ++j)
      if (base >= 0 && channel + j < x.channels) found[j] = x.span[base + (channel + j) * x.c];
    acc v[COUNT];
    FASTFLOW_UNROLL
    for (int j = 0; j < COUNT; ++j) v[j] = static_cast<acc>(found[j]);
    if (bias.size) {
      FASTFLOW_UNROLL
      for (int j = 0; j < COUNT; ++j)
        if (base >= 0 && channel + j < x.channels) v[j] -= bias[channel + j];
    }
    FASTFLOW_UNROLL
    for (int j = 0; j < COUNT; j += 4)
      rows.template store<4>(row * ROW + channel + j, {{v[j], v[j + 1], v[j + 2], v[j + 3]}});
  }

  FASTFLOW_HD static void store_group(int row, int channel, int64_t base, const Images<T>& y,
                                      const Span<acc>& rows, int part, int parts) {
    if (channel >= y.channels || channel / 4 % parts != part) return;
    const Pack<acc, 4> v = rows.template load<4>(row * ROW + channel);
    const int64_t at = base + channel * y.c;
    if (y.rows && y.packed) {
      Pack<T, 4> found;
      FASTFLOW_UNROLL
      for (int j = 0; j < 4; ++j) found.value[j] = static_cast<T>(v.value[j]);
      y.span.template store<4>(at, found);
    } else {
      FASTFLOW_UNROLL
      for (int j = 0; j < 4; ++j)
        if (channel + j < y.channels) y.span[at + j * y.c] = static_cast<T>(v.value[j]);
    }
  }
};

// y = W x + b. A thread holds all channels of its pixels in registers. It loads W from shared memory, four
// weights per load, each for PIXELS products. Planes (NCHW) are loaded directly to registers, PIXELS
// neighbors at once if they are packed. Rows (channels_last) pass through shared memory, where each thread
// uses the rows of its own pixels. If there are fewer tiles than multiprocessors, several blocks share a
// tile; each computes every parts-th group of four outputs.
template <typename T, int CMAX>
struct Conv1x1Kernel {
  using acc = accumulator<T>;
  static constexpr int THREADS = 128, RESIDENT = CMAX <= 48 ? 3 : 2, PIXELS = CMAX <= 24 ? 4 : 2,
                       TILE = THREADS * PIXELS;
  using Rows = Tile<T, CMAX, TILE, THREADS, true>;

  Images<const T> x;
  Images<T> y;
  Weight<acc> weight;
  Span<const acc> bias;
  int parts = 1;

  int64_t shared_bytes() const {
    return sizeof(acc) * (CMAX * CMAX + CMAX + (x.rows || y.rows ? TILE * Rows::ROW : 0));
  }

  template <class Block>
  FASTFLOW_HD void operator()(Block& block) const {
    const Span<acc> w = block.template shared<acc>(CMAX * CMAX), b = block.template shared<acc>(CMAX);
    const Span<acc> rows = block.template shared<acc>(x.rows || y.rows ? TILE * Rows::ROW : 0);
    typename Block::template PerThread<Inputs> inputs(block);
    const int64_t begin = block.index / parts;
    const int part = static_cast<int>(block.index % parts);
    for (int64_t tile = begin; tile * TILE < x.pixels; tile += block.count / parts) {
      const int64_t first = tile * TILE;
      block.phase([&](int thread) {
        if (x.rows) Rows::load(thread, x, first, TILE, {}, rows);
        else load_planes(thread, first, inputs[thread]);
        if (tile != begin) return;  // W is loaded together with the first pixels
        weight.template load<CMAX, THREADS>(thread, x.channels, w);
        for (int c = thread; c < CMAX; c += THREADS) b[c] = bias.size && c < x.channels ? bias[c] : acc(0);
      });
      block.phase([&](int thread) {
        if (x.rows) load_rows(thread, rows, inputs[thread]);
        multiply_pixels(thread, first, part, w, b, rows, inputs[thread]);
      });
      if (y.rows) block.phase([&](int thread) { Rows::store(thread, y, first, TILE, rows, part, parts); });
    }
  }

 private:
  struct Inputs {
    acc v[CMAX][PIXELS];
  };

  // A thread's pixels are neighbors if they are loaded at once, otherwise THREADS apart.
  FASTFLOW_HD bool vectorized() const { return !x.rows && !y.rows && x.packed && y.packed; }
  FASTFLOW_HD int pixel(int thread, int i) const {
    return vectorized() ? thread * PIXELS + i : thread + i * THREADS;
  }

  template <typename Memory>
  FASTFLOW_HD void pixel_offsets(int thread, int64_t first, const Images<Memory>& images,
                                 int64_t (&at)[PIXELS]) const {
    const auto start = images.start(first);
    const int filled = at_most(images.pixels - first, TILE);
    FASTFLOW_UNROLL
    for (int i = 0; i < PIXELS; ++i) {
      if (i > 0 && vectorized()) continue;  // only the first offset is used; saves divisions
      at[i] = pixel(thread, i) < filled ? images.offset(start, pixel(thread, i)) : -1;
    }
  }

  FASTFLOW_HD void load_planes(int thread, int64_t first, Inputs& inputs) const {
    int64_t at[PIXELS] = {};
    pixel_offsets(thread, first, x, at);
    if (vectorized()) load_values<PIXELS>(at, inputs);
    else load_values<1>(at, inputs);
  }

  // WIDTH neighbors at once. Values are converted after the last load of AT_ONCE channels, so that these
  // loads are in flight together. Values that need no conversion stay in the registers that were loaded.
  template <int WIDTH>
  FASTFLOW_HD void load_values(const int64_t (&at)[PIXELS], Inputs& inputs) const {
    constexpr int AT_ONCE = WIDTH == 1 ? 8 / PIXELS : std::is_same_v<T, acc> ? CMAX : 8;
    FASTFLOW_UNROLL
    for (int first = 0; first < CMAX; first += AT_ONCE) {
      if (first < x.channels) {
        load_some<AT_ONCE, WIDTH>(first, at, inputs);
      } else {
        FASTFLOW_UNROLL
        for (int c = first; c < first + AT_ONCE; ++c) {
          FASTFLOW_UNROLL
          for (int i = 0; i < PIXELS; ++i) inputs.v[c][i] = 0;
        }
      }
    }
  }

  template <int COUNT, int WIDTH>
  FASTFLOW_HD void load_some(int first, const int64_t (&at)[PIXELS], Inputs& inputs) const {
    using Values = Pack<T, WIDTH>;
    constexpr bool IN_PLACE = std::is_same_v<T, acc> && WIDTH > 1;  // nothing to convert
    Values found[COUNT][PIXELS / WIDTH];
    const auto inside = [&](int c, int i) { return first + c < x.channels && at[i / WIDTH * WIDTH] >= 0; };
    FASTFLOW_UNROLL
    for (int c = 0; c < COUNT; ++c) {
      FASTFLOW_UNROLL
      for (int i = 0; i < PIXELS; i += WIDTH) {
        const int64_t here = at[i] + (first + c) * x.c;
        Values& values = found[c][i / WIDTH];
        if constexpr (IN_PLACE) values = inside(c, i) ? x.span.template load<WIDTH>(here) : Values{};
        else values = x.span.template load<WIDTH>(inside(c, i) ? here : 0);  // not a branch
      }
    }
    FASTFLOW_UNROLL
    for (int c = 0; c < COUNT; ++c) {
      FASTFLOW_UNROLL
      for (int i = 0; i < PIXELS; ++i)
        inputs.v[first + c][i] =
            IN_PLACE || inside(c, i) ? static_cast<acc>(found[c][i / WIDTH].value[i % WIDTH]) : acc(0);
    }
  }

  FASTFLOW_HD void load_rows(int thread, const Span<acc>& rows, Inputs& inputs) const {
    FASTFLOW_UNROLL
    for (int c = 0; c < CMAX; c += 4) {
      FASTFLOW_UNROLL
      for (int i = 0; i < PIXELS; ++i) {
        const Pack<acc, 4> found = rows.template load<4>(pixel(thread, i) * Rows::ROW + c);
        FASTFLOW_UNROLL
        for (int j = 0; j < 4; ++j) inputs.v[c + j][i] = found.value[j];
      }
    }
  }

  FASTFLOW_HD void multiply_pixels(int thread, int64_t first, int part, const Span<acc>& w,
                                   const Span<acc>& b, const Span<acc>& rows, const Inputs& inputs) const {
    const int channels = x.channels;
    int64_t at[PIXELS] = {};
    pixel_offsets(thread, first, y, at);
    if (at[0] < 0) return;
    for (int co = 4 * part; co < channels; co += 4 * parts) {
      acc s[4][PIXELS];
      FASTFLOW_UNROLL
      for (int r = 0; r < 4; ++r) {
        FASTFLOW_UNROLL
        for (int i = 0; i < PIXELS; ++i) s[r][i] = b[co + r];
      }
      multiply<CMAX>(w, channels, co, inputs.v, s);
      if (y.rows) {
        FASTFLOW_UNROLL
        for (int i = 0; i < PIXELS; ++i)
          rows.template store<4>(pixel(thread, i) * Rows::ROW + co, {{s[0][i], s[1][i], s[2][i], s[3][i]}});
      } else {
        FASTFLOW_UNROLL
        for (int r = 0; r < 4; ++r)
          if (co + r < channels) store(co + r, vectorized(), at, s[r]);
      }
    }
  }

  FASTFLOW_HD void store(int c, bool vectorized, const int64_t (&at)[PIXELS], const acc (&s)[PIXELS]) const {
    if (vectorized) {
      Pack<T, PIXELS> found;
      FASTFLOW_UNROLL
      for (int i = 0; i < PIXELS; ++i) found.value[i] = static_cast<T>(s[i]);
      y.span.template store<PIXELS>(at[0] + c * y.c, found);
    } else {
      FASTFLOW_UNROLL
      for (int i = 0; i < PIXELS; ++i)
        if (at[i] >= 0) y.span[at[i] + c * y.c] = static_cast<T>(s[i]);
    }
  }
};

// dx = W^T dy, dW = sum of dy x^T, db = sum of dy. With FROM_OUTPUT the input is y, and x = W^-1 (y - b) is
// written too. Tiles of pixels are rows in shared memory. For products with a matrix a thread handles pixels;
// for the sums it handles a square of dW and a slice of the tile's pixels. Each block sums its tiles in
// registers and writes one slot. SumSlotsKernel adds the slots in order. Their number depends only on the
// shape and the device, so every run gives the same bits.
template <typename T, int CMAX, bool FROM_OUTPUT>
struct Conv1x1BackwardKernel {
  using acc = accumulator<T>;
  static constexpr int THREADS = 128,
                       RESIDENT = CMAX <= 16   ? 4
                                  : CMAX <= 24 ? 3
                                               : 2,
                       TILE = CMAX <= 48 ? 128 : 96, ROW = row_stride(CMAX);
  // the square: one or two groups of four channels each way, CMAX / GROUPS apart, so that neighboring threads
  // read neighboring channels
  static constexpr int GROUPS = CMAX <= 16 ? 1 : 2, SIDE = CMAX / (4 * GROUPS), SQUARES = SIDE * SIDE;
  static constexpr int WEIGHTS = CMAX * CMAX, BIAS_SLICES = THREADS / CMAX;
  // slices of a tile's pixels; their sums reuse the memory of the tiles
  static constexpr int SLICES = std::min(THREADS / SQUARES, (2 * TILE * ROW - BIAS_SLICES * CMAX) / WEIGHTS);
  static_assert(SLICES >= 1);
  using Rows = Tile<T, CMAX, TILE, THREADS, sizeof(T) < 4>;

  Images<const T> source, dy;  // x, or y with FROM_OUTPUT
  Images<T> x, dx;             // x: with FROM_OUTPUT
  Weight<acc> weight_inverse, weight_transposed;
  Span<const acc> bias;  // with FROM_OUTPUT
  Span<acc> slots;       // [blocks, C C + C]
  int size = TILE;       // pixels of a tile

  // Small problems have smaller tiles, of 24 or 32 pixels at least, so that every multiprocessor has one.
  static int tile_size(int64_t pixels, int64_t multiprocessors) {
    int size = TILE;
    while (size > 32 && (pixels + size - 1) / size < multiprocessors) size /= 2;
    return size;
  }
  // One wave: the fewest slots that fill the device.
  static int64_t blocks(int64_t pixels, int size, int64_t multiprocessors) {
    return std::min((pixels + size - 1) / size, RESIDENT * multiprocessors);
  }
  static int64_t shared_bytes() {
    return sizeof(acc) * (2 * TILE * ROW + CMAX * CMAX * (FROM_OUTPUT ? 2 : 1));
  }

  template <class Block>
  FASTFLOW_HD void operator()(Block& block) const {
    const int channels = dy.channels;
    const Span<acc> both = block.template shared<acc>(2 * TILE * ROW);
    const Span<acc> x_rows{both.data, TILE * ROW}, dy_rows{both.data + TILE * ROW, TILE * ROW};
    const Span<acc> wt = block.template shared<acc>(CMAX * CMAX);
    const Span<acc> inverse = block.template shared<acc>(FROM_OUTPUT ? CMAX * CMAX : 0);
    typename Block::template PerThread<Sums> sums(block);
    const auto phase = [&](auto f) { block.phase([&](int thread) { f(opaque(thread)); }); };
    const int64_t step = block.count * size;
    for (int64_t first = block.index * size; first < dy.pixels; first += step) {
      phase([&](int thread) {
        Rows::load(thread, source, first, size, bias, x_rows);
        Rows::load(thread, dy, first, size, {}, dy_rows);
        if (first >= step) return;  // the weights are loaded together with the first pixels
        weight_transposed.template load<CMAX, THREADS>(thread, channels, wt);
        if (FROM_OUTPUT) weight_inverse.template load<CMAX, THREADS>(thread, channels, inverse);
      });
      typename Block::template PerThread<RowRegisters> registers(block);
      if (FROM_OUTPUT) {
        phase([&](int thread) { load_row_registers(thread, x_rows, registers[thread]); });
        phase([&](int thread) { multiply_rows(thread, channels, inverse, registers[thread], x_rows); });
      }
      phase([&](int thread) { add(thread, x_rows, dy_rows, sums[thread]); });
      phase([&](int thread) { load_row_registers(thread, dy_rows, registers[thread]); });
      phase([&](int thread) { multiply_rows(thread, channels, wt, registers[thread], dy_rows); });
      phase([&](int thread) {
        if (FROM_OUTPUT) Rows::store(thread, x, first, size, x_rows);
        Rows::store(thread, dx, first, size, dy_rows);
      });
    }
    // the tiles are no longer needed; their memory holds the sums of the slices, which are added in order
    block.phase([&](int thread) { store_slice_sums(thread, sums[thread], both); });
    block.phase([&](int thread) {
      const int weights = channels * channels, slot = weights + channels;
      for (int i = thread; i < slot; i += THREADS) {
        const bool is_bias = i >= weights;
        const int at = is_bias ? SLICES * WEIGHTS + i - weights : i / channels * CMAX + i % channels;
        const int slices = is_bias ? BIAS_SLICES : SLICES, step = is_bias ? CMAX : WEIGHTS;
        acc sum = 0;
        for (int slice = 0; slice < slices; ++slice) sum += both[at + slice * step];
        slots[block.index * slot + i] = sum;
      }
    });
  }

 private:
  struct Sums {
    acc weight[4 * GROUPS][4 * GROUPS], bias;
  };

  // Multiplies rows by w in place. A thread keeps PIXELS rows in registers, so that a load of weights is used
  // for PIXELS products, and computes every shares()-th group of four outputs. A barrier separates loading
  // from computing, because other threads write the rows.
  static constexpr int PIXELS = CMAX <= 48 ? 2 : 1;
  struct RowRegisters {
    acc v[CMAX][PIXELS];
  };

  FASTFLOW_HD int apart() const { return size / PIXELS; }  // distance of a thread's rows
  FASTFLOW_HD int shares() const { return THREADS / apart(); }

  FASTFLOW_HD void load_row_registers(int thread, const Span<acc>& rows, RowRegisters& registers) const {
    if (thread >= shares() * apart()) return;
    FASTFLOW_UNROLL
    for (int c = 0; c < CMAX; c += 4) {
      FASTFLOW_UNROLL
      for (int i = 0; i < PIXELS; ++i) {
        const Pack<acc, 4> found = rows.template load<4>((thread % apart() + i * apart()) * ROW + c);
        FASTFLOW_UNROLL
        for (int j = 0; j < 4; ++j) registers.v[c + j][i] = found.value[j];
      }
    }
  }

  FASTFLOW_HD void multiply_rows(int thread, int channels, const Span<acc>& w, const RowRegisters& registers,
                                 const Span<acc>& rows) const {
    if (thread >= shares() * apart()) return;
    for (int co = thread / apart() * 4; co < channels; co += 4 * shares()) {
      acc s[4][PIXELS] = {};
      multiply<CMAX>(w, channels, co, registers.v, s);
      FASTFLOW_UNROLL
      for (int i = 0; i < PIXELS; ++i)
        rows.template store<4>((thread % apart() + i * apart()) * ROW + co,
                               {{s[0][i], s[1][i], s[2][i], s[3][i]}});
    }
  }

  // The channel of row or column j of square m, of SIDE squares.
  FASTFLOW_HD static constexpr int channel(int m, int j) { return j / 4 * (CMAX / GROUPS) + 4 * m + j % 4; }

  FASTFLOW_HD void add(int thread, const Span<acc>& x_rows, const Span<acc>& dy_rows, Sums& sums) const {
    if (thread < BIAS_SLICES * CMAX)
      for (int pixel = thread / CMAX; pixel < size; pixel += BIAS_SLICES)
        sums.bias += dy_rows[pixel * ROW + thread % CMAX];
    const int square = thread % SQUARES, slice = thread / SQUARES;
    if (slice >= SLICES) return;
    const int m = square / SIDE, n = square % SIDE;
    for (int pixel = slice; pixel < size; pixel += SLICES) {
      acc g[4 * GROUPS], v[4 * GROUPS];
      FASTFLOW_UNROLL
      for (int group = 0; group < GROUPS; ++group) {
        const Pack<acc, 4> dy_four = dy_rows.template load<4>(pixel * ROW + channel(m, 4 * group));
        const Pack<acc, 4> x_four = x_rows.template load<4>(pixel * ROW + channel(n, 4 * group));
        FASTFLOW_UNROLL
        for (int j = 0; j < 4; ++j) g[4 * group + j] = dy_four.value[j], v[4 * group + j] = x_four.value[j];
      }
      FASTFLOW_UNROLL
      for (int i = 0; i < 4 * GROUPS; ++i) {
        FASTFLOW_UNROLL
        for (int j = 0; j < 4 * GROUPS; ++j) sums.weight[i][j] += g[i] * v[j];
      }
    }
  }

  FASTFLOW_HD static void store_slice_sums(int thread, const Sums& sums, const Span<acc>& partial) {
    if (thread < BIAS_SLICES * CMAX) partial[SLICES * WEIGHTS + thread] = sums.bias;
    const int square = thread % SQUARES, slice = thread / SQUARES;
    if (slice >= SLICES) return;
    const int m = square / SIDE, n = square % SIDE;
    FASTFLOW_UNROLL
    for (int i = 0; i < 4 * GROUPS; ++i) {
      FASTFLOW_UNROLL
      for (int j = 0; j < 4 * GROUPS; ++j)
        partial[slice * WEIGHTS + channel(m, i) * CMAX + channel(n, j)] = sums.weight[i][j];
    }
  }
};

// Sums the blocks' slots to dW and db: a block computes 32 sums with 32 threads each. A thread adds every
// 32nd slot; then the 32 partial sums are added in order.
template <typename acc>
struct SumSlotsKernel {
  static constexpr int COLUMNS = 32, SEGMENTS = 32, THREADS = COLUMNS * SEGMENTS, RESIDENT = 1;

  Span<const acc> slots;
  Span<acc> dweight, dbias;
  int64_t count;

  int64_t blocks() const { return (dweight.size + dbias.size + COLUMNS - 1) / COLUMNS; }
  static int64_t shared_bytes() { return sizeof(acc) * THREADS; }

  template <class Block>
  FASTFLOW_HD void operator()(Block& block) const {
    const int64_t size = dweight.size + dbias.size, first = block.index * COLUMNS;
    const Span<acc> sums = block.template shared<acc>(THREADS);
    block.phase([&](int thread) {
      const int64_t i = first + thread % COLUMNS;
      acc sum = 0;
      if (i < size)
        for (int64_t slot = thread / COLUMNS; slot < count; slot += SEGMENTS) sum += slots[slot * size + i];
      sums[thread] = sum;
    });
    block.phase([&](int thread) {
      const int64_t i = first + thread;
      if (thread >= COLUMNS || i >= size) return;
      acc sum = 0;
      for (int segment = 0; segment < SEGMENTS; ++segment) sum += sums[segment * COLUMNS + thread];
      (i < dweight.size ? dweight[i] : dbias[i - dweight.size]) = sum;
    });
  }
};

// The ops: host code that launches the kernels.

// Calls f(T(), width) for x's dtype and the smallest width of 16, 24, 48, 64 that is at least C.
template <class Device, class F>
void for_kernel(const Tensor& x, F f) {
  using torch::headeronly::ScalarType;
  const auto sized = [&](auto value) {
    const int64_t channels = x.size(1);
    if (channels <= 16) f(value, std::integral_constant<int, 16>());
    else if (channels <= 24) f(value, std::integral_constant<int, 24>());
    else if (channels <= 48) f(value, std::integral_constant<int, 48>());
    else f(value, std::integral_constant<int, 64>());
  };
  switch (x.scalar_type()) {
    case ScalarType::Float: return sized(float());
    case ScalarType::BFloat16: return sized(c10::BFloat16());
    case ScalarType::Half: return sized(c10::Half());
    default: break;
  }
  if constexpr (Device::DOUBLE) return sized(double());
  else expect_dtype("conv1x1", "x", x, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
}

template <typename T>
Matrix<T> matrix_of(const Tensor& w) {
  const int64_t size = (w.size(0) - 1) * w.stride(0) + (w.size(1) - 1) * w.stride(1) + 1;
  return {{w.const_data_ptr<T>(), size}, w.stride(0), w.stride(1)};
}
template <typename T>
Span<const T> vector_of(const std::optional<Tensor>& v) {
  return v ? Span<const T>{v->const_data_ptr<T>(), v->numel()} : Span<const T>{};
}

template <class Device>
Tensor conv1x1(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_conv1x1("conv1x1", "x", x, weight, bias);
  const typename Device::Guard guard(x);
  const Tensor from = with_position_stride(x);
  OutputBuffer y(x);
  const std::optional<Tensor> b = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  if (x.numel())
    for_kernel<Device>(x, [&](auto value, auto width) {
      using T = decltype(value);
      using Kernel = Conv1x1Kernel<T, width>;
      using acc = typename Kernel::acc;
      Kernel kernel{images_of<const T>(from, Kernel::PIXELS),
                    images_of<T>(y.kernel_output(), Kernel::PIXELS),
                    {matrix_of<acc>(weight)},
                    vector_of<acc>(b)};
      const int64_t tiles = (kernel.x.pixels + Kernel::TILE - 1) / Kernel::TILE,
                    processors = Device::multiprocessors();
      // blocks share few tiles; with many tiles a block processes up to four, so that W is loaded once for
      // them
      kernel.parts = static_cast<int>(std::clamp<int64_t>(processors / tiles, 1, (x.size(1) + 3) / 4));
      const int64_t each = std::clamp<int64_t>(tiles / (Kernel::RESIDENT * processors), 1, 4);
      Device::launch(kernel,
                     std::min<int64_t>((tiles + each - 1) / each * kernel.parts, (int64_t(1) << 31) - 1),
                     kernel.shared_bytes());
    });
  return y.finalize();
}

template <class Device, bool FROM_OUTPUT>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& source, const Tensor& weight,
                                                    const Tensor& weight_inverse,
                                                    const std::optional<Tensor>& bias, const Tensor& dy) {
  const typename Device::Guard guard(source);
  const int64_t channels = source.size(1);
  const Tensor from = with_position_stride(source), g = with_position_stride(dy);
  std::optional<OutputBuffer> x;  // with FROM_OUTPUT; otherwise x is the source
  if (FROM_OUTPUT) x.emplace(source);
  OutputBuffer dx(source);
  const std::optional<Tensor> b = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  const auto found = [&](const Tensor& dweight, const Tensor& dbias) {
    return std::tuple(x ? x->finalize() : source, dx.finalize(), dweight, dbias);
  };
  if (!source.numel())
    return found(torch::stable::new_zeros(weight, {channels, channels}),
                 torch::stable::new_zeros(weight, {channels}));
  const Tensor dweight = torch::stable::new_empty(weight, {channels, channels}),
               dbias = torch::stable::new_empty(weight, {channels});
  for_kernel<Device>(source, [&](auto value, auto width) {
    using T = decltype(value);
    using Kernel = Conv1x1BackwardKernel<T, width, FROM_OUTPUT>;
    using acc = typename Kernel::acc;
    Kernel kernel{images_of<const T>(from, 1),
                  images_of<const T>(g, 1),
                  {},
                  images_of<T>(dx.kernel_output(), 1),
                  {},
                  {matrix_of<acc>(weight).transposed()},
                  vector_of<acc>(b),
                  {}};
    if constexpr (FROM_OUTPUT) {
      kernel.x = images_of<T>(x->kernel_output(), 1);
      kernel.weight_inverse = {matrix_of<acc>(weight_inverse)};
    }
    const int64_t processors = Device::multiprocessors(), pixels = kernel.dy.pixels;
    kernel.size = Kernel::tile_size(pixels, processors);
    const int64_t blocks = Kernel::blocks(pixels, kernel.size, processors),
                  slot = channels * channels + channels;
    const Tensor slots = torch::stable::new_empty(weight, {blocks, slot});
    kernel.slots = {slots.mutable_data_ptr<acc>(), blocks * slot};
    Device::launch(kernel, blocks, Kernel::shared_bytes());
    const SumSlotsKernel<acc> sum{{slots.const_data_ptr<acc>(), blocks * slot},
                                  {dweight.mutable_data_ptr<acc>(), channels * channels},
                                  {dbias.mutable_data_ptr<acc>(), channels},
                                  blocks};
    Device::launch(sum, sum.blocks(), sum.shared_bytes());
  });
  return found(dweight, dbias);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> conv1x1_backward(const Tensor& x, const Tensor& weight, const Tensor& dy) {
  check_conv1x1_backward(x, weight, dy);
  auto [same, dx, dweight, dbias] = backward<Device, false>(x, weight, weight, std::nullopt, dy);
  return {dx, dweight, dbias};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> conv1x1_inverse_backward(const Tensor& y, const Tensor& weight,
                                                                    const Tensor& weight_inverse,
                                                                    const std::optional<Tensor>& bias,
                                                                    const Tensor& dy) {
  check_conv1x1_inverse_backward(y, weight, weight_inverse, bias, dy);
  return backward<Device, true>(y, weight, weight_inverse, bias, dy);
}

}  // namespace fastflow
