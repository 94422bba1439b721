#pragma once
// How a kernel says that a matrix is singular, or a permutation none, without the host waiting for it.
//
// A kernel writes into a word that host and device share (`Device::fault_word()`); the host looks at it
// whenever it is about to launch such a kernel again, and when Python asks (`raise_singular`, after a
// synchronisation). The error is late, as CUDA's own are, and names the op, the matrix and the place; what
// the kernel computed is worthless.
#include "stable.h"
#include "block.h"

namespace fastflow {

enum class Fault : int64_t { none, diagonal_of_triangular_solve, diagonal_of_lu_weight, perm_of_lu_weight };

// The fault, the place (24 bits) and the matrix.
FASTFLOW_HD int64_t encode_fault(Fault fault, int64_t matrix, int64_t place) {
  return matrix << 26 | (place & 0xffffff) << 2 | static_cast<int64_t>(fault);
}

// Neither 0 nor infinite nor NaN.
template <typename T>
FASTFLOW_HD bool is_finite_nonzero(T v) {
  return v != T(0) && v - v == T(0);
}

template <class Device>
void raise_singular() {
  volatile int64_t* slot = Device::fault_word();
  const int64_t word = *slot;
  if (word == 0) return;
  *slot = 0;
  const int64_t matrix = word >> 26, place = word >> 2 & 0xffffff;
  const Fault fault = static_cast<Fault>(word & 3);
  STD_TORCH_CHECK(fault != Fault::perm_of_lu_weight, "lu_weight: perm of matrix ", matrix,
                  " names no row, or one twice, at place ", place, ", in a call before this one");
  const char* op = fault == Fault::diagonal_of_lu_weight ? "lu_weight" : "triangular_solve";
  STD_TORCH_CHECK(false, op, ": matrix ", matrix, " of the stack has 0 or no finite number at place ", place,
                  " of its diagonal, in a call before this one");
}

}  // namespace fastflow
