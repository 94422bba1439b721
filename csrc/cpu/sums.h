#pragma once
// Sums in float64 of what lies side by side, compiled for each instruction set (clones.h), in an order that the widths of
// its vectors and the shape alone decide.
#include <cstdint>

namespace fastflow::cpu {

template <typename T>
struct Sum {
  int64_t lines, length;
  const T* values;  // lines one after the other
  double* sums;
};
// Adds the sum of each line to that line's: sums[l] += values[l][0] + values[l][1] + ...
void add_lines(const Sum<float>&);
void add_lines(const Sum<double>&);
// Adds each value to its own sum: sums[i] += values[i], i < lines * length.
void add_each(const Sum<float>&);
void add_each(const Sum<double>&);

}  // namespace fastflow::cpu
