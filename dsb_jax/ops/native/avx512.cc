// The passes for processors with AVX-512.
//
// Compiled for them by a pragma rather than by flags, so that one set of flags serves the library. No template of the
// standard library is used below the pragma: of such a function the linker keeps one copy, perhaps this one, for all.
#include <immintrin.h>

#include <cstring>
#include <ctime>

#include "product.h"

#define DSB_VECTOR 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

namespace dsb {
namespace {
#include "passes.h"
}  // namespace

extern const Passes kAvx512 = kPasses;
}  // namespace dsb

#if defined(__clang__)
#pragma clang attribute pop
#endif
