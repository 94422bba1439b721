#pragma once
// Channel orders of squeeze, for the ops that squeeze.
#include <cstdint>
#include <string>

#include "checks.h"

namespace fastflow::cpu {

struct Blocks {
  int64_t channel;   // offset in squeezed memory between channels of the image
  int64_t pixel[4];  // and from the first pixel of a block to pixel (k / 2, k % 2)
};

inline void expect_squeezable(const char* op, const char* name, const Tensor& x, bool inverse) {
  expect_shape(op, name, x, {ANY, ANY, ANY, ANY});
  if (inverse) return expect_channels(op, name, x, 4);
  STD_TORCH_CHECK(x.size(2) % 2 == 0 && x.size(3) % 2 == 0, op, ": ", name, ": got shape ",
                  to_string(x.sizes()), ", expected an even height and width");
}

// `channels`: of the image; `step`: the channel stride of the squeezed image.
inline Blocks blocks_of(const std::string& order, int64_t channels, int64_t step) {
  if (order == "channel") return {4 * step, {0, step, 2 * step, 3 * step}};
  const int64_t pixel = channels * step;
  if (order == "space") return {step, {0, pixel, 2 * pixel, 3 * pixel}};
  return {step, {0, 2 * pixel, 3 * pixel, pixel}};  // realnvp: the main diagonal first
}

}  // namespace fastflow::cpu
