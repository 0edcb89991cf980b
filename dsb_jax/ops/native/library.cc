// The native kernels as calls of XLA (typed FFI): checks, the order of columns, tiles, threads.
//
// A call gives back, beside its result, two arrays that it works in. So the memory is XLA's, reused from call to call,
// and stands in its account. What a tile is packed into belongs to the thread.
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "threads.h"
#include "tiling.h"

namespace dsb {
namespace {

const Passes* passes = nullptr;

using Integers = ffi::Buffer<ffi::S32>;
using Floats = ffi::Buffer<ffi::F32>;
using Attribute = ffi::Span<const int64_t>;

// What all three calls are given. `window`: kernel, strides, top and left padding.
struct Operands {
  Integers out_idx;
  ffi::AnyBuffer in_idx;
  Integers group_start;
  Attribute window;
  bool batch_major;
  int32_t* integers;  // room for columns, their places, and where taps begin
  float* floats;      // for weights in the order of the columns, or their gradients

  Sizes sizes(ffi::AnyBuffer::Dimensions x, ffi::AnyBuffer::Dimensions y) const {
    Sizes s;
    const int features = batch_major ? 3 : 0;
    s.channels = x[features], s.height = x[1], s.width = x[2], s.batch = x[3 - features];
    s.out = y[features], s.out_height = y[1], s.out_width = y[2];
    s.kernel_h = window[0], s.kernel_w = window[1], s.stride_h = window[2], s.stride_w = window[3];
    s.pad_top = window[4], s.pad_left = window[5];
    s.groups = out_idx.dimensions()[0], s.rows = out_idx.dimensions()[1];
    s.blocks = in_idx.dimensions()[0], s.block_columns = in_idx.dimensions()[1];
    s.batch_major = batch_major;
    return s;
  }
};

// --------------------------------------------------------------------------------------------------------- operands

std::string of_layer(const Sizes& s) {
  return " of a " + std::to_string(s.out) + "x" + std::to_string(s.taps() * s.channels) + " matrix in " +
         std::to_string(s.blocks) + " blocks of " + std::to_string(s.rows) + "x" + std::to_string(s.block_columns) +
         "; the layout is damaged, or of another layer.";
}

// Of a whole layout, out_idx is a permutation: else an output would be left unwritten. Growing measures some groups.
ffi::Error check_rows(const Operands& of, const Sizes& s, bool whole) {
  const int32_t* out_idx = of.out_idx.typed_data();
  const Int count = s.groups * s.rows;
  std::vector<bool> seen(whole ? count : 0);
  for (Int i = 0; i < count; ++i) {
    const Int out = out_idx[i];
    const bool inside = out >= 0 && (!whole || out < count), twice = inside && whole && seen[out];
    if (!inside || twice) {
      return ffi::Error::InvalidArgument("out_idx holds " + std::to_string(out) + (twice ? " twice" : "") +
                                         of_layer(s));
    }
    if (whole) seen[out] = true;
  }
  return ffi::Error::Success();
}

// Puts the columns of every panel in the order of their taps: `offsets` and `starts` of the call, `place`, their
// numbers among in_idx, and their weights, if the pass has any. Every index is checked here, before it is used.
ffi::Error arrange(ffi::ThreadPool& pool, Call& c, const Operands& of, const ffi::AnyBuffer* blocks) {
  const Sizes& s = c.sizes;
  int32_t *offsets = of.integers, *place = offsets + s.columns(), *starts = place + s.columns();
  float* weights = blocks == nullptr ? nullptr : of.floats;
  c.out_idx = of.out_idx.typed_data(), c.offsets = offsets, c.starts = starts, c.weights = weights;
  const Tiling& t = c.tiling;
  const Int taps = s.taps(), in = taps * s.channels;
  if (s.channels * t.channel_size > INT32_MAX) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "a tile of all input channels is larger than 8 GiB" + of_layer(s));
  }
  const int32_t* start = of.group_start.typed_data();
  bool ordered = start[0] == 0 && start[s.groups] == s.blocks;
  for (Int g = 0; g < s.groups; ++g) ordered &= start[g] <= start[g + 1];
  if (!ordered) return ffi::Error::InvalidArgument("group_start does not cut the blocks into groups" + of_layer(s));
  if (ffi::Error error = check_rows(of, s, blocks != nullptr); error.failure()) return error;
  std::atomic<Int> wrong{-1};
  const auto order = [&](const auto* in_idx, const auto* values, Int group) {
    const Int begin = start[group] * s.block_columns, end = start[group + 1] * s.block_columns;
    int32_t* next = starts + group * (taps + 1);
    for (Int tap = 0; tap <= taps; ++tap) next[tap] = 0;
    for (Int i = begin; i < end; ++i) {
      if (Int(in_idx[i]) < 0 || Int(in_idx[i]) >= in) {
        wrong = i;
        return;
      }
      ++next[in_idx[i] / s.channels];
    }
    for (Int tap = 0, sum = begin; tap <= taps; ++tap) {  // next[tap]: the place of the tap's next column
      const Int count = next[tap];
      next[tap] = int32_t(sum);
      sum += count;
    }
    for (Int i = begin; i < end; ++i) {
      const Int tap = in_idx[i] / s.channels, channel = in_idx[i] % s.channels, k = next[tap]++;
      const Int a = tap / s.kernel_w, b = tap % s.kernel_w;
      const Int phase = a % s.stride_h * s.phases_w() + b % s.stride_w;
      const Int slot = a / s.stride_h * t.slots_w + b / s.stride_w;
      offsets[k] = int32_t(channel * t.channel_size + phase * t.phase_size + slot * t.lanes);
      place[k] = int32_t(i);
      if (weights == nullptr) continue;
      const auto* value = values + i / s.block_columns * s.rows * s.block_columns + i % s.block_columns;
      for (Int r = 0; r < s.rows; ++r) {
        if constexpr (sizeof(*value) == 2) {
          const uint32_t bits = uint32_t(value[r * s.block_columns]) << 16;
          memcpy(weights + k * s.rows + r, &bits, sizeof(bits));
        } else {
          weights[k * s.rows + r] = value[r * s.block_columns];
        }
      }
    }
    for (Int tap = taps; tap > 0; --tap) next[tap] = next[tap - 1];  // now the end of each: make it the begin again
    next[0] = int32_t(begin);
  };
  const auto by_type = [&](const auto* in_idx, Int group) {
    if (blocks != nullptr && blocks->element_type() == ffi::BF16) {
      order(in_idx, static_cast<const uint16_t*>(blocks->untyped_data()), group);
    } else {
      order(in_idx, blocks == nullptr ? nullptr : static_cast<const float*>(blocks->untyped_data()), group);
    }
  };
  parallel(Threads(pool, double(s.columns() * s.rows)), s.groups, [&](Int group) {
    if (of.in_idx.element_type() == ffi::U16) {
      by_type(static_cast<const uint16_t*>(of.in_idx.untyped_data()), group);
    } else {
      by_type(static_cast<const int32_t*>(of.in_idx.untyped_data()), group);
    }
  });
  if (const Int i = wrong; i >= 0) {
    return ffi::Error::InvalidArgument("in_idx holds an index outside 0.." + std::to_string(in - 1) + " in block " +
                                       std::to_string(i / s.block_columns) + of_layer(s));
  }
  return ffi::Error::Success();
}

