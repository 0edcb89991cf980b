// The three passes over one tile. Included by avx512.cc and avx2.cc, by each in a namespace of its own.
//
// The order of every sum is fixed by the sizes of the product alone: neither the number of threads nor the tile that a
// position falls into changes a bit.
#include "forward.h"
#include "input_gradient.h"
#include "weight_gradient.h"

double seconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

double peak() {
  constexpr int kChains = 12;  // more than latency times ports, fewer than registers
  constexpr Int kSteps = 400000;
  Vector sum[kChains];
  DSB_EACH (i, kChains) sum[i] = splat(float(i));
  const Vector factor = splat(0.999f), term = splat(0.001f);
  const double begin = seconds();
  for (Int step = 0; step < kSteps; ++step) {
    DSB_EACH (i, kChains) {
      sum[i] = multiply_add(sum[i], factor, term);
      asm volatile("" : "+v"(sum[i]));  // so that nothing is folded away
    }
  }
  return double(kSteps) * kChains * kVector * 2 / (seconds() - begin);
}

constexpr Passes kPasses = {
    kVector,
    {forward<float>, forward<uint16_t>},
    {input_gradient<float>, input_gradient<uint16_t>},
    {weight_gradient<float>, weight_gradient<uint16_t>},
    peak,
};
