#pragma once
// The arithmetic of an affine coupling on contiguous elements, compiled for each instruction set
// (multiversion.h).
#include <cstdint>
#include <type_traits>

namespace fastflow::cpu {

enum class Scale { none, exp, sigmoid, soft_clamp, tanh };

// A mask of an element: all bits set (-1) if it is transformed, otherwise 0.
template <typename T>
using Mask = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Reads and writes whole vectors, `padded(count)` elements (gemm.h). `factor` and `active` may be null.
template <typename T>
struct Coupling {
  Scale scale;
  bool scale_first, inverse;
  int64_t count;
  const T *v, *shift, *raw;  // transformed elements, and the network's output
  const T* factor;
  const Mask<T>* active;  // mask of a checkerboard; other elements ignore shift and raw
  T* out;
  T* log_s;  // of the direction; not written by an additive coupling
};
void couple(const Coupling<float>&);
void couple(const Coupling<double>&);

// Gradients from the direction's input v. With `x`, v is the output of the forward direction, and its input
// is written to x. An additive coupling writes only dv, dshift and x.
template <typename T>
struct CouplingBackward {
  Scale scale;
  bool scale_first, inverse;
  int64_t count;
  const T *v, *shift, *raw;
  const T* factor;
  const Mask<T>* active;
  const T *dout, *dlog_det;
  T *x, *dv, *dshift, *draw, *dfactor;
};
void couple_backward(const CouplingBackward<float>&);
void couple_backward(const CouplingBackward<double>&);

}  // namespace fastflow::cpu