// ----------------------------------------------------------------------------------------------------------- passes

Call call_of(const Sizes& s, const Tiling& t, ffi::DataType type) {
  Call c = {};
  c.sizes = s, c.tiling = t;
  c.element = type == ffi::BF16 ? kBFloat16 : kFloat32;
  return c;
}

// Whether a result is written past the caches: if it is larger than they are; that takes whole, aligned vectors.
bool streams(ffi::AnyBuffer result) {
  const bool aligned = reinterpret_cast<uintptr_t>(result.untyped_data()) % 64 == 0;
  return aligned && result.dimensions().back() % passes->vector == 0 && Int(result.element_count()) > l2_floats() / 2;
}

// Of a pass on one core, roughly.
double nanoseconds(const Sizes& s) {
  const double positions = double(s.positions() * s.batch);
  const double activations = double(s.channels * s.height * s.width * s.batch) + double(s.out) * positions;
  return 0.3 * activations + 0.02 * positions * double(s.columns() * s.rows);
}

Range part_of(Int all, Int i, Int count) { return {all * i / count, all * (i + 1) / count}; }

ffi::Error forward(ffi::ThreadPool& pool, const Operands& of, ffi::AnyBuffer x, ffi::AnyBuffer blocks, Floats bias,
                   int64_t, ffi::AnyBuffer y) {
  const Sizes s = of.sizes(x.dimensions(), y.dimensions());
  const Threads threads(pool, nanoseconds(s));
  const Tiling t = tiling_of(s, passes->vector, s.out_height, s.out_width, s.halo_h(), s.halo_w(), threads.count);
  Call c = call_of(s, t, x.element_type());
  c.x = x.untyped_data(), c.result = y.untyped_data(), c.streams = streams(y);
  c.bias = bias.element_count() > 0 ? bias.typed_data() : nullptr;
  if (ffi::Error error = arrange(pool, c, of, &blocks); error.failure()) return error;
  // A thread has some of the groups where there are few tiles; but a row of [batch][features] has the outputs of all.
  const Int ranges = s.batch_major ? 1 : larger(1, smaller(s.groups, threads.count / t.tiles()));
  const Int floats = t.packed_size + s.rows * t.tile_h * t.tile_w * t.lanes + t.outputs_size;
  return parallel(threads, t.tiles() * ranges, floats, [&](Int i, float* memory) {
    const Tile tile = tile_at(t, i / ranges, s.out_height, s.out_width);
    passes->forward[c.element](c, tile, part_of(s.groups, i % ranges, ranges), memory);
  });
}

