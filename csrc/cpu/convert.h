#pragma once
// Conversion between bfloat16 and float32, compiled for each instruction set (multiversion.h), with the bits
// of BFloat16's own conversion: to nearest even, and one NaN.
#include <cstdint>

namespace fastflow::cpu {

struct Widening {
  int64_t count;
  const uint16_t* from;
  float* to;
};
void widen(const Widening&);

struct Narrowing {
  int64_t count;
  const float* from;
  uint16_t* to;
};
void narrow(const Narrowing&);

}  // namespace fastflow::cpu
