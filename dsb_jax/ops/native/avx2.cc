// The passes for processors with AVX2.
//
// Compiled for them by a pragma rather than by flags, so that one set of flags serves the library. No template of the
// standard library is used below the pragma: of such a function the linker keeps one copy, perhaps this one, for all.
#include <immintrin.h>

#include <cstring>
#include <ctime>

#include "product.h"

#define DSB_VECTOR 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace dsb {
namespace {
#include "passes.h"
}  // namespace

extern const Passes kAvx2 = kPasses;
}  // namespace dsb

#if defined(__clang__)
#pragma clang attribute pop
#endif
