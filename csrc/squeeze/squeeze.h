#pragma once
// Where squeeze's orders put the pixels of a block, for the ops that squeeze.
#include <cstdint>
#include <string>

namespace fastflow::cpu {

struct Blocks {
  int64_t channel;   // in squeezed memory, from a channel of the image to the next
  int64_t pixel[4];  // and from a block's first pixel to pixel (k / 2, k % 2)
};

// `step`: the stride of the channels of squeezed images, of which there are 4 * channels.
inline Blocks blocks_of(const std::string& order, int64_t channels, int64_t step) {
  if (order == "channel") return {4 * step, {0, step, 2 * step, 3 * step}};
  const int64_t pixel = channels * step;
  if (order == "space") return {step, {0, pixel, 2 * pixel, 3 * pixel}};
  return {step, {0, 2 * pixel, 3 * pixel, pixel}};  // realnvp: the main diagonal first
}

}  // namespace fastflow::cpu
