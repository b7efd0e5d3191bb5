// The kernels of the direct convolution, in vectors of 16 floats. Included after passes.inl, whose Vector and
// load it uses. A vector is 16 consecutive values or two halves of 8, the second one at offset `second`.

using Indices = int32_t __attribute__((vector_size(64)));

template <bool kHalves>
AWNET_INLINE Vector load_at(const float* p, int64_t second) {
  if constexpr (!kHalves) return load(p);
  const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(p));
  return (Vector)_mm512_insertf32x8(low, _mm256_loadu_ps(p + second), 1);
}

template <bool kHalves>
AWNET_INLINE void store_at(float* p, int64_t second, Vector v) {
  if constexpr (!kHalves) return store(p, v);
  _mm256_storeu_ps(p, _mm512_castps512_ps256((__m512)v));
  _mm256_storeu_ps(p + second, _mm512_extractf32x8_ps((__m512)v, 1));
}

AWNET_INLINE void finish(const ConvolveOutput to, int64_t row, int64_t i, Vector u) {
  i += row * to.plane;
  if (to.u != nullptr) store(to.u + i, to.add ? load(to.u + i) + u : u);
  if (to.y == nullptr) return;
  Vector y = u * to.scale[row] + to.shift[row];
  if (to.residual != nullptr) y += load(to.residual + i);
  if (to.relu) y = relu(y);
  store(to.y + i, y);
  if (to.relu_mask != nullptr) store(to.relu_mask + i, y);
}

// sums[r][v] = sum over c, t of weights[c][t][r] * in[v][c * step + taps[t]]
template <int kRows, int kVectors, bool kHalves>
AWNET_INLINE void accumulate(Vector (&sums)[kRows][kVectors], const float* (&in)[kVectors], int64_t second,
                             int64_t channels, int64_t step, const int64_t* taps, int64_t tap_count,
                             const float* weights) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector{};
  }
  for (int64_t c = 0; c < channels; ++c) {
#pragma GCC unroll 1  // taps side by side would need more registers than there are
    for (int64_t t = 0; t < tap_count; ++t, weights += kRows) {
      Vector x[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) x[v] = load_at<kHalves>(in[v] + taps[t], second);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const float w = weights[r];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] += x[v] * w;
      }
    }
    for (int v = 0; v < kVectors; ++v) in[v] += step;
  }
}

template <int kRows, int kVectors, bool kHalves>
AWNET_INLINE void convolve_tile(const ConvolveOutput to, int64_t first, const ConvolveInput& from) {
  Vector sums[kRows][kVectors];
  const float* in[kVectors];
  for (int v = 0; v < kVectors; ++v) in[v] = from.image + from.vectors[first + v];
  accumulate<kRows, kVectors, kHalves>(sums, in, from.second, from.channels, from.plane, from.taps,
                                       from.tap_count, from.weights);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) finish(to, r, (first + v) * kWidth, sums[r][v]);
  }
}

template <int kRows, bool kHalves>
AWNET_INLINE void convolve_vectors(const ConvolveOutput& to, const ConvolveInput& from) {
  int64_t v = 0;
  for (; from.count - v == 3 || from.count - v > 4; v += 3) convolve_tile<kRows, 3, kHalves>(to, v, from);
  for (; from.count - v >= 2; v += 2) convolve_tile<kRows, 2, kHalves>(to, v, from);
  if (v < from.count) convolve_tile<kRows, 1, kHalves>(to, v, from);
}

template <int kRows>
static void convolve_rows(const ConvolveOutput& to, const ConvolveInput& from) {
  from.second == kHalf ? convolve_vectors<kRows, false>(to, from) : convolve_vectors<kRows, true>(to, from);
}

template <bool kSums, bool kAffine, bool kHalves>
AWNET_INLINE void propagate_packed(float* to, const Vectors& where, const BackwardArgs<float> p) {
  const int64_t vectors = static_cast<int64_t>(where.offsets.size());
  const float by_grad = *p.by_grad, center = kSums || kAffine ? *p.center : 0.0f,
              by_input = kAffine ? *p.by_input : 0.0f, constant = kAffine ? *p.constant : 0.0f;
  double totals[2] = {0.0, 0.0};
  Sum sum, products;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t i = v * kWidth;
    const Vector g = activation_backward<false>(
        p.grad, p.activation, i, [](auto* q) __attribute__((always_inline)) { return load(q); });
    Vector d = g * by_grad;
    if (kSums || kAffine) {
      const Vector u = load(p.u + i) - center;
      if (kSums) {
        sum += g;
        products += g * u;
      }
      if (kAffine) d += u * by_input + constant;
    }
    store_at<kHalves>(to + where.offsets[v], where.second, d);
    if (p.d_u != nullptr) store(p.d_u + i, d);
    if (p.d_residual != nullptr) store(p.d_residual + i, g);
    if (kSums && (v % kBlock == kBlock - 1 || v == vectors - 1)) {
      totals[0] += sum.total();
      totals[1] += products.total();
      sum = products = Sum();
    }
  }
  if (kSums) {
    *p.g1 = static_cast<float>(totals[0]);
    *p.gc = static_cast<float>(totals[1]);
  }
}

template <bool kHalves>
AWNET_INLINE void propagate_packed(float* to, const Vectors& where, const BackwardArgs<float>& p) {
  if (p.g1 != nullptr) {
    p.by_input ? propagate_packed<true, true, kHalves>(to, where, p)
               : propagate_packed<true, false, kHalves>(to, where, p);
  } else {
    p.by_input ? propagate_packed<false, true, kHalves>(to, where, p)
               : propagate_packed<false, false, kHalves>(to, where, p);
  }
}

static void propagate(float* to, const Vectors& where, const BackwardArgs<float>& p) {
  where.second == kHalf ? propagate_packed<false>(to, where, p) : propagate_packed<true>(to, where, p);
}

static void scatter(float* to, const Vectors& where, const float* from) {
  const int64_t count = static_cast<int64_t>(where.offsets.size());
  for (int64_t v = 0; v < count; ++v) {
    const Vector x = load(from + v * kWidth);
    where.second == kHalf ? store_at<false>(to + where.offsets[v], 0, x)
                          : store_at<true>(to + where.offsets[v], where.second, x);
  }
}

static void every_second(float* to, const float* from, int64_t count) {
  // of the values 0 to 15 and 15 to 30: none is read beyond the last one taken
  const Indices even = {0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31};
  int64_t j = 0;
  for (; j + kWidth <= count; j += kWidth) {
    store(to + j, __builtin_shuffle(load(from + 2 * j), load(from + 2 * j + kWidth - 1), even));
  }
  for (; j < count; ++j) to[j] = from[2 * j];
}

static void interleave(float* to, const float* even, const float* odd, int64_t pairs, bool add) {
  const Indices order = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
  int64_t j = 0;
  for (; j + kHalf <= pairs; j += kHalf) {
    const Vector both = __builtin_shuffle(load_at<true>(even + j, odd - even), order);
    store(to + 2 * j, add ? load(to + 2 * j) + both : both);
  }
  for (; j < pairs; ++j) {
    to[2 * j] = even[j] + (add ? to[2 * j] : 0.0f);
    to[2 * j + 1] = odd[j] + (add ? to[2 * j + 1] : 0.0f);
  }
}
