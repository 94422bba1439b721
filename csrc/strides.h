#pragma once
// Images with a single stride between positions: contiguous, channels_last, and slices of either.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace fastflow {

using torch::stable::Tensor;

// The stride between neighboring positions of x [N, C, ...], or -1 if it is not constant.
inline int64_t position_stride(const Tensor& x) {
  int64_t stride = 1, next = -1;  // next: required stride of the next outer dimension
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) == 1) continue;
    if (next < 0) stride = x.stride(d);
    else if (x.stride(d) != next) return -1;
    next = x.stride(d) * x.size(d);
  }
  return stride;
}

// x, or a contiguous copy if its positions have no single stride.
inline Tensor with_position_stride(const Tensor& x) {
  return position_stride(x) < 0 ? torch::stable::contiguous(x) : x;
}

// An output with the strides of torch.empty_like(like). If its positions have no single stride, the kernel
// writes to a contiguous buffer, which finalize() copies.
class __attribute__((visibility("hidden"))) OutputBuffer {  // like the visibility of its tensors
 public:
  explicit OutputBuffer(const Tensor& like)
      : out_(torch::stable::empty_like(like)),
        buffer_(position_stride(out_) < 0 ? torch::stable::new_empty(like, like.sizes()) : out_) {}
  const Tensor& kernel_output() const { return buffer_; }
  Tensor finalize() { return buffer_.get() == out_.get() ? out_ : torch::stable::copy_(out_, buffer_); }

 private:
  Tensor out_, buffer_;
};

}  // namespace fastflow
