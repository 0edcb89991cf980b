// Tasks on the threads of XLA's pool, each with memory to work in.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>

#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace dsb {

namespace ffi = xla::ffi;

constexpr Int kHugePage = 2 << 20;
constexpr double kWakeNanoseconds = 1.5e5;

// Memory of this thread, kept: fresh pages would cost more than what is computed in them.
inline float* scratch(Int floats) {
  struct Buffer {
    float* data = nullptr;
    Int size = 0;
    ~Buffer() { free(data); }
  };
  static thread_local Buffer buffer;
#ifdef __SANITIZE_ADDRESS__
  const Int bytes = floats * Int(sizeof(float));  // and no more, so that what lies beyond is noticed
#else
  if (floats <= buffer.size) return buffer.data;
  const Int bytes = ceil_div(floats * Int(sizeof(float)), kHugePage) * kHugePage;
#endif
  free(buffer.data);
  buffer = {};
  void* data = nullptr;
  if (posix_memalign(&data, kHugePage, bytes) != 0) return nullptr;
  madvise(data, bytes, MADV_HUGEPAGE);
  buffer.data = static_cast<float*>(data);
  buffer.size = bytes / Int(sizeof(float));
  return buffer.data;
}

// Of XLA's pool, so many threads as `nanoseconds` of work are worth: to wake one takes as long as it should gain.
struct Threads {
  ffi::ThreadPool& pool;
  Int count;

  Threads(ffi::ThreadPool& of, double nanoseconds)
      : pool(of), count(smaller(of.num_threads(), 1 + Int(nanoseconds / kWakeNanoseconds))) {}
};

// run(i) for all i < count, on some threads and on this one, which never waits for a task that has not begun: so a pool
// whose threads are all busy is no deadlock.
template <class Run>
void parallel(const Threads& of, Int count, const Run& run) {
  const Int threads = smaller(of.count, count);
  if (threads <= 1) {
    for (Int i = 0; i < count; ++i) run(i);
    return;
  }
  struct State {
    std::atomic<Int> next{0}, done{0};
    Int count;
    const Run* run;  // of the caller's frame: not touched by threads that come when all is done
  };
  auto state = std::make_shared<State>();
  state->count = count;
  state->run = &run;
  auto work = [state] {
    for (Int i; (i = state->next.fetch_add(1)) < state->count;) {
      (*state->run)(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (Int i = 1; i < threads; ++i) of.pool.Schedule(decltype(work)(work));
  work();
  while (state->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

// The same with so many floats of scratch for each.
template <class Run>
ffi::Error parallel(const Threads& of, Int count, Int floats, const Run& run) {
  std::atomic<bool> failed{false};
  parallel(of, count, [&](Int i) {
    float* memory = scratch(floats);
    if (memory == nullptr) {
      failed = true;
    } else {
      run(i, memory);
    }
  });
  if (!failed) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "no memory for tiles of " + std::to_string(4 * floats) + " bytes");
}

}  // namespace dsb
