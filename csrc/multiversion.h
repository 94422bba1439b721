#pragma once
// Compiles a function for several instruction sets; -O3 without it emits SSE2 only.
//
// FASTFLOW_MULTIVERSION(NAME, ARGUMENT, BODY) defines `void NAME(const ARGUMENT& a)`. It runs BODY<B>(a)
// compiled for the instruction set found at run time, with vectors of B bytes. BODY and the functions that it
// calls must be FASTFLOW_INLINE; others are compiled for SSE2. This was only tried with g++ on x86-64; other
// compilers and machines get one version, and so does a build with -DFASTFLOW_ONE_VERSION.
#define FASTFLOW_INLINE inline __attribute__((always_inline))

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && !defined(FASTFLOW_ONE_VERSION)
#define FASTFLOW_CPU_TARGETS "avx512 avx2 default"
#define FASTFLOW_AVX2 "avx2,fma,f16c"
#define FASTFLOW_AVX512 FASTFLOW_AVX2 ",avx512f,avx512vl,avx512bw,avx512dq"
#define FASTFLOW_MULTIVERSION(NAME, ARGUMENT, BODY)                                                      \
  __attribute__((target(FASTFLOW_AVX512))) static void NAME##_avx512(const ARGUMENT& a) { BODY<64>(a); } \
  __attribute__((target(FASTFLOW_AVX2))) static void NAME##_avx2(const ARGUMENT& a) { BODY<32>(a); }     \
  static void NAME##_default(const ARGUMENT& a) { BODY<16>(a); }                                         \
  void NAME(const ARGUMENT& a) {                                                                         \
    static const int bytes = fastflow::vector_bytes();                                                   \
    bytes == 64 ? NAME##_avx512(a) : bytes == 32 ? NAME##_avx2(a) : NAME##_default(a);                   \
  }

namespace fastflow {
inline int vector_bytes() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return avx512 ? 64 : avx2 ? 32 : 16;
}
}  // namespace fastflow
#else
#define FASTFLOW_CPU_TARGETS "default"
#define FASTFLOW_MULTIVERSION(NAME, ARGUMENT, BODY) \
  void NAME(const ARGUMENT& a) { BODY<16>(a); }
#endif
