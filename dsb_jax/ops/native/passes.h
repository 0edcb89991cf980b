// The three passes over one tile. Included by avx512.cc and avx2.cc, each in a namespace of its own.
//
// Every inner loop is a register tile of some rows (or columns) times two vectors of lanes. The order of every sum is
// fixed by the sizes of the product alone: neither the number of threads nor the tile that a position falls into
// changes a bit.

namespace {

constexpr Int kChunkWeights = 2048;  // of several panels that go over the positions together: they stay in L1
constexpr Int kChunkColumns = 128;   // of one panel: so do the inputs that they read of one position

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
  if (c.batch_major) {
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

// ---------------------------------------------------------------------------------------------------------- forward

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
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vector bias = splat(c.bias && out[r] < s.out ? c.bias[out[r]] : 0.0f);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) sum[r][v] = bias;
    }
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) sum[r][v] = load(sums + r * p.sums_row + v * kVector);
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
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        lanes[v] = load(x + v * kVector);
        if (row == 0) __builtin_prefetch(x + (Vectors + v) * kVector);  // the next position
      }
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const Vector weight = splat(weights[r]);
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) sum[r][v] = multiply_add(weight, lanes[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    if (!p.last) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) store(sums + r * p.sums_row + v * kVector, sum[r][v]);
    } else if (out[r] < s.out) {
      T* y = to.data + out[r] * to.out_size + p.y;
      const Int vectors = c.tiling.lanes / kVector;
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
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
void forward_tile(const Call& c, const Tile& tile, Range groups, float* scratch) {
  const Sizes& s = c.sizes;
  const Int lanes = c.tiling.lanes, exist = smaller(lanes, s.batch - tile.n);
  T* result = static_cast<T*>(c.result);
  float* sums = scratch + c.tiling.packed_size;
  pack_input<T>(c, tile, scratch);
  if (!c.batch_major) {
    forward_products<T>(c, tile, groups, scratch, sums, {result + tile.n, s.positions() * s.batch, exist, c.streams});
    return;
  }
  float* outputs = sums + s.rows * lanes;
  forward_products<float>(c, tile, groups, scratch, sums, {outputs, c.tiling.out_size, lanes});
  unpack_rows(outputs, c.tiling.out_size, s.out, exist, result + tile.n * s.out, c.streams);
}

// --------------------------------------------------------------------------------------------------- both gradients

// Calls run(Outputs) with where a tile finds dy; of [batch][features], a transposed copy in `room`.
template <class T, class Run>
DSB_INLINE void with_gradients(const Call& c, const Tile& tile, float* room, const Run& run) {
  const Sizes& s = c.sizes;
  const Int lanes = c.tiling.lanes, exist = smaller(lanes, s.batch - tile.n);
  if (c.batch_major) {
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

// dx[offset k, lanes] += sum over rows of weights[k, r] * dy[r, lanes], for `Columns` columns at one position.
template <int Columns, int Vectors>
DSB_INLINE void input_cell(const Call& c, Int column, const float* panel, float* dx) {
  const Int rows = c.sizes.rows, lanes = c.tiling.lanes;
  const int32_t* offsets = c.offsets + column;
  const float* weights = c.weights + column * rows;
  Vector sum[Columns][Vectors];
#pragma GCC unroll 16
  for (int k = 0; k < Columns; ++k)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) sum[k][v] = load(dx + offsets[k] + v * kVector);
  for (Int r = 0; r < rows; ++r) {
    Vector dy[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) dy[v] = load(panel + r * lanes + v * kVector);
#pragma GCC unroll 16
    for (int k = 0; k < Columns; ++k) {
      const Vector weight = splat(weights[k * rows + r]);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) sum[k][v] = multiply_add(weight, dy[v], sum[k][v]);
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < Columns; ++k)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) store(dx + offsets[k] + v * kVector, sum[k][v]);
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
  if (c.batch_major) {
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
void input_gradient_tile(const Call& c, const Tile& tile, float* scratch) {
  const Sizes& s = c.sizes;
  const Int size = c.tiling.packed_size, panel_size = panel_floats(s, c.tiling);
  float* panel = scratch + size;
  memset(scratch, 0, size * sizeof(float));
  with_gradients<T>(c, tile, panel + panel_size,
                    [&](const auto& dy) { input_gradient_products(c, tile, dy, scratch, panel); });
  unpack_input_gradient<T>(c, tile, scratch);
}

// -------------------------------------------------------------------------------------------------- weight gradient

// sums[k, r] += sum over a rectangle of positions and all lanes of x[offset k] * dy[r], for four rows or fewer.
template <int Columns, int Rows>
DSB_INLINE void weight_cell(const Call& c, Int column, const float* x, const float* dy, Int height, Int width,
                            Int dy_height, Int dy_row, float* sums) {
  const Int lanes = c.tiling.lanes, x_height = c.tiling.slots_w * lanes, rows = c.sizes.rows;
  Vector sum[Columns][4];
#pragma GCC unroll 16
  for (int k = 0; k < Columns; ++k)
#pragma GCC unroll 16
    for (int r = 0; r < 4; ++r) sum[k][r] = zero();
  const float* of[Columns];
#pragma GCC unroll 16
  for (int k = 0; k < Columns; ++k) of[k] = x + c.offsets[column + k];
  for (Int h = 0; h < height; ++h) {
    for (Int l = 0; l < width * lanes; l += kVector) {  // positions of a row follow each other
      Vector right[Rows];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) right[r] = load(dy + h * dy_height + r * dy_row + l);
#pragma GCC unroll 16
      for (int k = 0; k < Columns; ++k) {
        const Vector left = load(of[k] + h * x_height + l);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) sum[k][r] = multiply_add(left, right[r], sum[k][r]);
      }
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < Columns; ++k) {
    float* to = sums + (column + k) * rows;
    const __m128 four = sums_of(sum[k][0], sum[k][1], sum[k][2], sum[k][3]);
    if (Rows == 4) {
      _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
    } else {
      float some[4];
      _mm_storeu_ps(some, four);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) to[r] += some[r];
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
void weight_gradient_tile(const Call& c, const Tile& tile, Range groups, float* sums, float* scratch) {
  float* panel = scratch + c.tiling.packed_size;
  pack_input<T>(c, tile, scratch);
  with_gradients<T>(c, tile, panel + panel_floats(c.sizes, c.tiling),
                    [&](const auto& dy) { weight_gradient_products(c, tile, groups, scratch, dy, sums, panel); });
}

// --------------------------------------------------------------------------------------------------------- dispatch

// Calls `run` with a value of the type that activations have in memory.
template <class Run>
DSB_INLINE void with_element(const Call& c, const Run& run) {
  if (c.element == Element::kFloat32) {
    run(float());
  } else {
    run(uint16_t());
  }
}

void forward(const Call& c, const Tile& tile, Range groups, float* scratch) {
  with_element(c, [&](auto t) { forward_tile<decltype(t)>(c, tile, groups, scratch); });
}

void input_gradient(const Call& c, const Tile& tile, float* scratch) {
  with_element(c, [&](auto t) { input_gradient_tile<decltype(t)>(c, tile, scratch); });
}

void weight_gradient(const Call& c, const Tile& tile, Range groups, float* sums, float* scratch) {
  with_element(c, [&](auto t) { weight_gradient_tile<decltype(t)>(c, tile, groups, sums, scratch); });
}

double seconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

double peak() {
  constexpr int kChains = 12;  // more than latency times ports, fewer than registers
  constexpr Int kSteps = 400000;
  Vector sum[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sum[i] = splat(float(i));
  const Vector factor = splat(0.999f), term = splat(0.001f);
  const double begin = seconds();
  for (Int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
      sum[i] = multiply_add(sum[i], factor, term);
      asm volatile("" : "+v"(sum[i]));  // so that nothing is folded away
    }
  }
  return double(kSteps) * kChains * kVector * 2 / (seconds() - begin);
}

}  // namespace
