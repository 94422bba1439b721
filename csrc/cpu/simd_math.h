#pragma once
// exp, expm1, tanh, log, log1p, cosine and sine of vectors, for functions compiled for each instruction set
// (multiversion.h). Those of float are polynomials, within 2.5 units in the last place (cosine and sine: 3),
// also for infinities, NaN and denormal numbers. Those of double call the C library.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "multiversion.h"

// Vectors are passed between functions that are always inlined, so no ABI is at stake.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fastflow::cpu {

template <typename T, int BYTES>
struct Simd {
  static constexpr int64_t COUNT = BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(BYTES)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Integer;
  typedef Integer I __attribute__((vector_size(BYTES)));

  static FASTFLOW_INLINE V load(const T* p) {
    V v;
    std::memcpy(&v, p, BYTES);
    return v;
  }
  static FASTFLOW_INLINE void store(T* p, const V& v) { std::memcpy(p, &v, BYTES); }
  static FASTFLOW_INLINE V all(T value) { return V{} + value; }
  // min and max keep NaN.
  static FASTFLOW_INLINE V min(const V& x, T bound) { return x > bound ? all(bound) : x; }
  static FASTFLOW_INLINE V max(const V& x, T bound) { return x < bound ? all(bound) : x; }
  template <typename F>
  static FASTFLOW_INLINE V each(const V& x, const F& f) {
    V y;
    for (int64_t i = 0; i < COUNT; ++i) y[i] = f(x[i]);
    return y;
  }
  static FASTFLOW_INLINE V sqrt(const V& x) {
    V y;
    for (int64_t i = 0; i < COUNT; ++i)
      y[i] = std::sqrt(x[i]);  // one instruction, because setup.py passes -fno-math-errno
    return y;
  }
  static FASTFLOW_INLINE V of_words(const uint32_t* words) {
    typedef uint32_t W __attribute__((vector_size(COUNT * sizeof(uint32_t))));
    W w;
    std::memcpy(&w, words, sizeof(w));
    return __builtin_convertvector(w, V);
  }
};

template <typename T, int BYTES>
struct SimdMath;

template <int BYTES>
struct SimdMath<float, BYTES> : Simd<float, BYTES> {
  using Base = Simd<float, BYTES>;
  using typename Base::I;
  using typename Base::V;
  static constexpr int32_t SIGN = INT32_MIN;

  static FASTFLOW_INLINE V abs(const V& x) { return (V)((I)x & ~SIGN); }

  // e^x = 2^n (1 + p) for |x| up to about 100: n is x / log 2 rounded, p a polynomial of the remainder.
  static FASTFLOW_INLINE void reduce(const V& x, I& n, V& p) {
    constexpr float ROUND = 0x1.8p23f;  // adding it puts the nearest integer into the last bits
    constexpr int32_t ROUND_BITS = 0x4b400000;
    const V rounded = x * 1.44269504f + ROUND;
    n = (I)rounded - ROUND_BITS;
    const V whole = rounded - ROUND;
    const V r = (x - whole * 0.693359375f) -
                whole * -2.12194440e-4f;  // log 2 in two parts; products with the first are exact
    V q = r * 1.9901623e-4f + 1.3935446e-3f;
    q = q * r + 8.3332956e-3f;
    q = q * r + 4.1666448e-2f;
    q = q * r + 1.6666667e-1f;
    q = q * r + 0.5f;
    p = r * r * q + r;
  }
  static FASTFLOW_INLINE V power_of_two(const I& n) { return (V)((n + 127) << 23); }

