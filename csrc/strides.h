#pragma once
// Images whose positions one stride leads through: contiguous, channels_last, and slices of either.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace fastflow {

using torch::stable::Tensor;

// The stride from position to position of x [N, C, ...], or -1 where there is no one stride.
inline int64_t position_stride(const Tensor& x) {
  int64_t stride = 1, next = -1;  // next: what the stride of the next outer dimension has to be
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) == 1) continue;
    if (next < 0) stride = x.stride(d);
    else if (x.stride(d) != next) return -1;
    next = x.stride(d) * x.size(d);
  }
  return stride;
}

// x itself, or a contiguous copy where no one stride leads through its positions.
inline Tensor with_position_stride(const Tensor& x) {
  return position_stride(x) < 0 ? torch::stable::contiguous(x) : x;
}

// A result that lies as torch.empty_like(like) does, computed elsewhere where no stride leads through its
// positions.
class __attribute__((visibility("hidden"))) OutputBuffer {  // as its tensors are
 public:
  explicit OutputBuffer(const Tensor& like)
      : out_(torch::stable::empty_like(like)),
        room_(position_stride(out_) < 0 ? torch::stable::new_empty(like, like.sizes()) : out_) {}
  const Tensor& kernel_output() const { return room_; }
  Tensor finalize() { return room_.get() == out_.get() ? out_ : torch::stable::copy_(out_, room_); }

 private:
  Tensor out_, room_;
};

}  // namespace fastflow
