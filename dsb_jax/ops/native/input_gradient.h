// The input gradient of one tile: register tiles of some columns times two vectors of lanes.
#pragma once

#include "packing.h"

// dx[offset k, lanes] += sum over rows of weights[k, r] * dy[r, lanes], for `Columns` columns at one position.
template <int Columns, int Vectors>
DSB_INLINE void input_cell(const Call& c, Int column, const float* panel, float* dx) {
  const Int rows = c.sizes.rows, lanes = c.tiling.lanes;
  const int32_t* offsets = c.offsets + column;
  const float* weights = c.weights + column * rows;
  Vector sum[Columns][Vectors];
  DSB_EACH (k, Columns)
    DSB_EACH (v, Vectors) sum[k][v] = load(dx + offsets[k] + v * kVector);
  for (Int r = 0; r < rows; ++r) {
    Vector dy[Vectors];
    DSB_EACH (v, Vectors) dy[v] = load(panel + r * lanes + v * kVector);
    DSB_EACH (k, Columns) {
      const Vector weight = splat(weights[k * rows + r]);
      DSB_EACH (v, Vectors) sum[k][v] = multiply_add(weight, dy[v], sum[k][v]);
    }
  }
  DSB_EACH (k, Columns)
    DSB_EACH (v, Vectors) store(dx + offsets[k] + v * kVector, sum[k][v]);
}

constexpr Int kColumnBlock = DSB_VECTOR == 16 ? 8 : 4;

// `positions` positions side by side.
template <int Columns>
DSB_INLINE void input_cells(const Call& c, Int column, Int positions, const float* panel, float* dx) {
  const Int lanes = c.tiling.lanes;
  for (Int w = 0; w < positions; ++w, panel += c.sizes.rows * lanes, dx += lanes) {
    Int l = 0;
    for (; l + 2 * kVector <= lanes; l += 2 * kVector) input_cell<Columns, 2>(c, column, panel + l, dx + l);
    if (l < lanes) input_cell<Columns, 1>(c, column, panel + l, dx + l);
  }
}

DSB_INLINE void input_columns(const Call& c, Range columns, Int positions, const float* panel, float* dx) {
  for (Int k = columns.begin; k < columns.end;) {
    // Blocks end at multiples of their size, wherever a run begins: so the order of sums is that of all tiles.
    const Int count = smaller(kColumnBlock - k % kColumnBlock, columns.end - k);
    with_count<kColumnBlock>(count, [&](auto n) { input_cells<n.value>(c, k, positions, panel, dx); });
    k += count;
  }
}

// The taps whose slot, that of position `at`, lies among those of a tile.
DSB_INLINE Range owned(Range taps, Int at, Int stride, Int begin, Int end) {
  return {larger(taps.begin, (begin - at) * stride), smaller(taps.end, (end - at) * stride)};
}

// Writes the slots of a tile that are inputs.
template <class T>
void unpack_input_gradient(const Call& c, const Tile& tile, const float* packed) {
  const Sizes& s = c.sizes;
  const Int exist = smaller(c.tiling.lanes, s.batch - tile.n), step = s.stride_w * s.batch;
  if (s.batch_major) {
    T* dx = static_cast<T*>(c.result) + tile.n * s.channels;
    unpack_rows(packed, c.tiling.channel_size, s.channels, exist, dx, c.streams);
    return;
  }
  const Int rows = tile.h_end - tile.h_begin, columns = tile.w_end - tile.w_begin;
  each_row(c, tile, rows, columns, [&](Int slot, Int element, Int begin, Int end) {
    for (Int j = begin; j < end; ++j)
      for (Int l = 0; l < exist; l += kVector)
        store_some(static_cast<T*>(c.result) + element + j * step + l, load(packed + slot + j * c.tiling.lanes + l),
                   exist - l, c.streams);
  });
}

// Adds to a packed tile of dx.
template <class T>
void input_gradient_products(const Call& c, const Tile& tile, const Outputs<T>& dy, float* packed, float* panel) {
  const Sizes& s = c.sizes;
  const Tiling& t = c.tiling;
  const Int together = larger(1, kPanelFloats / 2 / (s.rows * t.lanes));
  const Int h_begin = larger(0, tile.h_begin - s.halo_h()), h_end = smaller(s.out_height, tile.h_end);
  const Int w_begin = larger(0, tile.w_begin - s.halo_w()), w_end = smaller(s.out_width, tile.w_end);
  for (Int group = 0; group < s.groups; ++group) {
    const int32_t* starts = c.starts_of(group);
    if (starts[0] == starts[s.taps()]) continue;
    for (Int h = h_begin; h < h_end; ++h) {
      auto taps_h = inside(h, s.stride_h, s.pad_top, s.height, s.kernel_h);
      taps_h = owned(taps_h, h, s.stride_h, tile.h_begin, tile.h_end);
      const auto taps_at = [&](Int w) {
        return owned(inside(w, s.stride_w, s.pad_left, s.width, s.kernel_w), w, s.stride_w, tile.w_begin, tile.w_end);
      };
      for (Int w = w_begin, next; w < w_end; w = next) {
        next = run_end(w, smaller(w_end, w + together), taps_at);
        const Taps taps = runs_of(taps_h, taps_at(w), s.kernel_w);
        if (taps.count == 0) continue;
        pack_output(c, dy, group, h, w, next, panel, s.rows * t.lanes, t.lanes);
        float* dx = packed + ((h - tile.h_begin) * t.slots_w + w - tile.w_begin) * t.lanes;
        for (Int run = 0; run < taps.count; ++run) {
          const Int tap = taps.first + run * s.kernel_w;
          input_columns(c, {starts[tap], starts[tap + taps.length]}, next - w, panel, dx);
        }
      }
    }
  }
}

template <class T>
void input_gradient(const Call& c, const Tile& tile, float* scratch) {
  const Sizes& s = c.sizes;
  const Int size = c.tiling.packed_size, panel_size = panel_floats(s, c.tiling);
  float* panel = scratch + size;
  memset(scratch, 0, size * sizeof(float));
  with_gradients<T>(c, tile, panel + panel_size,
                    [&](const auto& dy) { input_gradient_products(c, tile, dy, scratch, panel); });
  unpack_input_gradient<T>(c, tile, scratch);
}
