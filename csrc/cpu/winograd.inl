// Winograd's F(4, 3) along the columns: WinogradInput in passes.h. Included after convolution.inl.
//
// Four output rows y depend on six input rows d. Input, filter and output transform evaluate and interpolate
// polynomials at the points 0, 1, -1, 2, -2 and infinity; even and odd are the parts at 1 and 2.

template <int kVectors, bool kHalves>
AWNET_INLINE void winograd_tile(const ConvolveOutput to, int64_t first, const WinogradInput& from) {
  constexpr int kRows = kConvolveRows;
  Vector points[kPoints][kVectors][kRows];
  constexpr int64_t columns[3] = {0, 1, 2};
  for (int p = 0; p < kPoints; ++p) {
    Vector sums[kRows][kVectors];
    const float* in[kVectors];
    for (int v = 0; v < kVectors; ++v) in[v] = from.values + p * from.point + from.vectors[first + v];
    accumulate<kRows, kVectors, kHalves>(sums, in, from.second, from.channels, from.lanes, columns, 3,
                                         from.weights + p * from.channels * 3 * kRows);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) points[p][v][r] = sums[r][v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const int64_t sample = (first + v) / from.per_sample, number = (first + v) % from.per_sample;
    const int64_t j = number * kWidth;
    const int64_t i = kHalves ? j * kBand : j / from.width * kBand * from.width + j % from.width;
    const int64_t step = kHalves ? kWidth : from.width;
    for (int r = 0; r < kRows; ++r) {
      const auto m = [&](int p) __attribute__((always_inline)) { return points[p][v][r]; };
      const Vector even1 = m(1) + m(2), odd1 = m(1) - m(2), even2 = m(3) + m(4), odd2 = m(3) - m(4);
      Vector y[kBand] = {m(0) + even1 + even2, odd1 + 2.0f * odd2, even1 + 4.0f * even2,
                         odd1 + 8.0f * odd2 + m(5)};
      if constexpr (kHalves) {  // each y is of two bands: collect the rows of one band
        const __m512 a = (__m512)y[0], b = (__m512)y[1], c = (__m512)y[2], d = (__m512)y[3];
        y[0] = (Vector)_mm512_shuffle_f32x4(a, b, 0x44);
        y[1] = (Vector)_mm512_shuffle_f32x4(c, d, 0x44);
        y[2] = (Vector)_mm512_shuffle_f32x4(a, b, 0xee);
        y[3] = (Vector)_mm512_shuffle_f32x4(c, d, 0xee);
      }
#pragma GCC unroll 4
      for (int k = 0; k < kBand; ++k) finish(to, sample * to.sample + r, i + k * step, y[k]);
    }
  }
}

template <bool kHalves>
AWNET_INLINE void winograd_vectors(const ConvolveOutput& to, const WinogradInput& from) {
  int64_t v = 0;
  for (; from.count - v == 3 || from.count - v > 4; v += 3) winograd_tile<3, kHalves>(to, v, from);
  for (; from.count - v >= 2; v += 2) winograd_tile<2, kHalves>(to, v, from);
  if (v < from.count) winograd_tile<1, kHalves>(to, v, from);
}

static void winograd(const ConvolveOutput& to, const WinogradInput& from) {
  from.second == kHalf ? winograd_vectors<false>(to, from) : winograd_vectors<true>(to, from);
}

static void winograd_input_transform(float* to, int64_t point, const float* from, int64_t pitch,
                                     int64_t columns) {
  for (int64_t j = 0; j < columns; j += kWidth) {
    const auto d = [&](int i) __attribute__((always_inline)) { return load(from + i * pitch + j); };
    const Vector d1 = d(1), d2 = d(2), d3 = d(3), d4 = d(4);
    const Vector even1 = d4 - 4.0f * d2, odd1 = d3 - 4.0f * d1, even2 = d4 - d2, odd2 = 2.0f * (d3 - d1);
    float* const out = to + j;
    store(out, 4.0f * d(0) - 5.0f * d2 + d4);
    store(out + point, even1 + odd1);
    store(out + 2 * point, even1 - odd1);
    store(out + 3 * point, even2 + odd2);
    store(out + 4 * point, even2 - odd2);
    store(out + 5 * point, 4.0f * d1 - 5.0f * d3 + d(5));
  }
}

// Eight filters of 9 taps, `stride` apart: lane r of taps[t] is tap t of filter r.
AWNET_INLINE void transpose_filters(__m256* taps, const float* from, int64_t stride) {
  __m256 by_filter[8], pairs[8], fours[8];
  for (int r = 0; r < 8; ++r) by_filter[r] = _mm256_loadu_ps(from + r * stride);
  for (int r = 0; r < 8; r += 2) {
    pairs[r] = _mm256_unpacklo_ps(by_filter[r], by_filter[r + 1]);
    pairs[r + 1] = _mm256_unpackhi_ps(by_filter[r], by_filter[r + 1]);
  }
  for (int r = 0; r < 8; r += 4) {
    for (int i = 0; i < 2; ++i) {
      fours[r + 2 * i] = _mm256_shuffle_ps(pairs[r + i], pairs[r + i + 2], 0x44);
      fours[r + 2 * i + 1] = _mm256_shuffle_ps(pairs[r + i], pairs[r + i + 2], 0xee);
    }
  }
  for (int t = 0; t < 4; ++t) {
    taps[t] = _mm256_permute2f128_ps(fours[t], fours[t + 4], 0x20);
    taps[t + 4] = _mm256_permute2f128_ps(fours[t], fours[t + 4], 0x31);
  }
  from += 8;
  taps[8] = _mm256_setr_ps(from[0], from[stride], from[2 * stride], from[3 * stride], from[4 * stride],
                           from[5 * stride], from[6 * stride], from[7 * stride]);
}

static void winograd_filter_transform(float* to, int64_t point, const float* from, int64_t stride,
                                      const int64_t* taps) {
  static_assert(kConvolveRows == 8);
  __m256 tap[9];
  transpose_filters(tap, from, stride);
  for (int j = 0; j < 3; ++j, to += kConvolveRows) {
    const __m256 g0 = tap[taps[j]], g1 = tap[taps[3 + j]], g2 = tap[taps[6 + j]];
    const __m256 even1 = (g0 + g2) * (-1.0f / 6), odd1 = g1 * (-1.0f / 6);
    const __m256 even2 = g0 * (1.0f / 24) + g2 * (1.0f / 6), odd2 = g1 * (1.0f / 12);
    const __m256 all[kPoints] = {g0 * 0.25f, even1 + odd1, even1 - odd1, even2 + odd2, even2 - odd2, g2};
    for (int p = 0; p < kPoints; ++p) _mm256_storeu_ps(to + p * point, all[p]);
  }
}
