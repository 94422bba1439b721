#pragma once
// A batch of images for the kernels: pixels of C channels, with three strides.
#include "block.h"
#include "strides.h"

namespace fastflow {

// std::min is not for devices.
FASTFLOW_HD int at_most(int64_t n, int most) { return static_cast<int>(n < most ? n : most); }

// Element (sample, channel, position) is at sample * n + channel * c + position * p. Pixels are numbered
// across the batch. `rows`: a pixel's channels are contiguous (channels_last, and vectors [N, C]). `packed`:
// four channels of a row, or `width` neighboring pixels of a plane, can be loaded at once; rows are then also
// at equal distances throughout the batch, so that pixel i is at i * p, and 512 rows are in 32 bits.
template <typename T>
struct Images {
  Span<T> span;
  int64_t n, c, p, positions, pixels;
  int64_t gap;  // between the end of a sample and the next: n - positions * p
  int channels;
  int wraps;  // positions, or 2^30 if they are more
  bool rows, packed;

  // Pixels from `first` on. Only this divides in 64 bits, once per tile.
  struct Start {
    int64_t base;
    int left;  // pixels of the first pixel's sample, or 2^30 if they are more
  };
  FASTFLOW_HD Start start(int64_t first) const {
    if (!gap) return {first * p, 0};
    const int64_t sample = first / positions, position = first - sample * positions;
    return {sample * n + position * p, at_most(positions - position, 1 << 30)};
  }
  // The offset of the pixel `row` < 2^30 pixels after the start.
  FASTFLOW_HD int64_t offset(const Start& start, int row) const {
    const int64_t at = start.base + row * p;
    return !gap || row < start.left ? at : at + (1 + (row - start.left) / wraps) * gap;
  }
};

// Requires x.numel() > 0. `width`: pixels of a plane that are loaded at once.
template <typename T>
Images<T> images_of(const Tensor& x, int width) {
  Images<T> found;
  found.channels = static_cast<int>(x.size(1));
  found.positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) found.positions *= x.size(d);
  found.n = x.stride(0), found.c = x.stride(1), found.p = found.positions == 1 ? found.n : position_stride(x);
  found.pixels = x.size(0) * found.positions;
  found.gap = found.n - found.positions * found.p;
  found.wraps = at_most(found.positions, 1 << 30);
  found.rows = found.c == 1 && found.channels > 1 && !(found.p == 1 && found.positions > 1);
  int64_t size = 1;
  for (int64_t d = 0; d < x.dim(); ++d) size += (x.size(d) - 1) * x.stride(d);
  if constexpr (std::is_const_v<T>) found.span = {static_cast<T*>(x.const_data_ptr()), size};
  else found.span = {static_cast<T*>(x.mutable_data_ptr()), size};
  const int64_t elements_per_load = found.rows ? 4 : width;
  const auto aligned = [&](int64_t stride) { return stride % elements_per_load == 0; };
  found.packed =
      reinterpret_cast<uintptr_t>(found.span.data) % (elements_per_load * sizeof(T)) == 0 &&
      aligned(found.n) &&
      (found.rows ? aligned(found.channels) && aligned(found.p) && found.p < (1 << 22) && !found.gap
                  : found.p == 1 && aligned(found.positions) && aligned(found.c));
  return found;
}

}  // namespace fastflow
