#pragma once
// Transposes narrow matrices in registers, compiled for each instruction set (multiversion.h).
#include <cstdint>

namespace fastflow::cpu {

// Copies between rows of `each` neighbors and columns that are `stride` apart: element q of row i is at
// rows[i * each + q] and columns[q * stride + i].
template <typename T>
struct ToColumns {
  int64_t count, each, stride;  // rows; elements of a row
  const T* rows;
  T* columns;
};
template <typename T>
struct ToRows {
  int64_t count, each, stride;
  const T* columns;
  T* rows;
};
void to_columns(const ToColumns<float>& a);
void to_columns(const ToColumns<double>& a);
void to_rows(const ToRows<float>& a);
void to_rows(const ToRows<double>& a);

}  // namespace fastflow::cpu
