// What the passes share: activations into packed tiles, and the loops that are unrolled.
#pragma once

#include "vectors.h"

template <int N>
struct Count {
  static constexpr int value = N;
};

// run(Count<n>()) for 1 <= n <= Most: what is unrolled needs to know n when it is compiled.
template <int Most, class Run>
DSB_INLINE void with_count(Int n, const Run& run) {
  if constexpr (Most > 1) {
    if (n < Most) return with_count<Most - 1>(n, run);
  }
  run(Count<Most>());
}

template <class T>
DSB_INLINE const T* at(const void* p, Int offset) {
  return static_cast<const T*>(p) + offset;
}

// run(slot, element, begin, end) for every channel, phase and row of slots of a tile: element + j * stride_w * batch of
// x or dx belongs to slot + j * lanes of the packed tile, for begin <= j < end. Slots outside of the image are left
// out.
template <class Run>
DSB_INLINE void each_row(const Call& c, const Tile& tile, Int rows, Int columns, const Run& run) {
  const Sizes& s = c.sizes;
  const Tiling& t = c.tiling;
  for (Int channel = 0; channel < s.channels; ++channel) {
    for (Int phase = 0; phase < s.phases_h() * s.phases_w(); ++phase) {
      for (Int i = 0; i < rows; ++i) {
        const Int h = (tile.h_begin + i) * s.stride_h + phase / s.phases_w() - s.pad_top;
        const Int left = tile.w_begin * s.stride_w + phase % s.phases_w() - s.pad_left;
        if (h < 0 || h >= s.height) continue;
        run(channel * t.channel_size + phase * t.phase_size + i * t.slots_w * t.lanes,
            ((channel * s.height + h) * s.width + left) * s.batch + tile.n, left < 0 ? ceil_div(-left, s.stride_w) : 0,
            smaller(columns, ceil_div(s.width - left, s.stride_w)));
      }
    }
  }
}

// The lanes of one position; those beyond the batch are zero.
template <class T>
DSB_INLINE void pack_lanes(const Call& c, const T* from, Int exist, Int ahead, float* to) {
  for (Int l = 0; l < c.tiling.lanes; l += kVector) {
    __builtin_prefetch(from + ahead + l);
    store(to + l, load_some(from + l, exist - l));
  }
}

// Packs what a tile of output positions reads of x.
template <class T>
void pack_input(const Call& c, const Tile& tile, float* packed) {
  const Sizes& s = c.sizes;
  const Int exist = smaller(c.tiling.lanes, s.batch - tile.n), step = s.stride_w * s.batch;
  if (s.batch_major) {
    pack_rows(at<T>(c.x, tile.n * s.channels), s.channels, exist, c.tiling.lanes, c.tiling.channel_size, packed);
    return;
  }
  const Int rows = tile.h_end - tile.h_begin + s.halo_h(), columns = tile.w_end - tile.w_begin + s.halo_w();
  each_row(c, tile, rows, columns, [&](Int slot, Int element, Int begin, Int end) {
    for (Int j = begin; j < end; ++j)
      pack_lanes(c, at<T>(c.x, element + j * step), exist, 8 * step, packed + slot + j * c.tiling.lanes);
  });
}

// Where the positions end that follow `begin` and have the same taps.
template <class TapsAt>
DSB_INLINE Int run_end(Int begin, Int end, const TapsAt& taps_at) {
  const Range taps = taps_at(begin);
  Int w = begin + 1;
  while (w < end && taps_at(w).begin == taps.begin && taps_at(w).end == taps.end) ++w;
  return w;
}

// Calls run(Outputs) with where a tile finds dy; of [batch][features], a transposed copy in `room`.
template <class T, class Run>
DSB_INLINE void with_gradients(const Call& c, const Tile& tile, float* room, const Run& run) {
  const Sizes& s = c.sizes;
  const Int lanes = c.tiling.lanes, exist = smaller(lanes, s.batch - tile.n);
  if (s.batch_major) {
    pack_rows(at<T>(c.dy, tile.n * s.out), s.out, exist, lanes, c.tiling.out_size, room);
    run(Outputs<const float>{room, c.tiling.out_size, lanes});
  } else {
    run(Outputs<const T>{at<T>(c.dy, tile.n), s.positions() * s.batch, exist});
  }
}

// dy of one group at the positions [w_begin, w_end) of an output row -> panel; phantom rows are zero. Strides of the
// panel are in floats.
template <class T>
DSB_INLINE void pack_output(const Call& c, const Outputs<T>& dy, Int group, Int h, Int w_begin, Int w_end, float* panel,
                            Int position_stride, Int row_stride) {
  const Sizes& s = c.sizes;
  for (Int r = 0; r < s.rows; ++r) {
    const Int out = c.out_idx[group * s.rows + r];
    for (Int w = w_begin; w < w_end; ++w) {
      float* to = panel + (w - w_begin) * position_stride + r * row_stride;
      if (out >= s.out) {
        memset(to, 0, c.tiling.lanes * sizeof(float));
      } else {
        pack_lanes(c, dy.data + out * dy.out_size + (h * s.out_width + w) * s.batch, dy.lanes, 8 * s.batch, to);
      }
    }
  }
}
