#pragma once
// A batch of images as the kernels see it: pixels of C channels, through three strides.
#include "block.h"
#include "strides.h"

namespace fastflow {

// Element (sample, channel, position) lies at sample * n + channel * c + position * p. Pixels are numbered
// through the batch. `rows`: a pixel's channels lie side by side (channels_last, and vectors [N, C]).
// `packed`: four channels of a row, or `width` neighbours of a plane, may move at once.
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

// Of an x that has elements. `width`: how many pixels of a plane move at once.
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
  const int64_t together = found.rows ? 4 : width;
  const auto whole = [&](int64_t stride) { return stride % together == 0; };
  found.packed = reinterpret_cast<uintptr_t>(found.span.data) % (together * sizeof(T)) == 0 &&
                 whole(found.n) &&
                 (found.rows ? whole(found.channels) && whole(found.p)
                             : found.p == 1 && whole(found.positions) && whole(found.c));
  return found;
}

}  // namespace fastflow
