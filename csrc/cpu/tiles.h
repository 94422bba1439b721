#pragma once
// Iterates over tensors [N, C, ...] in tiles of a few hundred elements for the CPU ops.
//
// A tile has lines of contiguous elements. In the layout "planes" (NCHW) a line is one channel along the
// positions; in "rows" (channels_last, and vectors) it is one position along the channels. Contiguous float32
// and float64 tiles are processed in place; other layouts and dtypes are copied through a scratch buffer, so
// the arithmetic handles one layout and one dtype.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <type_traits>

#include "checks.h"
#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/sums.h"
#include "multiversion.h"
#include "strides.h"

namespace fastflow::cpu {

template <typename F>
void for_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16());
    default: return f(torch::headeronly::Half());
  }
}

template <typename F>
void for_accumulator(const Tensor& x, const F& f) {
  x.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}

inline ScalarType accumulator_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

constexpr int64_t TILE = 512;  // elements of most ops; rows are never split, even if they are longer

struct Tile {
  int64_t sample, line, from, lines, length;  // elements `from` to `from + length` of each line
  int64_t count() const { return lines * length; }
};

// Cuts samples of `channels` channels (for a coupling: the transformed ones) into tiles. A batch of vectors
// is one sample whose positions are the vectors. If the line length allows, a tile is a multiple of every
// vector width; other tiles are copied.
struct Grid {
  int64_t samples, channels, positions;
  bool vectors, rows;
  int64_t tile_size;                          // elements, unless a row is longer
  int64_t lines, length;                      // of a sample
  int64_t lines_per_tile, elements_per_line;  // lines of a tile, and elements per line
  int64_t groups, pieces_per_line;            // groups of lines per sample, and pieces per line

  Grid(const Tensor& x, int64_t channels_, const Tensor& y, int64_t tile_size_ = TILE)
      : samples(x.size(0)), channels(channels_), positions(1), tile_size(tile_size_) {
    for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
    vectors = positions == 1;
    if (vectors) std::swap(samples, positions);
    rows = vectors || (y.stride(1) == 1 && channels > 1);
    lines = rows ? positions : channels, length = rows ? channels : positions;
    pieces_per_line = rows ? 1 : (length + tile_size - 1) / tile_size;
    elements_per_line =
        pieces_per_line > 1 ? padded((length + pieces_per_line - 1) / pieces_per_line) : length;
    lines_per_tile = length && pieces_per_line == 1 ? std::max<int64_t>(1, tile_size / length) : 1;
    const int64_t unit = 16 / std::gcd<int64_t>(length, 16);  // lines that fill vectors
    if (lines_per_tile > unit) lines_per_tile -= lines_per_tile % unit;
    groups = length ? (lines + lines_per_tile - 1) / lines_per_tile : 0;
  }
  int64_t tiles_of_sample() const { return groups * pieces_per_line; }
  int64_t tiles() const { return samples * tiles_of_sample(); }
  int64_t capacity() const { return padded(rows ? std::max(tile_size, length) : tile_size); }
  Tile operator[](int64_t i) const {
    const int64_t sample = i / tiles_of_sample(),
                  line = i % tiles_of_sample() / pieces_per_line * lines_per_tile,
                  from = i % pieces_per_line * elements_per_line;
    return {sample, line, from, std::min(lines_per_tile, lines - line),
            std::min(elements_per_line, length - from)};
  }
};

// Channels of a tensor [N, C, ...], with the strides of tiles.
struct Channels {
  char* data;
  ScalarType dtype;
  int64_t sample, line, step;

  Channels(const Tensor& x, int64_t first, int64_t channel_step, const Grid& grid) : dtype(x.scalar_type()) {
    const int64_t c = x.stride(1) * channel_step, p = grid.vectors ? x.stride(0) : position_stride(x);
    sample = grid.vectors ? 0 : x.stride(0), line = grid.rows ? p : c, step = grid.rows ? c : p;
    int64_t bytes = 0;
    for_dtype(dtype, [&](auto value) { bytes = sizeof(value); });
    data = static_cast<char*>(x.data_ptr()) + first * x.stride(1) * bytes;
  }
  template <typename T>
  T* at(const Tile& t) const {
    return reinterpret_cast<T*>(data) + t.sample * sample + t.line * line + t.from * step;
  }

  // The tile's address if it can be processed in place as T, otherwise null.
  template <typename T>
  T* in_place(const Tile& t) const {
    constexpr ScalarType SAME = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
    const bool dense = step == 1 && (t.lines == 1 || line == t.length) && t.count() % 16 == 0;
    return dense && dtype == SAME ? at<T>(t) : nullptr;
  }
};

constexpr int64_t WIDE = 16;  // a line of so many bfloat16 is converted in vectors