  static FASTFLOW_INLINE V exp(const V& x) {
    I n;
    V p;
    reduce(Base::max(Base::min(x, 89.f), -104.f), n, p);
    const I half = n >> 1;  // 2^n may overflow or be denormal
    return (p + 1.f) * power_of_two(half) * power_of_two(n - half);
  }
  // (e^2|x| - 1) / (e^2|x| + 1), without cancellation in the numerator.
  static FASTFLOW_INLINE V tanh(const V& x) {
    const V magnitude = abs(x);
    I n;
    V p;
    reduce(Base::min(magnitude + magnitude, 20.f), n, p);
    const V power = power_of_two(n);
    const V less_one = power * p + (power - 1.f);
    return (V)((I)(less_one / (less_one + 2.f)) | ((I)x & SIGN));
  }
  // For x <= 0.
  static FASTFLOW_INLINE V expm1(const V& x) {
    I n;
    V p;
    reduce(Base::max(x, -20.f), n, p);
    const V power = power_of_two(n);
    return power * p + (power - 1.f);
  }
  // For 0 <= x <= 1: 2 artanh(x / (2 + x)).
  static FASTFLOW_INLINE V log1p(const V& x) {
    const V s = x / (x + 2.f), w = s * s;
    V q = w * 0.23239051f + 0.21703315f;
    q = q * w + 0.28592584f;
    q = q * w + 0.39999703f;
    q = q * w + 0.66666669f;
    return s * w * q + (s + s);
  }
  // x = 2^n (1 + z), 1 + z between the square roots of 1/2 and 2. Polynomial of Cephes' logf.
  static FASTFLOW_INLINE V log(const V& x) {
    constexpr int32_t ROOT_BITS = 0x3f3504f3;
    const V normal = x < 0x1p-126f ? x * 0x1p24f : x;
    const I bits = (I)normal - ROOT_BITS;
    const V n = __builtin_convertvector(bits >> 23, V) - ((I)x < 0x00800000 ? Base::all(24) : V{});
    const V z = (V)((bits & 0x7fffff) + ROOT_BITS) - 1.f, w = z * z;
    V q = z * 7.0376836292e-2f - 1.1514610310e-1f;
    q = q * z + 1.1676998740e-1f;
    q = q * z - 1.2420140846e-1f;
    q = q * z + 1.4249322787e-1f;
    q = q * z - 1.6668057665e-1f;
    q = q * z + 2.0000714765e-1f;
    q = q * z - 2.4999993993e-1f;
    q = q * z + 3.3333331174e-1f;
    const V y = n * 0.693359375f + (z + (z * w * q + (n * -2.12194440e-4f - w * 0.5f)));
    // Each comparison is used by one selection: g++ 12 would otherwise split it into scalars.
    const V at_ends = x == 0.f ? Base::all(-INFINITY) : x >= 0.f ? x : Base::all(NAN);
    const V up_to_infinity = x < INFINITY ? y : x;
    return x > 0.f ? up_to_infinity : at_ends;
  }
  // Cosine and sine of 2 pi word / 2^32. Quadrant and remainder are exact integers. Polynomials of Cephes'
  // sinf and cosf.
  static FASTFLOW_INLINE void cos_sin(const uint32_t* words, V& cos, V& sin) {
    typedef uint32_t W __attribute__((vector_size(BYTES)));
    W word;
    std::memcpy(&word, words, BYTES);
    const I quadrant = (I)((word + 0x20000000) >> 30);
    const V r = __builtin_convertvector((I)(word - ((W)quadrant << 30)), V) * 1.46291808e-9f, w = r * r;
    const V s = ((w * -1.9515295891e-4f + 8.3321608736e-3f) * w - 1.6666654611e-1f) * w * r + r;
    const V c = ((w * 2.4433157118e-5f - 1.3887316255e-3f) * w + 4.1666645683e-2f) * w * w - w * 0.5f + 1.f;
    const I swapped = (quadrant & 1) == 1;
    cos = (V)((I)(swapped ? s : c) ^ (((quadrant + 1) & 2) << 30));
    sin = (V)((I)(swapped ? c : s) ^ ((quadrant & 2) << 30));
  }
};

template <int BYTES>
struct SimdMath<double, BYTES> : Simd<double, BYTES> {
  using Base = Simd<double, BYTES>;
  using typename Base::V;

  static FASTFLOW_INLINE V abs(const V& x) { return x < 0. ? -x : x; }
  static FASTFLOW_INLINE V exp(const V& x) {
    return Base::each(x, [](double v) { return std::exp(v); });
  }
  static FASTFLOW_INLINE V tanh(const V& x) {
    return Base::each(x, [](double v) { return std::tanh(v); });
  }
  static FASTFLOW_INLINE V expm1(const V& x) {
    return Base::each(x, [](double v) { return std::expm1(v); });
  }
  static FASTFLOW_INLINE V log1p(const V& x) {
    return Base::each(x, [](double v) { return std::log1p(v); });
  }
  static FASTFLOW_INLINE V log(const V& x) {
    return Base::each(x, [](double v) { return std::log(v); });
  }
  static FASTFLOW_INLINE void cos_sin(const uint32_t* words, V& cos, V& sin) {
    const V angle = Base::of_words(words) * (0x1p-32 * 2 * 3.14159265358979323846);
    cos = Base::each(angle, [](double v) { return std::cos(v); });
    sin = Base::each(angle, [](double v) { return std::sin(v); });
  }
};

}  // namespace fastflow::cpu
