// The weight gradient of one tile: register tiles of some columns times four rows, each summed over lanes at the end.
#pragma once

#include "packing.h"

// sums[k, r] += sum over a rectangle of positions and all lanes of x[offset k] * dy[r], for four rows or fewer.
template <int Columns, int Rows>
DSB_INLINE void weight_cell(const Call& c, Int column, const float* x, const float* dy, Int height, Int width,
                            Int dy_height, Int dy_row, float* sums) {
  const Int lanes = c.tiling.lanes, x_height = c.tiling.slots_w * lanes, rows = c.sizes.rows;
  Vector sum[Columns][4];
  DSB_EACH (k, Columns)
    DSB_EACH (r, 4) sum[k][r] = zero();
  const float* of[Columns];
  DSB_EACH (k, Columns) of[k] = x + c.offsets[column + k];
  for (Int h = 0; h < height; ++h) {
    for (Int l = 0; l < width * lanes; l += kVector) {  // positions of a row follow each other
      Vector right[Rows];
      DSB_EACH (r, Rows) right[r] = load(dy + h * dy_height + r * dy_row + l);
      DSB_EACH (k, Columns) {
        const Vector left = load(of[k] + h * x_height + l);
        DSB_EACH (r, Rows) sum[k][r] = multiply_add(left, right[r], sum[k][r]);
      }
    }
  }
  DSB_EACH (k, Columns) {
    float* to = sums + (column + k) * rows;
    const __m128 four = sums_of(sum[k][0], sum[k][1], sum[k][2], sum[k][3]);
    if (Rows == 4) {
      _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
    } else {
      float some[4];
      _mm_storeu_ps(some, four);
      DSB_EACH (r, Rows) to[r] += some[r];
    }
  }
}

constexpr Int kGradientColumns = DSB_VECTOR == 16 ? 6 : 2;

template <int Columns>
DSB_INLINE void weight_rows(const Call& c, Int column, const float* x, const float* dy, Int height, Int width,
                            Int dy_height, Int dy_row, float* sums) {
  const Int rows = c.sizes.rows;
  for (Int r = 0; r < rows; r += 4) {
    const float* at_dy = dy + r * dy_row;
    with_count<4>(smaller(4, rows - r), [&](auto n) {
      weight_cell<Columns, n.value>(c, column, x, at_dy, height, width, dy_height, dy_row, sums + r);
    });
  }
}

// The positions in [begin, end) where a tap lies inside of the image.
DSB_INLINE Range positions_of(Int tap, Int stride, Int pad, Int size, Int begin, Int end) {
  const Int first = tap >= pad ? 0 : ceil_div(pad - tap, stride);
  const Int last = size + pad - tap <= 0 ? 0 : ceil_div(size + pad - tap, stride);
  return {larger(begin, first), smaller(end, last)};
}

// Adds the products of a packed tile of x and of dy.
template <class T>
void weight_gradient_products(const Call& c, const Tile& tile, Range groups, const float* packed, const Outputs<T>& dy,
                              float* sums, float* panel) {
  const Sizes& s = c.sizes;
  const Tiling& t = c.tiling;
  // dy is packed for a rectangle of positions: whole rows of the tile if more than one.
  const Int width = tile.w_end - tile.w_begin, positions = larger(1, kPanelFloats / (s.rows * t.lanes));
  const Int tall = larger(1, positions / width), wide = smaller(positions, width);
  const Int dy_height = wide * t.lanes, dy_row = odd_lines(tall * dy_height);
  for (Int group = groups.begin; group < groups.end; ++group) {
    const int32_t* starts = c.starts_of(group);
    if (starts[0] == starts[s.taps()]) continue;
    for (Int h0 = tile.h_begin; h0 < tile.h_end; h0 += tall) {
      const Int h1 = smaller(tile.h_end, h0 + tall);
      for (Int w0 = tile.w_begin; w0 < tile.w_end; w0 += wide) {
        const Int w1 = smaller(tile.w_end, w0 + wide);
        for (Int h = h0; h < h1; ++h)
          pack_output(c, dy, group, h, w0, w1, panel + (h - h0) * dy_height, t.lanes, dy_row);
        for (Int tap = 0; tap < s.taps(); ++tap) {
          const Range hs = positions_of(tap / s.kernel_w, s.stride_h, s.pad_top, s.height, h0, h1);
          const Range ws = positions_of(tap % s.kernel_w, s.stride_w, s.pad_left, s.width, w0, w1);
          if (hs.begin >= hs.end || ws.begin >= ws.end) continue;
          const float* at_dy = panel + ((hs.begin - h0) * wide + ws.begin - w0) * t.lanes;
          const float* x = packed + ((hs.begin - tile.h_begin) * t.slots_w + ws.begin - tile.w_begin) * t.lanes;
          const Int height = hs.end - hs.begin, across = ws.end - ws.begin;
          for (Int k = starts[tap], count; k < starts[tap + 1]; k += count) {
            count = smaller(kGradientColumns, starts[tap + 1] - k);
            with_count<kGradientColumns>(
                count, [&](auto n) { weight_rows<n.value>(c, k, x, at_dy, height, across, dy_height, dy_row, sums); });
          }
        }
      }
    }
  }
}

template <class T>
void weight_gradient(const Call& c, const Tile& tile, Range groups, float* sums, float* scratch) {
  float* panel = scratch + c.tiling.packed_size;
  pack_input<T>(c, tile, scratch);
  with_gradients<T>(c, tile, panel + panel_floats(c.sizes, c.tiling),
                    [&](const auto& dy) { weight_gradient_products(c, tile, groups, scratch, dy, sums, panel); });
}