template <typename To, typename From>
void copy_line(To* to, int64_t to_step, const From* from, int64_t from_step, int64_t count) {
  int64_t i = 0;
  if (to_step == 1 && from_step == 1) {
    using torch::headeronly::BFloat16;
    if constexpr (std::is_same_v<From, BFloat16> && std::is_same_v<To, float>)
      if (count >= WIDE) return widen({count, &from->x, to});
    if constexpr (std::is_same_v<From, float> && std::is_same_v<To, BFloat16>)
      if (count >= WIDE) return narrow({count, from, &to->x});
    if constexpr (std::is_same_v<To, From>) {
      // by fours, the last of which may overlap the previous one: most lines are too short for a call of
      // memcpy
      if (count >= 4) std::memcpy(to + count - 4, from + count - 4, 4 * sizeof(To));
      for (; i + 4 <= count; i += 4) std::memcpy(to + i, from + i, 4 * sizeof(To));
      if (count >= 4) return;
    }
    for (; i < count; ++i) to[i] = static_cast<To>(from[i]);
  } else {
    for (; i < count; ++i) to[i * to_step] = static_cast<To>(from[i * from_step]);
  }
}

template <typename To, typename From>
void copy_lines(To* to, int64_t to_line, int64_t to_step, const From* from, int64_t from_line,
                int64_t from_step, const Tile& t) {
  int64_t lines = t.lines, length = t.length;
  if (to_step == 1 && from_step == 1 && to_line == length && from_line == length)
    length *= lines, lines = 1;  // dense
  if (length < 4 && length < lines)
    std::swap(lines, length), std::swap(to_line, to_step), std::swap(from_line, from_step);
  for (int64_t l = 0; l < lines; ++l)
    copy_line(to + l * to_line, to_step, from + l * from_line, from_step, length);
}

// Hands out the scratch buffers of a thread.
template <typename T>
class Buffers {
 public:
  Buffers(int64_t count, const Grid& grid)
      : size_(grid.capacity()), memory_(count * size_), next_(memory_.get()) {
    std::fill_n(next_, count * size_, T(0));  // vectors also read the elements after the end of a tile
  }
  T* next() { return (next_ += size_) - size_; }

 private:
  const int64_t size_;
  Buffer<T> memory_;
  T* next_;
};

// An input or output of the arithmetic: the tile in place, or a copy in a buffer.
template <typename acc>
class Operand {
 public:
  Operand(const Channels& channels, Buffers<acc>& buffers) : channels_(channels), buffer_(buffers.next()) {}
  const acc* load(const Tile& t) const {
    if (const acc* in_place = channels_.in_place<acc>(t)) return in_place;
    for_dtype(channels_.dtype, [&](auto value) {
      copy_lines(buffer_, t.length, 1, channels_.at<decltype(value)>(t), channels_.line, channels_.step, t);
    });
    return buffer_;
  }
  acc* output(const Tile& t) const {
    acc* in_place = channels_.in_place<acc>(t);
    return in_place ? in_place : buffer_;
  }
  void store(const Tile& t) const {
    if (channels_.in_place<acc>(t)) return;
    for_dtype(channels_.dtype, [&](auto value) {
      copy_lines(channels_.at<decltype(value)>(t), channels_.line, channels_.step, buffer_, t.length, 1, t);
    });
  }

 private:
  const Channels& channels_;
  acc* const buffer_;
};

// Values per channel or per position, broadcast over a tile; null if there are no values.
template <typename T>
class BroadcastOperand {
 public:
  BroadcastOperand(const T* values, bool along_lines, Buffers<T>& buffers)
      : values_(values), along_(along_lines), buffer_(values ? buffers.next() : nullptr) {}
  const T* operator()(const Tile& t) {
    if (!values_) return nullptr;
    // tiles of rows need the same values again
    const bool filled = along_ && t.lines <= last_.lines && t.from == last_.from && t.length == last_.length;
    for (int64_t l = 0; !filled && l < t.lines; ++l) {
      T* to = buffer_ + l * t.length;
      if (along_) copy_line(to, 1, values_ + t.from, 1, t.length);
      else std::fill_n(to, t.length, values_[t.line + l]);
    }
    if (!filled) last_ = t;
    return buffer_;
  }

 private:
  const T* values_;
  const bool along_;
  T* const buffer_;
  Tile last_{};
};

template <typename T>
Buffer<T> values_of(const Tensor& v) {
  Buffer<T> values(v.numel());
  for_dtype(v.scalar_type(), [&](auto value) {
    const auto* from = static_cast<const decltype(value)*>(v.const_data_ptr());
    copy_line(values.get(), 1, from, v.stride(0), v.numel());
  });
  return values;
}

template <typename To>
void write(const Tensor& v, const double* from) {
  copy_line(static_cast<To*>(v.mutable_data_ptr()), 1, from, 1, v.numel());
}

template <typename T>
const T* pointer(const std::optional<Buffer<T>>& v) {
  return v ? v->get() : nullptr;
}

// A per-element or per-line operand of a vector loop.
template <typename T>
struct OperandView {
  const T* data;      // null if there is no operand
  bool each;          // a value per element, otherwise a value per line
  int64_t line_step;  // between the values of lines; 0 if all lines share one
};

