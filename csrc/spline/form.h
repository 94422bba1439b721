#pragma once
// The arguments of an op that describe its splines.
#include <cmath>
#include <string>

#include "checks.h"
#include "spline/spline.h"

namespace fastflow::cpu {

struct SplineForm {
  int64_t bins;
  double bound;
  const std::string &tails, &convention;
  double factor, min_bin, min_slope;

  // Half of the circle by which features are shifted, or 0.
  double half_turn() const { return tails == "half_turn" ? bound : 0; }
  // Beyond this features are 0; or 0, of other tails.
  double limit() const { return tails == "zero" ? bound : 0; }
  int64_t parameters(const char* op) const {
    STD_TORCH_CHECK(convention != "freia", op, ": convention: got freia, expected another one");
    STD_TORCH_CHECK(bins >= 1 && bins <= MAX_BINS, op, ": bins: got ", bins, ", expected 1 to ", MAX_BINS);
    return splines<float>().parameters();
  }
  template <typename T>
  Splines<T> splines() const {
    const bool none = tails == "none", zuko = convention == "zuko";
    const double smallest = zuko ? 0 : min_bin;
    return {bins,
            none || tails == "zero" ? Tails::none
            : tails == "circular"   ? Tails::circular
                                    : Tails::linear,
            zuko,
            static_cast<T>(none ? 0 : -bound),
            static_cast<T>(none ? 1 : 2 * bound),
            static_cast<T>(smallest),
            static_cast<T>(1 - smallest * static_cast<double>(bins)),
            static_cast<T>(factor),
            static_cast<T>(min_slope),
            static_cast<T>(convention == "fastflow" ? std::log(std::expm1(1 - min_slope)) : 0),
            static_cast<T>(-1 / std::log(min_slope))};
  }
};

}  // namespace fastflow::cpu
