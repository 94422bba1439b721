// fastflow_C::squeeze on the CPU, both directions: 2x2 blocks of pixels into channels. Elements are copied as
// integers of their size. 8 bytes per float32 element: read once and written once.
//
// Both sides are processed one row of blocks at a time. With planes (contiguous pixels, NCHW) pairs of pixels
// are separated; with rows (contiguous channels, channels_last) all channels of a block are copied together.
// Other strides are processed like planes.
#include "stable.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "checks.h"
#include "cpu/tensors.h"
#include "multiversion.h"
#include "squeeze/squeeze.h"

namespace fastflow::cpu {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // minimum number of elements per thread

// Copies lines begin to end between image [N, C, 2H, 2W] and squeezed [N, 4C, H, W]; strides in elements.
struct Move {
  bool inverse, rows;
  size_t itemsize;
  int64_t c, h, w;
  char *image, *squeezed;
  int64_t image_n, image_c, image_h, image_w;
  int64_t squeezed_n, squeezed_h, squeezed_w;
  Blocks blocks;
  int64_t begin, end;  // line index: n * H + i for rows, (n * C + c) * H + i for planes
};

// a: an element of the image, b: of the squeezed image.
template <bool INVERSE, typename T>
FASTFLOW_INLINE void move(T& a, T& b) {
  if (INVERSE) a = b;
  else b = a;
}

// Pairs of pixels of an image row, and the first and the second pixels of all pairs.
template <bool INVERSE, typename T>
FASTFLOW_INLINE void move_pairs(T* __restrict row, int64_t step, T* __restrict first, T* __restrict second,
                                int64_t to_step, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    move<INVERSE>(row[2 * j * step], first[j * to_step]);
    move<INVERSE>(row[(2 * j + 1) * step], second[j * to_step]);
  }
}

template <bool INVERSE, typename T>
FASTFLOW_INLINE void move_planes(const Move& m) {
  // counters instead of divisions per line: lines may be short
  int64_t i = m.begin % m.h, c = m.begin / m.h % m.c, n = m.begin / m.h / m.c;
  for (int64_t line = m.begin; line < m.end; ++line) {
    T* image = reinterpret_cast<T*>(m.image) + n * m.image_n + c * m.image_c + 2 * i * m.image_h;
    T* squeezed =
        reinterpret_cast<T*>(m.squeezed) + n * m.squeezed_n + c * m.blocks.channel + i * m.squeezed_h;
    for (int k = 0; k < 4; k += 2, image += m.image_h) {
      T *first = squeezed + m.blocks.pixel[k], *second = squeezed + m.blocks.pixel[k + 1];
      if (m.image_w == 1 && m.squeezed_w == 1) move_pairs<INVERSE>(image, 1, first, second, 1, m.w);
      else move_pairs<INVERSE>(image, m.image_w, first, second, m.squeezed_w, m.w);
    }
    if (++i < m.h) continue;
    i = 0;
    if (++c == m.c) c = 0, ++n;
  }
}

template <bool INVERSE, typename T>
FASTFLOW_INLINE void move_run(T* __restrict image, T* __restrict squeezed, int64_t count) {
  T *to = INVERSE ? image : squeezed, *from = INVERSE ? squeezed : image;
  int64_t i = 0;
  if (count >= 4) {
    // by fours, the last of which may overlap the previous one: most runs are too short for a call of memcpy
    std::memcpy(to + count - 4, from + count - 4, 4 * sizeof(T));
    for (; i + 4 <= count; i += 4) std::memcpy(to + i, from + i, 4 * sizeof(T));
    return;
  }
  for (; i < count; ++i) to[i] = from[i];
}

