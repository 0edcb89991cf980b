// The forward pass over one tile: register tiles of some rows times two vectors of lanes.
#pragma once

#include "packing.h"

constexpr Int kChunkWeights = 2048;  // of several panels that go over the positions together: they stay in L1
constexpr Int kChunkColumns = 128;   // of one panel: so do the inputs that they read of one position

// Where a register tile of the forward pass lies.
struct Place {
  const float* x;  // its first lane in the packed tile, for an offset of 0
  float* sums;     // its first lane in the sums between two cuts of a panel, for row 0
  Int sums_row;    // floats from row to row there
  Int y;           // its first element among the outputs, for output 0
  Int vector;      // number of its first vector among those that belong to one position
  Taps taps;
  Int begin, end;    // of the cut, among all columns
  bool first, last;  // cut of the panel
};

// y[r, lanes] = bias[r] + sum over columns k of weights[k, r] * x[offset k, lanes], for `Rows` rows.
template <class T, int Rows, int Vectors>
DSB_INLINE void forward_cell(const Call& c, const Outputs<T>& to, const Place& p, Int group, Int row) {
  const Sizes& s = c.sizes;
  const int32_t* out = c.out_idx + group * s.rows + row;
  float* sums = p.sums + row * p.sums_row;
  Vector sum[Rows][Vectors];
  if (p.first) {
    DSB_EACH (r, Rows) {
      const Vector bias = splat(c.bias && out[r] < s.out ? c.bias[out[r]] : 0.0f);
      DSB_EACH (v, Vectors) sum[r][v] = bias;
    }
  } else {
    DSB_EACH (r, Rows)
      DSB_EACH (v, Vectors) sum[r][v] = load(sums + r * p.sums_row + v * kVector);
  }
  const int32_t* starts = c.starts_of(group);
  for (Int run = 0; run < p.taps.count; ++run) {
    const Int tap = p.taps.first + run * s.kernel_w;
    const Int end = smaller(starts[tap + p.taps.length], p.end);
    const Int begin = larger(starts[tap], p.begin);
    const float* weights = c.weights + begin * s.rows + row;
    for (Int k = begin; k < end; ++k, weights += s.rows) {
      const float* x = p.x + c.offsets[k];
      Vector lanes[Vectors];
      DSB_EACH (v, Vectors) {
        lanes[v] = load(x + v * kVector);
        if (row == 0) __builtin_prefetch(x + (Vectors + v) * kVector);  // the next position
      }
      DSB_EACH (r, Rows) {
        const Vector weight = splat(weights[r]);
        DSB_EACH (v, Vectors) sum[r][v] = multiply_add(weight, lanes[v], sum[r][v]);
      }
    }
  }
  DSB_EACH (r, Rows) {
    if (!p.last) {
      DSB_EACH (v, Vectors) store(sums + r * p.sums_row + v * kVector, sum[r][v]);
    } else if (out[r] < s.out) {
      T* y = to.data + out[r] * to.out_size + p.y;
      const Int vectors = c.tiling.lanes / kVector;
      DSB_EACH (v, Vectors) {
        const Int position = (p.vector + v) / vectors, lane = (p.vector + v) % vectors * kVector;
        store_some(y + position * s.batch + lane, sum[r][v], to.lanes - lane, to.past_caches);
      }
    }
  }
}

template <class T, int Vectors>
DSB_INLINE void forward_rows(const Call& c, const Outputs<T>& to, const Place& p, Int group) {
  const Int rows = c.sizes.rows, blocks = ceil_div(rows, kRowBlock);
  for (Int block = 0; block < blocks; ++block) {
    const Int begin = rows * block / blocks, end = rows * (block + 1) / blocks;
    with_count<kRowBlock>(end - begin, [&](auto n) { forward_cell<T, n.value, Vectors>(c, to, p, group, begin); });
  }
}

// The outputs of some groups at a packed tile, which the sums between two cuts of a panel follow.
template <class T>
void forward_products(const Call& c, const Tile& tile, Range groups, const float* packed, float* sums_of_tile,
                      const Outputs<T>& to) {
  const Sizes& s = c.sizes;
  const Tiling& t = c.tiling;
  Place p;
  p.sums_row = (tile.h_end - tile.h_begin) * (tile.w_end - tile.w_begin) * t.lanes;
  for (Int group = groups.begin, next; group < groups.end; group = next) {
    // Several small panels go together over the positions; a large one is cut along its columns.
    const Int first = c.starts_of(group)[0];
    auto weights_to = [&](Int g) { return (c.starts_of(g)[s.taps()] - first) * s.rows; };
    for (next = group + 1; next < groups.end && weights_to(next) <= kChunkWeights;) ++next;
    const Int cuts =
        next - group > 1 ? 1 : larger(1, ceil_div(weights_to(group), larger(kChunkWeights, kChunkColumns * s.rows)));
    const Int columns = c.starts_of(next - 1)[s.taps()] - first;
    for (Int cut = 0; cut < cuts; ++cut) {
      p.begin = first + columns * cut / cuts, p.end = first + columns * (cut + 1) / cuts;
      p.first = cut == 0, p.last = cut == cuts - 1;
      for (Int h = tile.h_begin; h < tile.h_end; ++h) {
        const Range rows = inside(h, s.stride_h, s.pad_top, s.height, s.kernel_h);
        const auto taps_at = [&](Int w) { return inside(w, s.stride_w, s.pad_left, s.width, s.kernel_w); };
        for (Int w = tile.w_begin, w_end; w < tile.w_end; w = w_end) {
          w_end = run_end(w, tile.w_end, taps_at);
          p.taps = runs_of(rows, taps_at(w), s.kernel_w);
          p.y = (h * s.out_width + w) * s.batch;
          const Int position = (h - tile.h_begin) * (tile.w_end - tile.w_begin) + w - tile.w_begin;
          const float* x = packed + ((h - tile.h_begin) * t.slots_w + w - tile.w_begin) * t.lanes;
          float* sums = sums_of_tile + position * t.lanes;
          const Int vectors = (w_end - w) * t.lanes / kVector;
          for (p.vector = 0; p.vector < vectors;) {
            p.x = x + p.vector * kVector, p.sums = sums + p.vector * kVector;
            const bool two = p.vector + 2 <= vectors;
            for (Int g = group; g < next; ++g) {
              if (two) {
                forward_rows<T, 2>(c, to, p, g);
              } else {
                forward_rows<T, 1>(c, to, p, g);
              }
            }
            p.vector += two ? 2 : 1;
          }
        }
      }
    }
  }
}

template <class T>
void forward(const Call& c, const Tile& tile, Range groups, float* scratch) {
  const Sizes& s = c.sizes;
  const Int lanes = c.tiling.lanes, exist = smaller(lanes, s.batch - tile.n);
  T* result = static_cast<T*>(c.result);
  float* sums = scratch + c.tiling.packed_size;
  pack_input<T>(c, tile, scratch);
  if (!s.batch_major) {
    forward_products<T>(c, tile, groups, scratch, sums, {result + tile.n, s.positions() * s.batch, exist, c.streams});
    return;
  }
  float* outputs = sums + s.rows * lanes;
  forward_products<float>(c, tile, groups, scratch, sums, {outputs, c.tiling.out_size, lanes});
  unpack_rows(outputs, c.tiling.out_size, s.out, exist, result + tile.n * s.out, c.streams);
}
