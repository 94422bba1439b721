#pragma once
// The diagonals of a stack of triangular matrices: what substitution multiplies by, and the error where it
// cannot.
#include <cmath>
#include <cstdint>
#include <limits>
#include <mutex>
#include <sstream>
#include <string>

#include "checks.h"

namespace fastflow::cpu {

inline std::string singular_message(const char* op, int64_t matrix, int64_t place, double value) {
  std::ostringstream out;
  out << op << ": matrix " << matrix << " of the stack has ";
  if (std::isnan(value)) out << "nan";  // a stream writes -nan if the sign bit is set
  else out << value;
  out << " at place " << place << " of its diagonal, expected a finite number other than 0";
  return out.str();
}

// The first singular matrix of a stack and its first place, whichever thread comes upon it: an exception must
// not leave a parallel loop, so it is raised after it.
class FirstSingular {
 public:
  explicit FirstSingular(int64_t n) : n_(n) {}

  // 1 / d; 0 where that overflows, or is so small that it has lost digits: what is to be solved is then
  // divided by d.
  template <typename T>
  T reciprocal(T d, int64_t matrix, int64_t place) {
    const T r = T(1) / d;
    if (std::abs(r) >= std::numeric_limits<T>::min() && std::abs(r) <= std::numeric_limits<T>::max())
      return r;
    if (d == T(0) || !std::isfinite(d)) found(matrix, place, d);
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

  void found(int64_t matrix, int64_t place, double value) {
    const std::lock_guard lock(mutex_);
    if (matrix * n_ + place >= first_) return;
    first_ = matrix * n_ + place;
    value_ = value;
  }
};

}  // namespace fastflow::cpu
