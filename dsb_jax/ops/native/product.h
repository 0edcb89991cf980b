// What the three passes share: sizes, tiles of the work, and where the columns of a panel lie in a packed tile.
//
// Activations are x[channels][height][width][batch] and y[out][out_height][out_width][batch]. A *tile* is a block of
// the batch (its *lanes*) at some output rows and columns. What it reads of x is packed into a buffer that fits L2,
//
//     packed[channel][phase_h][phase_w][slot_h][slot_w][lane],
//
// where padded row h * stride + a of the input is slot h + a / stride of phase a % stride: so column (tap, channel) of
// a panel is one offset into the buffer, the same for all positions of the tile. Taps that fall into the padding are
// skipped, not multiplied: the columns of a panel are sorted by tap, and those valid at a position are a few runs.
// Activations of a matrix product may also come as [batch][features]: they are transposed on their way into a tile.
#pragma once

#include <cstdint>

namespace dsb {

using Int = int64_t;

constexpr Int kCacheLine = 16;  // floats

static inline Int smaller(Int a, Int b) { return a < b ? a : b; }
static inline Int larger(Int a, Int b) { return a > b ? a : b; }
static inline Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }

// An odd number of cache lines: rows of such a length do not share a set of the cache.
static inline Int odd_lines(Int floats) { return (ceil_div(floats, kCacheLine) | 1) * kCacheLine; }

constexpr Int kPanelFloats = 8192;  // of dy that a gradient packs for one group: they stay in L1

enum Element { kFloat32, kBFloat16 };  // of activations in memory

// The sizes of one product; pads may be negative.
struct Sizes {
  Int channels, height, width, batch;
  Int out, out_height, out_width;
  Int kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left;
  Int groups, rows, blocks, block_columns;
  bool batch_major;  // whether x and y are [batch][features]: of a matrix product alone

  Int taps() const { return kernel_h * kernel_w; }
  Int positions() const { return out_height * out_width; }
  Int columns() const { return blocks * block_columns; }  // of all panels together
  Int phases_h() const { return smaller(kernel_h, stride_h); }
  Int phases_w() const { return smaller(kernel_w, stride_w); }
  Int halo_h() const { return (kernel_h - 1) / stride_h; }  // slots that a tile reads beyond its own
  Int halo_w() const { return (kernel_w - 1) / stride_w; }
};

// How the work is cut. Of forward and weight gradient, a tile is tile_h x tile_w output positions; of the input
// gradient, as many slots of its result.
struct Tiling {
  Int lanes;           // of a tile: a multiple of the vector length
  Int tile_h, tile_w;  // positions or slots
  Int slots_h, slots_w;
  Int phase_size, channel_size;  // floats of the packed buffer
  Int packed_size;
  Int out_size, outputs_size;  // floats of an output, and of all, where they are transposed in a buffer
  Int tiles_n, tiles_h, tiles_w;

  Int tiles() const { return tiles_n * tiles_h * tiles_w; }
};

// One tile: the first of its lanes, and a half-open rectangle of positions or slots.
struct Tile {
  Int n, h_begin, h_end, w_begin, w_end;
};

// Where a tile finds y or dy, or leaves it: element (out, h, w, lane) is out * out_size + (h * out_width + w) * batch +
// lane from `data`.
template <class T>
struct Outputs {
  T* data;
  Int out_size;
  Int lanes;                 // that exist
  bool past_caches = false;  // whether they are written so
};

// A half-open range.
struct Range {
  Int begin, end;
};

// Runs of taps: `count` of them, each `length` taps, the first from `first`, the others a kernel row apart.
struct Taps {
  Int first, length, count;
};

// One call of a pass. `starts` has taps + 1 numbers for each group: where the columns of each tap begin.
struct Call {
  Sizes sizes;
  Tiling tiling;
  Element element;
  const void* x;  // forward, weight gradient
  const void* dy;
  void* result;  // y or dx
  bool streams;  // whether the result leaves the caches: then it is written past them
  const float* bias;
  const int32_t* out_idx;  // [groups][rows]
  const int32_t* offsets;  // [columns], sorted by tap in each panel: of the first position of a packed tile
  const int32_t* starts;   // [groups][taps + 1]
  const float* weights;    // [columns][rows], in the same order

  const int32_t* starts_of(Int group) const { return starts + group * (sizes.taps() + 1); }
};

// Floats of dy that a gradient packs at once, at the most.
static inline Int panel_floats(const Sizes& s, const Tiling& t) {
  return larger(kPanelFloats, s.rows * t.lanes) + 2 * kCacheLine * s.rows;
}

// The taps of one axis that lie inside of the image at an output position: `a` with 0 <= at * stride + a - pad < size.
static inline Range inside(Int at, Int stride, Int pad, Int size, Int kernel) {
  const Int begin = larger(0, pad - at * stride);
  return {begin, larger(begin, smaller(kernel, size + pad - at * stride))};
}

// Both axes together, as runs of taps in their order.
static inline Taps runs_of(Range rows, Range columns, Int kernel_w) {
  const Int height = rows.end - rows.begin, width = columns.end - columns.begin;
  const Int first = rows.begin * kernel_w + columns.begin;
  if (height <= 0 || width <= 0) return {0, 0, 0};
  if (width == kernel_w) return {first, height * width, 1};
  return {first, width, height};
}

// The passes over one tile, compiled once for each set of instructions; of each two, by Element.
struct Passes {
  Int vector;  // floats of a vector
  // Writes the output of groups [begin, end).
  void (*forward[2])(const Call&, const Tile&, Range groups, float* scratch);
  // Writes the part of dx that the tile owns.
  void (*input_gradient[2])(const Call&, const Tile&, float* scratch);
  // Adds the tile's part to sums[columns][rows] of groups [begin, end).
  void (*weight_gradient[2])(const Call&, const Tile&, Range groups, float* sums, float* scratch);
  // Operations in a second of multiply-adds in registers alone, on one core: what the passes are measured against.
  double (*peak)();
};

extern const Passes kAvx512, kAvx2;

}  // namespace dsb