// The loop over a tile by whole vectors: line by line if the line length is a multiple of every vector width,
// otherwise the whole tile as one line.
struct VectorLoop {
  int64_t count, length;
  VectorLoop(const Grid& grid, const Tile& t)
      : count(fits(grid, t) ? t.lines : 1), length(t.count() / count) {}
  static bool fits(const Grid& grid, const Tile& t) { return !grid.rows && t.length % 16 == 0; }
};

// The vector of values for elements i, i + 1, ... of the tile, in line l.
template <typename M, typename T>
FASTFLOW_INLINE typename M::V at(const OperandView<T>& v, int64_t l, int64_t i) {
  return v.each ? M::load(v.data + i) : M::all(v.data[l * v.line_step]);
}

// An operand with one value per channel.
template <typename T>
class PerChannel {
 public:
  PerChannel(const T* values, const Grid& grid, Buffers<T>& buffers)
      : values_(values), grid_(grid), spread_(values, grid.rows, buffers) {}
  OperandView<T> operator()(const Tile& t) {
    if (values_ && VectorLoop::fits(grid_, t)) return {values_ + t.line, false, 1};
    return {spread_(t), true, 0};
  }

 private:
  const T* const values_;
  const Grid& grid_;
  BroadcastOperand<T> spread_;
};

// An operand with one value per sample.
template <typename T>
class PerSample {
 public:
  PerSample(const T* values, const Grid& grid, Buffers<T>& buffers)
      : values_(values), grid_(grid), spread_(values, false, buffers) {}
  OperandView<T> operator()(const Tile& t) {
    if (grid_.vectors) return {spread_(t), true, 0};
    return {values_ + t.sample, false, 0};
  }

 private:
  const T* const values_;
  const Grid& grid_;
  BroadcastOperand<T> spread_;
};

template <typename T>
double sum(const T* v, int64_t count) {
  double parts[8] = {}, total = 0;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int64_t j = 0; j < 8; ++j) parts[j] += v[i + j];
  for (; i < count; ++i) total += v[i];
  for (double part : parts) total += part;
  return total;
}

// A slot is a range of tiles that one thread sums in order; the sums of all slots are then added in order.
// The slots depend only on the shape, not on the number of threads, so sums have the same bits for any
// number.
struct Slots {
  static constexpr int64_t MAX_SLOTS = 32, MIN_TILES = 32;

  int64_t tiles, count;
  explicit Slots(const Grid& grid)
      : tiles(grid.tiles()), count(tiles ? std::clamp<int64_t>(tiles / MIN_TILES, 1, MAX_SLOTS) : 0) {}
  int64_t first(int64_t slot) const { return tiles * slot / count; }
  int64_t grain(int64_t grain_in_tiles) const {
    return tiles ? std::max<int64_t>(1, grain_in_tiles * count / tiles) : 1;
  }
};

// The sum of each channel over the tiles of a slot.
template <typename T>
class ChannelSums {
 public:
  explicit ChannelSums(const Grid& grid)
      : grid_(grid),
        size_(grid.rows ? grid.lines_per_tile * grid.length : grid.channels),
        sums_(size_),
        partial_(grid.rows ? size_ : 0) {}
  void clear() {
    std::fill_n(sums_.get(), size_, 0.);
    clear_partial();
  }
  void add(const T* values, const Tile& t) {
    if (!grid_.rows) return add_lines({t.lines, t.length, values, sums_.get() + t.line});
    // rows: one sum per element of a tile, so that vectors are full for any number of channels
    cpu::add(Addition<T>{t.count(), values, partial_.get()});
    if (++added_ == PARTIAL_TILES) flush_partial();
  }
  void take(double* to) {
    if (added_) flush_partial();
    for (int64_t lines = grid_.rows ? grid_.lines_per_tile : 1, half; lines > 1; lines -= half) {
      half = lines / 2;
      cpu::add(Addition<double>{half * grid_.channels, sums_.get() + (lines - half) * grid_.channels,
                                sums_.get()});
    }
    std::copy_n(sums_.get(), grid_.channels, to);
  }

 private:
  static constexpr int64_t PARTIAL_TILES = 8;  // so many are added without float64, as in add_lines

  void flush_partial() {
    add_each({1, size_, partial_.get(), sums_.get()});
    clear_partial();
  }
  void clear_partial() {
    if (grid_.rows) std::fill_n(partial_.get(), size_, T(0));
    added_ = 0;
  }

  const Grid& grid_;
  const int64_t size_;
  const Buffer<double> sums_;
  const Buffer<T> partial_;
  int64_t added_ = 0;
};

// Adds the sums of all slots, [slots, size], to the first slot.
inline void add_slots(double* sums, int64_t slots, int64_t size) {
  for (int64_t slot = 1; slot < slots; ++slot)
    for (int64_t k = 0; k < size; ++k) sums[k] += sums[slot * size + k];
}

}  // namespace fastflow::cpu