ffi::Error input_gradient(ffi::ThreadPool& pool, const Operands& of, ffi::AnyBuffer dy, ffi::AnyBuffer blocks, Floats,
                          int64_t, ffi::AnyBuffer dx) {
  const Sizes s = of.sizes(dx.dimensions(), dy.dimensions());
  const Int slots_h = s.out_height + s.halo_h(), slots_w = s.out_width + s.halo_w();
  const Threads threads(pool, nanoseconds(s));
  const Tiling t = tiling_of(s, passes->vector, slots_h, slots_w, 0, 0, threads.count);
  Call c = call_of(s, t, dy.element_type());
  c.dy = dy.untyped_data(), c.result = dx.untyped_data(), c.streams = streams(dx);
  if (ffi::Error error = arrange(pool, c, of, &blocks); error.failure()) return error;
  const auto covers = [](Int phases, Int stride, Int slots, Int pad, Int size) {
    return phases == stride && pad >= 0 && slots * stride - pad >= size;
  };
  if (!covers(s.phases_h(), s.stride_h, slots_h, s.pad_top, s.height) ||
      !covers(s.phases_w(), s.stride_w, slots_w, s.pad_left, s.width)) {
    memset(dx.untyped_data(), 0, dx.size_bytes());  // inputs that no tap reads
  }
  const Int floats = t.packed_size + panel_floats(s, t) + t.outputs_size;
  return parallel(threads, t.tiles(), floats, [&](Int i, float* memory) {
    passes->input_gradient[c.element](c, tile_at(t, i, slots_h, slots_w), memory);
  });
}

