#pragma once
// A batch of images for the kernels: pixels of C channels, with three strides.
#include "block.h"
#include "strides.h"

namespace fastflow {

// Element (sample, channel, position) is at sample * n + channel * c + position * p. Pixels are numbered
// across the batch. `rows`: a pixel's channels are contiguous (channels_last, and vectors [N, C]). `packed`:
// four channels of a row, or `width` neighboring pixels of a plane, can be loaded at once.
template <typename T>
struct Images {
  Span<T> span;
  int64_t n, c, p, positions, pixels;
  int channels;
  bool rows, packed;

  FASTFLOW_HD int64_t base(int64_t pixel) const {
    return n == positions * p ? pixel * p : pixel / positions * n + pixel % positions * p;
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
  found.rows = found.c == 1 && found.channels > 1 && !(found.p == 1 && found.positions > 1);
  int64_t size = 1;
  for (int64_t d = 0; d < x.dim(); ++d) size += (x.size(d) - 1) * x.stride(d);
  if constexpr (std::is_const_v<T>) found.span = {static_cast<T*>(x.const_data_ptr()), size};
  else found.span = {static_cast<T*>(x.mutable_data_ptr()), size};
  const int64_t elements_per_load = found.rows ? 4 : width;
  const auto aligned = [&](int64_t stride) { return stride % elements_per_load == 0; };
  found.packed = reinterpret_cast<uintptr_t>(found.span.data) % (elements_per_load * sizeof(T)) == 0 &&
                 aligned(found.n) &&
                 (found.rows ? aligned(found.channels) && aligned(found.p)
                             : found.p == 1 && aligned(found.positions) && aligned(found.c));
  return found;
}

}  // namespace fastflow
