// Vectors of 16 floats (AVX-512) or 8 (AVX2), and activations as float32 or bfloat16 in memory.
//
// Included by avx512.cc and avx2.cc after what sets the instructions, in a namespace of its own for each.
#define DSB_INLINE static inline __attribute__((always_inline))

#if DSB_VECTOR == 16
#define DSB_OF_WIDTH(name) _mm512_##name
using Vector = __m512;
constexpr Int kRowBlock = 8;  // rows of a register tile, beside two vectors of lanes

DSB_INLINE Vector load(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
DSB_INLINE __m256i round_to_bfloat16(Vector a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, _mm512_set1_epi32(0x7fc0)));
}
DSB_INLINE void store(uint16_t* p, Vector a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bfloat16(a));
}
DSB_INLINE void stream(uint16_t* p, Vector a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), round_to_bfloat16(a));
}
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
constexpr Int kRowBlock = 5;

DSB_INLINE Vector load(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
DSB_INLINE __m128i round_to_bfloat16(Vector a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
DSB_INLINE void store(uint16_t* p, Vector a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round_to_bfloat16(a)); }
DSB_INLINE void stream(uint16_t* p, Vector a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), round_to_bfloat16(a)); }
DSB_INLINE Vector load_parts(const float* p, Int stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
}
DSB_INLINE void store_parts(float* p, Int stride, Vector a) {
  _mm_storeu_ps(p, _mm256_castps256_ps128(a));
  _mm_storeu_ps(p + stride, _mm256_extractf128_ps(a, 1));
}
DSB_INLINE __m128 fold(Vector a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
#endif

constexpr Int kVector = DSB_VECTOR;

DSB_INLINE Vector zero() { return DSB_OF_WIDTH(setzero_ps)(); }
DSB_INLINE Vector splat(float a) { return DSB_OF_WIDTH(set1_ps)(a); }
DSB_INLINE Vector add(Vector a, Vector b) { return DSB_OF_WIDTH(add_ps)(a, b); }
DSB_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return DSB_OF_WIDTH(fmadd_ps)(a, b, c); }
DSB_INLINE Vector load(const float* p) { return DSB_OF_WIDTH(loadu_ps)(p); }
DSB_INLINE void store(float* p, Vector a) { DSB_OF_WIDTH(storeu_ps)(p, a); }
DSB_INLINE void stream(float* p, Vector a) { DSB_OF_WIDTH(stream_ps)(p, a); }

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
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = l + i < exist ? load_some(rows + (l + i) * features + f, features - f) : zero();
    transpose_parts(v);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store_parts(tile + (f + i) * stride + l, 4 * stride, v[i]);
  });
}

// The inverse.
template <class T>
void unpack_rows(const float* tile, Int stride, Int features, Int exist, T* rows, bool past_caches) {
  each_block(exist, features, [&](Int l, Int f) {
    Vector v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = load_parts(tile + (f + i) * stride + l, 4 * stride);
    transpose_parts(v);
    for (int i = 0; i < smaller(4, exist - l); ++i)
      store_some(rows + (l + i) * features + f, v[i], features - f, past_caches);
  });
}
