// Which instruction set the CPU kernels run on, chosen at run time so that one binary fits every machine.
// LTKERNELS_CPU_ISA={avx512vnni,avx512,avx2,baseline} overrides the choice, so that tests can prove each path.
#pragma once
#include <cstdlib>
#include <string>
#include <type_traits>

#include "check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define LT_X86 1
#else
#define LT_X86 0
#endif

#define LT_INLINE static inline __attribute__((always_inline))

#if LT_X86
#define LT_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define LT_AVX512_FEATURES "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"
#else  // GCC would vectorise plain loops with half the width
#define LT_AVX512_FEATURES "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512"
#endif
#define LT_AVX512 __attribute__((target(LT_AVX512_FEATURES)))
#define LT_AVX512_VNNI __attribute__((target(LT_AVX512_FEATURES ",avx512vnni")))
#endif

namespace ltkernels::isa {

// Arithmetic of differences: half types are widened first.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

enum class Level { kBaseline, kAvx2, kAvx512, kAvx512Vnni };  // each has all of those before it

inline Level level() {
  Level best = Level::kBaseline;
#if LT_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Level::kAvx2;
  if (best == Level::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    best = __builtin_cpu_supports("avx512vnni") ? Level::kAvx512Vnni : Level::kAvx512;
  }
#endif
  const char* wanted = std::getenv("LTKERNELS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  const std::string name = wanted;
  const Level asked = name == "avx512vnni" ? Level::kAvx512Vnni
                      : name == "avx512"   ? Level::kAvx512
                      : name == "avx2"     ? Level::kAvx2
                                           : Level::kBaseline;
  LT_CHECK(asked != Level::kBaseline || name == "baseline", "LTKERNELS_CPU_ISA",
           "expected avx512vnni, avx512, avx2 or baseline; got ", name);
  LT_CHECK(asked <= best, "LTKERNELS_CPU_ISA", "this processor has no ", name);
  return asked;
}

}  // namespace ltkernels::isa
