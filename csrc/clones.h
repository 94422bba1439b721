#pragma once
// -O3 alone emits SSE2. FASTFLOW_CLONES compiles a function once for each instruction set named here, and the loader
// picks one: it stands before plain functions (no template, no lambda) whose callees are always_inline.
// Only g++ with glibc has it in a form that was tried; elsewhere the function is compiled once.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define FASTFLOW_CLONES __attribute__((target_clones("avx512f", "fma", "default")))
#define FASTFLOW_CPU_TARGETS "avx512f fma default"
#else
#define FASTFLOW_CLONES
#define FASTFLOW_CPU_TARGETS "default"
#endif
