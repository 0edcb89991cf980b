// Vectors of 16 floats (AVX-512) or 8 (AVX2), and activations as float32 or bfloat16 in memory.
//
// This and what includes it comes by way of passes.h, which says how.
#pragma once

#define DSB_INLINE static inline __attribute__((always_inline))
#define DSB_EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); ++i)

constexpr Int kVector = DSB_VECTOR;

#if DSB_VECTOR == 16
#define DSB_OF_WIDTH(name) _mm512_##name
using Vector = __m512;
using Half = __m256i;         // of the bytes of a vector
constexpr Int kRowBlock = 8;  // rows of a register tile, beside two vectors of lanes

DSB_INLINE void stream(Half* p, Half a) { _mm256_stream_si256(p, a); }
// Parts of four floats, `stride` apart.
DSB_INLINE Vector load_parts(const float* p, Int stride) {
  Vector a = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
  a = _mm512_insertf32x4(a, _mm_loadu_ps(p + 2 * stride), 2);
  return _mm512_insertf32x4(a, _mm_loadu_ps(p + 3 * stride), 3);
}
DSB_INLINE void store_parts(float* p, Int stride, Vector a) {
  _mm_storeu_ps(p, _mm512_castps512_ps128(a));
  _mm_storeu_ps(p + stride, _mm512_extractf32x4_ps(a, 1));
  _mm_storeu_ps(p + 2 * stride, _mm512_extractf32x4_ps(a, 2));
  _mm_storeu_ps(p + 3 * stride, _mm512_extractf32x4_ps(a, 3));
}
// Adds the four 128-bit parts.
DSB_INLINE __m128 fold(Vector a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#else
#define DSB_OF_WIDTH(name) _mm256_##name
using Vector = __m256;
using Half = __m128i;
constexpr Int kRowBlock = 5;

DSB_INLINE void stream(Half* p, Half a) { _mm_stream_si128(p, a); }
DSB_INLINE Vector load_parts(const float* p, Int stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
}
DSB_INLINE void store_parts(float* p, Int stride, Vector a) {
  _mm_storeu_ps(p, _mm256_castps256_ps128(a));
  _mm_storeu_ps(p + stride, _mm256_extractf128_ps(a, 1));
}
DSB_INLINE __m128 fold(Vector a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
#endif

DSB_INLINE Vector zero() { return DSB_OF_WIDTH(setzero_ps)(); }
DSB_INLINE Vector splat(float a) { return DSB_OF_WIDTH(set1_ps)(a); }
DSB_INLINE Vector add(Vector a, Vector b) { return DSB_OF_WIDTH(add_ps)(a, b); }
DSB_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return DSB_OF_WIDTH(fmadd_ps)(a, b, c); }
DSB_INLINE Vector load(const float* p) { return DSB_OF_WIDTH(loadu_ps)(p); }
DSB_INLINE void store(float* p, Vector a) { DSB_OF_WIDTH(storeu_ps)(p, a); }
DSB_INLINE void stream(float* p, Vector a) { DSB_OF_WIDTH(stream_ps)(p, a); }

// bfloat16 is the upper half of a float32.
using Words = uint32_t __attribute__((vector_size(4 * kVector)));
using Shorts = uint16_t __attribute__((vector_size(2 * kVector)));

DSB_INLINE Shorts to_bfloat16(Vector a) {
  const Words bits = Words(a), is_nan = Words(a != a);
  const Words nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // the even one of two
  return __builtin_convertvector((nearest & ~is_nan) | (0x7fc0 & is_nan), Shorts);
}
DSB_INLINE Vector load(const uint16_t* p) {
  Shorts upper;
  memcpy(&upper, p, sizeof(upper));
  return Vector(__builtin_convertvector(upper, Words) << 16);
}
DSB_INLINE void store(uint16_t* p, Vector a) {
  const Shorts upper = to_bfloat16(a);
  memcpy(p, &upper, sizeof(upper));
}
DSB_INLINE void stream(uint16_t* p, Vector a) { stream(reinterpret_cast<Half*>(p), Half(to_bfloat16(a))); }

// Of every four lanes: sums of a, b, a, b.
DSB_INLINE Vector pairs(Vector a, Vector b) {
  return add(DSB_OF_WIDTH(unpacklo_ps)(a, b), DSB_OF_WIDTH(unpackhi_ps)(a, b));
}

// The sums of four vectors, each over all of its lanes.
DSB_INLINE __m128 sums_of(Vector a, Vector b, Vector c, Vector d) {
  const Vector ab = pairs(a, b), cd = pairs(c, d);
  return fold(add(DSB_OF_WIDTH(shuffle_ps)(ab, cd, 0x44), DSB_OF_WIDTH(shuffle_ps)(ab, cd, 0xee)));
}

// A vector of which the first `count` elements exist; the others are read as zero, and not written.
template <class T>
DSB_INLINE Vector load_some(const T* p, Int count) {
  if (count >= kVector) return load(p);
  T some[kVector] = {};
  if (count > 0) memcpy(some, p, count * sizeof(T));
  return load(some);
}

template <class T>
DSB_INLINE void store_some(T* p, Vector a, Int count, bool past_caches) {
  if (count >= kVector) {
    if (past_caches) {
      stream(p, a);
    } else {
      store(p, a);
    }
  } else if (count > 0) {
    T some[kVector];
    store(some, a);
    memcpy(p, some, count * sizeof(T));
  }
}

// The transpose of each part of four by four.
DSB_INLINE void transpose_parts(Vector (&v)[4]) {
  const Vector low = DSB_OF_WIDTH(unpacklo_ps)(v[0], v[1]), high = DSB_OF_WIDTH(unpackhi_ps)(v[0], v[1]);
  const Vector low2 = DSB_OF_WIDTH(unpacklo_ps)(v[2], v[3]), high2 = DSB_OF_WIDTH(unpackhi_ps)(v[2], v[3]);
  v[0] = DSB_OF_WIDTH(shuffle_ps)(low, low2, 0x44), v[1] = DSB_OF_WIDTH(shuffle_ps)(low, low2, 0xee);
  v[2] = DSB_OF_WIDTH(shuffle_ps)(high, high2, 0x44), v[3] = DSB_OF_WIDTH(shuffle_ps)(high, high2, 0xee);
}

// run(lane, feature), of all multiples of four and of kVector: of some examples all features, before the next.
template <class Run>
DSB_INLINE void each_block(Int lanes, Int features, const Run& run) {
  constexpr Int kStrip = 16;  // a cache line of a tile
  for (Int strip = 0; strip < lanes; strip += kStrip)
    for (Int f = 0; f < features; f += kVector)
      for (Int l = strip; l < smaller(strip + kStrip, lanes); l += 4) run(l, f);
}

// rows[lane][feature] -> tile[feature][lane], whose features are `stride` floats apart. Lanes that do not exist are
// zero, and so are features up to a multiple of the vector length.
template <class T>
void pack_rows(const T* rows, Int features, Int exist, Int lanes, Int stride, float* tile) {
  each_block(lanes, features, [&](Int l, Int f) {
    Vector v[4];
    DSB_EACH (i, 4) v[i] = l + i < exist ? load_some(rows + (l + i) * features + f, features - f) : zero();
    transpose_parts(v);
    DSB_EACH (i, 4) store_parts(tile + (f + i) * stride + l, 4 * stride, v[i]);
  });
}

// The inverse.
template <class T>
void unpack_rows(const float* tile, Int stride, Int features, Int exist, T* rows, bool past_caches) {
  each_block(exist, features, [&](Int l, Int f) {
    Vector v[4];
    DSB_EACH (i, 4) v[i] = load_parts(tile + (f + i) * stride + l, 4 * stride);
    transpose_parts(v);
    for (int i = 0; i < smaller(4, exist - l); ++i)
      store_some(rows + (l + i) * features + f, v[i], features - f, past_caches);
  });
}
