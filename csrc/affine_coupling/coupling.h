#pragma once
// The arithmetic of an affine coupling on elements that lie side by side, compiled for each instruction set
// (multiversion.h).
#include <cstdint>
#include <type_traits>

namespace fastflow::cpu {

enum class Scale { none, exp, sigmoid, soft_clamp, tanh };

// All bits of an element: -1 where it counts, 0 where it does not.
template <typename T>
using Mask = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Whole vectors are read and written: `padded(count)` elements (gemm.h). Of a null `factor` or `active` there
// is none.
template <typename T>
struct Coupling {
  Scale scale;
  bool scale_first, inverse;
  int64_t count;
  const T *v, *shift, *raw;  // what is transformed, and the network's output
  const T* factor;
  const Mask<T>* active;  // where not, a checkerboard lets pass: nothing of shift and raw counts
  T* out;
  T* log_s;  // of the direction; none of an additive coupling
};
void couple(const Coupling<float>&);
void couple(const Coupling<double>&);

// Gradients from the direction's own input v, or where there is an `x` from the output of the forward
// direction: x is then what it came from. Of an additive coupling there are dv, dshift and x.
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
