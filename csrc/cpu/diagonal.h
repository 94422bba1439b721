#pragma once
// The diagonal of a triangular matrix: what substitution multiplies by, and the error where it cannot.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <mutex>

#include "arguments.h"

namespace fastflow::cpu {

template <typename T>
bool usable(T d) { return d != T(0) && std::isfinite(d); }

// 0 where 1 / d overflows, and where it is so small that it has lost digits.
template <typename T>
T reciprocal(T d) {
  const T r = T(1) / d;
  return std::abs(r) >= std::numeric_limits<T>::min() && std::isfinite(r) ? r : T(0);
}

// The first singular matrix of a stack and its first place, whichever thread comes upon it: an exception must not leave
// a parallel loop, so it is raised after it.
class FirstSingular {
 public:
  explicit FirstSingular(int64_t n) : n_(n) {}

  void found(int64_t matrix, int64_t place, double value) {
    const std::lock_guard lock(mutex_);
    if (matrix * n_ + place >= first_) return;
    first_ = matrix * n_ + place;
    value_ = value;
  }
  void raise(const char* op) const {
    STD_TORCH_CHECK(first_ == NONE, singular(op, first_ / n_, first_ % n_, value_));
  }

 private:
  static constexpr int64_t NONE = std::numeric_limits<int64_t>::max();
  const int64_t n_;
  std::mutex mutex_;
  int64_t first_ = NONE;
  double value_ = 0;
};

}  // namespace fastflow::cpu
