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
namespace avx2 {
#include "vectors.h"
// After it:
#include "passes.h"
}  // namespace avx2

extern const Passes kAvx2 = {avx2::kVector, avx2::forward, avx2::input_gradient, avx2::weight_gradient, avx2::peak};
}  // namespace dsb

#if defined(__clang__)
#pragma clang attribute pop
#endif
