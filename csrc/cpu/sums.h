#pragma once
// Sums in float64 of what lies side by side, compiled for each instruction set (multiversion.h), in an order
// that the widths of its vectors and the shape alone decide.
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

// The same in the precision of the values: of a few, a third of the work.
template <typename T>
struct Addition {
  int64_t count;
  const T* values;
  T* sums;
};
void add(const Addition<float>&);
void add(const Addition<double>&);

// Deviations from a pivot, and their squares, which lose no digits where the pivot is one of the values.
template <typename T>
struct DeviationSum {
  int64_t lines, length;
  const T* values;
  const double* pivots;
  double *sums, *squares;
};
// With a pivot, a sum and a sum of squares for each line, or for each value.
void add_deviations_of_lines(const DeviationSum<float>&);
void add_deviations_of_lines(const DeviationSum<double>&);
void add_deviations_of_each(const DeviationSum<float>&);
void add_deviations_of_each(const DeviationSum<double>&);

}  // namespace fastflow::cpu
