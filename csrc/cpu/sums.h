#pragma once
// Sums in float64 of contiguous values, compiled for each instruction set (multiversion.h). The order of
// additions depends only on the vector width and the shape.
#include <cstdint>

namespace fastflow::cpu {

template <typename T>
struct Sum {
  int64_t lines, length;
  const T* values;  // consecutive lines
  double* sums;
};
// sums[l] += values[l][0] + values[l][1] + ... for each line l
void add_lines(const Sum<float>&);
void add_lines(const Sum<double>&);
// sums[i] += values[i] for i < lines * length
void add_each(const Sum<float>&);
void add_each(const Sum<double>&);

// sums[i] += values[i] in the precision of the values: a third of the work, for sums of few values.
template <typename T>
struct Addition {
  int64_t count;
  const T* values;
  T* sums;
};
void add(const Addition<float>&);
void add(const Addition<double>&);

// Sums of deviations from a pivot, and of their squares. With one of the values as pivot, the squares do not
// cancel.
template <typename T>
struct DeviationSum {
  int64_t lines, length;
  const T* values;
  const double* pivots;
  double *sums, *squares;
};
// One pivot, sum and sum of squares per line, or per value.
void add_deviations_of_lines(const DeviationSum<float>&);
void add_deviations_of_lines(const DeviationSum<double>&);
void add_deviations_of_each(const DeviationSum<float>&);
void add_deviations_of_each(const DeviationSum<double>&);

}  // namespace fastflow::cpu