ffi::Error weight_gradient(ffi::ThreadPool& pool, const Operands& of, ffi::AnyBuffer x, ffi::AnyBuffer dy, Floats,
                           int64_t most_parts, ffi::AnyBuffer d_blocks) {
  const Sizes s = of.sizes(x.dimensions(), dy.dimensions());
  const Tiling t = tiling_of(s, passes->vector, s.out_height, s.out_width, s.halo_h(), s.halo_w(), 1);
  Call c = call_of(s, t, x.element_type());
  c.x = x.untyped_data(), c.dy = dy.untyped_data();
  if (ffi::Error error = arrange(pool, c, of, nullptr); error.failure()) return error;
  // Tiles are summed in parts whose number depends on sizes alone, and the parts in their order: so do the bits.
  const Int parts = smaller(most_parts, t.tiles()), size = s.columns() * s.rows;
  const Threads threads(pool, nanoseconds(s));
  const Int ranges = larger(1, smaller(s.groups, threads.count / parts));
  const Int floats = t.packed_size + panel_floats(s, t) + t.outputs_size;
  const auto columns_of = [&](Range groups) {
    return Range{c.starts_of(groups.begin)[0], c.starts_of(groups.end - 1)[s.taps()]};
  };
  ffi::Error error = parallel(threads, parts * ranges, floats, [&](Int i, float* memory) {
    const Range groups = part_of(s.groups, i % ranges, ranges), columns = columns_of(groups);
    const Range tiles = part_of(t.tiles(), i / ranges, parts);
    float* sums = of.floats + i / ranges * size;
    memset(sums + columns.begin * s.rows, 0, (columns.end - columns.begin) * s.rows * sizeof(float));
    for (Int tile = tiles.begin; tile < tiles.end; ++tile) {
      passes->weight_gradient[c.element](c, tile_at(t, tile, s.out_height, s.out_width), groups, sums, memory);
    }
  });
  if (error.failure()) return error;
  float* result = static_cast<float*>(d_blocks.untyped_data());
  const int32_t* place = of.integers + s.columns();
  parallel(Threads(pool, double(size * parts)), s.groups, [&](Int group) {
    const Range columns = columns_of({group, group + 1});
    for (Int k = columns.begin; k < columns.end; ++k) {
      float* to = result + place[k] / s.block_columns * s.rows * s.block_columns + place[k] % s.block_columns;
      for (Int r = 0; r < s.rows; ++r) {
        float sum = 0;
        for (Int part = 0; part < parts; ++part) sum += of.floats[part * size + k * s.rows + r];
        to[r * s.block_columns] = sum;
      }
    }
  });
  return error;
}

using Pass = ffi::Error (*)(ffi::ThreadPool&, const Operands&, ffi::AnyBuffer, ffi::AnyBuffer, Floats, int64_t,
                            ffi::AnyBuffer);

// A pass in the form that XLA calls: all three have the same operands, of which only forward reads the bias, and only
// the weight gradient `parts`.
template <Pass pass>
ffi::Error Handle(ffi::ThreadPool pool, ffi::AnyBuffer first, ffi::AnyBuffer second, Integers out_idx,
                  ffi::AnyBuffer in_idx, Integers group_start, Floats bias, Attribute window, bool batch_major,
                  int64_t parts, ffi::Result<ffi::AnyBuffer> result, ffi::Result<Integers> integers,
                  ffi::Result<Floats> floats) {
  const Operands operands = {
      out_idx, in_idx, group_start, window, batch_major, integers->typed_data(), floats->typed_data()};
  return pass(pool, operands, first, second, bias, parts, *result);
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<Integers>()
      .Arg<ffi::AnyBuffer>()
      .Arg<Integers>()
      .Arg<Floats>()
      .Attr<Attribute>("window")
      .Attr<bool>("batch_major")
      .Attr<int64_t>("parts")
      .Ret<ffi::AnyBuffer>()
      .Ret<Integers>()
      .Ret<Floats>();
}

}  // namespace
}  // namespace dsb

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsb_jax_native_forward, dsb::Handle<dsb::forward>, dsb::binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(dsb_jax_native_input_gradient, dsb::Handle<dsb::input_gradient>, dsb::binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(dsb_jax_native_weight_gradient, dsb::Handle<dsb::weight_gradient>, dsb::binding());

// The widest vectors of this processor, in floats: 16, 8, or 0 if there is no pass for it.
extern "C" int dsb_jax_native_vector() {
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide) return 16;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 8 : 0;
}

// From now on vectors of so many floats are used, for which the processor was asked.
extern "C" void dsb_jax_native_use(int vector) { dsb::passes = vector == 16 ? &dsb::kAvx512 : &dsb::kAvx2; }

// Of the headers that this was compiled with; an older jaxlib refuses newer ones.
extern "C" int dsb_jax_native_api() { return XLA_FFI_API_MINOR; }

extern "C" int dsb_jax_native_used() { return int(dsb::passes->vector); }

extern "C" double dsb_jax_native_peak() { return dsb::passes->peak(); }