// C: the number of channels if known at compile time, otherwise 0.
template <int C, bool INVERSE, typename T>
FASTFLOW_INLINE void move_rows(const Move& m) {
  const int64_t channels = C ? C : m.c;
  // the four pixels of a channel are contiguous
  const bool interleaved = m.blocks.channel == 4;
  // both pixels of a row of a block are contiguous on both sides
  const bool pairs = m.image_w == channels && m.blocks.pixel[1] == channels &&
                     m.blocks.pixel[3] - m.blocks.pixel[2] == channels;
  for (int64_t line = m.begin; line < m.end; ++line) {
    T* upper = reinterpret_cast<T*>(m.image) + line / m.h * m.image_n + 2 * (line % m.h) * m.image_h;
    T* to = reinterpret_cast<T*>(m.squeezed) + line / m.h * m.squeezed_n + line % m.h * m.squeezed_h;
    for (int64_t j = 0; j < m.w; ++j, upper += 2 * m.image_w, to += m.squeezed_w) {
      T *right = upper + m.image_w, *lower = upper + m.image_h, *last = lower + m.image_w;
      if (interleaved) {
        for (int64_t c = 0; c < channels; ++c) {
          move<INVERSE>(upper[c], to[4 * c]);
          move<INVERSE>(right[c], to[4 * c + 1]);
          move<INVERSE>(lower[c], to[4 * c + 2]);
          move<INVERSE>(last[c], to[4 * c + 3]);
        }
      } else if (pairs) {
        move_run<INVERSE>(upper, to, 2 * channels);
        move_run<INVERSE>(lower, to + m.blocks.pixel[2], 2 * channels);
      } else {
        move_run<INVERSE>(upper, to, channels);
        move_run<INVERSE>(right, to + m.blocks.pixel[1], channels);
        move_run<INVERSE>(lower, to + m.blocks.pixel[2], channels);
        move_run<INVERSE>(last, to + m.blocks.pixel[3], channels);
      }
    }
  }
}

template <typename T>
FASTFLOW_INLINE void move_elements(const Move& m) {
  if (m.rows && m.c == 3)  // color images
    m.inverse ? move_rows<3, true, T>(m) : move_rows<3, false, T>(m);
  else if (m.rows) m.inverse ? move_rows<0, true, T>(m) : move_rows<0, false, T>(m);
  else m.inverse ? move_planes<true, T>(m) : move_planes<false, T>(m);
}

template <int BYTES>
FASTFLOW_INLINE void move_lines_simd(const Move& m) {
  switch (m.itemsize) {
    case 1: return move_elements<uint8_t>(m);
    case 2: return move_elements<uint16_t>(m);
    case 4: return move_elements<uint32_t>(m);
    default: return move_elements<uint64_t>(m);
  }
}
FASTFLOW_MULTIVERSION(move_lines, Move, move_lines_simd)

Tensor squeeze(const Tensor& x, const std::string& order, bool inverse) {
  expect_squeezable("squeeze", "x", x, inverse);
  STD_TORCH_CHECK(itemsize(x) <= 8, "squeeze: x: got elements of ", itemsize(x),
                  " bytes, expected at most 8");
  const int64_t n = x.size(0), c = inverse ? x.size(1) / 4 : x.size(1),
                h = inverse ? x.size(2) : x.size(2) / 2, w = inverse ? x.size(3) : x.size(3) / 2;
  const bool channels_last = x.size(1) > 1 && x.stride(1) == 1 && !x.is_contiguous();
  const Tensor y =
      empty_images(x, n, inverse ? c : 4 * c, inverse ? 2 * h : h, inverse ? 2 * w : w, channels_last);
  if (!x.numel()) return y;
  const Tensor &image = inverse ? y : x, &squeezed = inverse ? x : y;
  const Blocks blocks = blocks_of(order, c, squeezed.stride(1));
  Move all{inverse,
           false,
           itemsize(x),
           c,
           h,
           w,
           static_cast<char*>(image.data_ptr()),
           static_cast<char*>(squeezed.data_ptr()),
           image.stride(0),
           image.stride(1),
           image.stride(2),
           image.stride(3),
           squeezed.stride(0),
           squeezed.stride(2),
           squeezed.stride(3),
           blocks,
           0,
           0};
  all.rows = squeezed.stride(1) == 1 && all.image_c == 1 && all.squeezed_w != 1;
  const int64_t elements = all.rows ? 4 * c * w : 4 * w;
  torch::stable::parallel_for(0, all.rows ? n * h : n * c * h, std::max<int64_t>(1, GRAIN / elements),
                              [&](int64_t begin, int64_t end) {
                                Move part = all;
                                part.begin = begin, part.end = end;
                                move_lines(part);
                              });
  return y;
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) { m.impl("squeeze", TORCH_BOX(&fastflow::cpu::squeeze)); }
