// How the work of a pass is cut into tiles that fit the caches.
#pragma once

#include <unistd.h>

#include "product.h"

namespace dsb {

constexpr Int kLanes = 32;        // of a tile: two cache lines side by side of each row of x
constexpr double kL2Share = 0.8;  // of a packed tile; the rest is for dy, sums and weights

inline Int l2_floats() {
  static const Int size = [] {
    const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return Int(bytes > 0 ? bytes : 1 << 20) / 4;
  }();
  return size;
}

// Where a tile is one position (a matrix product), more lanes take the place of more positions.
inline Int lanes_of(const Sizes& s, Int vector, Int positions, Int threads) {
  const Int features = s.batch_major ? s.channels + s.out : s.channels;  // that are packed at once
  const Int half = kLanes / 2;
  const auto padded = [&](Int lanes) { return ceil_div(s.batch, lanes) * lanes; };
  if (s.batch <= half) return padded(vector);
  // Half of them where more than an eighth would be spare.
  Int lanes = 8 * padded(kLanes) > 9 * padded(half) ? half : kLanes;
  const auto fits = [&](Int more) {
    return more * s.rows <= kPanelFloats && more * features <= l2_floats() / 2 && s.batch >= more * threads &&
           padded(more) == padded(lanes);
  };
  while (positions == 1 && fits(2 * lanes)) lanes *= 2;
  return lanes;
}

// Tiles of extent_h x extent_w positions or slots, of which each needs `halo` more in the buffer.
inline Tiling tiling_of(const Sizes& s, Int vector, Int extent_h, Int extent_w, Int halo_h, Int halo_w, Int threads) {
  Tiling t;
  t.lanes = lanes_of(s, vector, extent_h * extent_w, threads);
  t.tiles_n = ceil_div(s.batch, t.lanes);
  const Int slot = s.channels * s.phases_h() * s.phases_w() * t.lanes;
  const Int room = larger(1, Int(kL2Share * double(l2_floats())) / slot);
  Int least = 0;
  for (Int tiles_w = 1; tiles_w <= extent_w; ++tiles_w) {  // the cut that packs the fewest slots
    const Int tile_w = ceil_div(extent_w, tiles_w);
    const Int tile_h = smaller(extent_h, larger(1, room / (tile_w + halo_w) - halo_h));
    const Int tiles_h = ceil_div(extent_h, tile_h);
    const Int packed = (extent_h + tiles_h * halo_h) * (extent_w + tiles_w * halo_w);
    const bool fits = (tile_h + halo_h) * (tile_w + halo_w) <= room;
    if (least == 0 || packed < least) {
      least = packed;
      t.tiles_h = tiles_h, t.tiles_w = tiles_w;
    }
    if (fits && tile_h == extent_h) break;
  }
  while (t.tiles() < threads && t.tiles_h < extent_h) ++t.tiles_h;
  t.tile_h = ceil_div(extent_h, t.tiles_h), t.tiles_h = ceil_div(extent_h, t.tile_h);
  t.tile_w = ceil_div(extent_w, t.tiles_w), t.tiles_w = ceil_div(extent_w, t.tile_w);
  t.slots_h = t.tile_h + halo_h, t.slots_w = t.tile_w + halo_w;
  t.phase_size = t.slots_h * t.slots_w * t.lanes;
  t.channel_size = odd_lines(s.phases_h() * s.phases_w() * t.phase_size);
  t.out_size = odd_lines(t.lanes);
  const auto whole = [&](Int features) {  // transposes are of whole vectors
    return s.batch_major ? ceil_div(features, vector) * vector : features;
  };
  t.packed_size = whole(s.channels) * t.channel_size;
  t.outputs_size = s.batch_major ? whole(s.out) * t.out_size : 0;
  return t;
}

inline Tile tile_at(const Tiling& t, Int i, Int extent_h, Int extent_w) {
  const Int w = i % t.tiles_w * t.tile_w, h = i / t.tiles_w % t.tiles_h * t.tile_h;
  const Int n = i / (t.tiles_w * t.tiles_h) * t.lanes;
  return {n, h, smaller(extent_h, h + t.tile_h), w, smaller(extent_w, w + t.tile_w)};
}

}  // namespace dsb
