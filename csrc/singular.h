#pragma once
// Reports singular matrices and invalid permutations from a kernel, without synchronization.
//
// A kernel cannot raise. It writes to a word that host and device share (`Device::fault_word()`). The host
// reads the word before it launches such a kernel again, and when Python calls `raise_singular` after a
// synchronization. Like CUDA's own errors, the error is therefore late. It names the op, the matrix and the
// index; the results of that call are invalid.
#include "stable.h"
#include "block.h"

namespace fastflow {

enum class Fault : int64_t { none, diagonal_of_triangular_solve, diagonal_of_lu_weight, perm_of_lu_weight };

// Bits: the fault (2), the index (24), the matrix.
FASTFLOW_HD int64_t encode_fault(Fault fault, int64_t matrix, int64_t index) {
  return matrix << 26 | (index & 0xffffff) << 2 | static_cast<int64_t>(fault);
}

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
  const int64_t matrix = word >> 26, index = word >> 2 & 0xffffff;
  const Fault fault = static_cast<Fault>(word & 3);
  STD_TORCH_CHECK(fault != Fault::perm_of_lu_weight, "lu_weight (an earlier call): perm of matrix ", matrix,
                  ": got a number out of range or repeated at index ", index, ", expected each row once");
  const char* op = fault == Fault::diagonal_of_lu_weight ? "lu_weight" : "triangular_solve";
  STD_TORCH_CHECK(false, op, " (an earlier call): diagonal of matrix ", matrix,
                  ": got 0, inf or nan at index ", index, ", expected a finite nonzero number");
}

}  // namespace fastflow
