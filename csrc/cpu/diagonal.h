#pragma once
// Reciprocals of the diagonals of triangular matrices, for substitution, and the error for singular ones.
#include <cmath>
#include <cstdint>
#include <limits>
#include <mutex>
#include <sstream>
#include <string>

#include "checks.h"

namespace fastflow::cpu {

inline std::string singular_message(const char* op, int64_t matrix, int64_t index, double value) {
  std::ostringstream out;
  out << op << ": diagonal of matrix " << matrix << ": got ";
  if (std::isnan(value)) out << "nan";  // a stream writes -nan if the sign bit is set
  else out << value;
  out << " at index " << index << ", expected a finite nonzero number";
  return out.str();
}

// The first singular matrix of a stack, and the first index on its diagonal, whichever thread finds it. The
// error is raised after the parallel loop, which exceptions must not leave.
class FirstSingular {
 public:
  explicit FirstSingular(int64_t n) : n_(n) {}

  // 1 / d, or 0 if that overflows or is denormal; substitution then divides by d.
  template <typename T>
  T reciprocal(T d, int64_t matrix, int64_t index) {
    const T r = T(1) / d;
    if (std::abs(r) >= std::numeric_limits<T>::min() && std::abs(r) <= std::numeric_limits<T>::max())
      return r;
    if (d == T(0) || !std::isfinite(d)) found(matrix, index, d);
    return T(0);
  }
  void raise(const char* op) const {
    STD_TORCH_CHECK(first_ == NONE, singular_message(op, first_ / n_, first_ % n_, value_));
  }

 private:
  static constexpr int64_t NONE = std::numeric_limits<int64_t>::max();
  const int64_t n_;
  std::mutex mutex_;
  int64_t first_ = NONE;
  double value_ = 0;

  void found(int64_t matrix, int64_t index, double value) {
    const std::lock_guard lock(mutex_);
    if (matrix * n_ + index >= first_) return;
    first_ = matrix * n_ + index;
    value_ = value;
  }
};

}  // namespace fastflow::cpu
