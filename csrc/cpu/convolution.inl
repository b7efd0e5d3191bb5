// The heart of the direct convolution, in vectors of 16 floats. Included after passes.inl, whose Vector and
// load it uses.

// out[r][q] = sum over c, t of weights[c][t][r] * in[c][offsets[t] + q], for kRows r and kVectors * 16 q.
template <int kRows, int kVectors>
AWNET_INLINE void convolve_tile(float* out, int64_t out_stride, const float* in, int64_t in_stride,
                                int64_t channels, const int64_t* offsets, int64_t taps,
                                const float* weights) {
  Vector sums[kRows][kVectors] = {};
  for (int64_t c = 0; c < channels; ++c, in += in_stride) {
    for (int64_t t = 0; t < taps; ++t, weights += kRows) {
      Vector x[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) x[v] = load(in + offsets[t] + v * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const float w = weights[r];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] += x[v] * w;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kWidth, sums[r][v]);
  }
}

template <int kRows>
static void convolve_rows(float* out, int64_t vectors, const float* in, int64_t in_stride, int64_t channels,
                          const int64_t* offsets, int64_t taps, const float* weights) {
  const int64_t out_stride = vectors * kWidth;
  for (; vectors >= 3; vectors -= 3, in += 3 * kWidth, out += 3 * kWidth) {
    convolve_tile<kRows, 3>(out, out_stride, in, in_stride, channels, offsets, taps, weights);
  }
  if (vectors == 2) {
    convolve_tile<kRows, 2>(out, out_stride, in, in_stride, channels, offsets, taps, weights);
  } else if (vectors == 1) {
    convolve_tile<kRows, 1>(out, out_stride, in, in_stride, channels, offsets, taps, weights);
  }
}

extern const ConvolveRows convolve[kConvolveRows] = {convolve_rows<1>, convolve_rows<2>, convolve_rows<3>,
                                                     convolve_rows<4>, convolve_rows<5>, convolve_rows<6>,
                                                     convolve_rows<7>, convolve_rows<8>};
