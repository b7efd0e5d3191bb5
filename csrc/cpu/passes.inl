// The kernels of passes.h in vectors of 16 floats; remaining values one by one. Included once for each
// instruction set, inside `namespace awnet::cpu::<isa>` and under that set's target pragma; the compiler
// splits the vectors as it must. AWNET_VECTOR_BITS identifies the set, because the compiler's macros do not
// follow the pragma everywhere (GCC 12).

using Vector = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));
using Bytes = uint8_t __attribute__((vector_size(16)));

constexpr int kWidth = 16;
// Long sequences of float additions lose digits in proportion to their length. Sums over pixels are therefore
// made in blocks: at most kBlock float additions in a row, and a total of the blocks in double (planes) or
// with Kahan's compensation (channels_last). The error is then below (kBlock + 8) 2^-24 sum |x|, whatever the
// number of pixels.
constexpr int64_t kBlock = 64;
// Independent sequences of additions in a plane's block, which hide an addition's latency.
constexpr int kChains = AWNET_VECTOR_BITS / 128;

#define AWNET_INLINE static inline __attribute__((always_inline))

AWNET_INLINE Vector splat(float x) { return Vector{} + x; }

AWNET_INLINE Vector load(const float* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

AWNET_INLINE void store(float* p, Vector v) { __builtin_memcpy(p, &v, sizeof(v)); }

AWNET_INLINE Vector load(const BFloat16* p) {
#if AWNET_VECTOR_BITS == 512
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  Halves h;
  __builtin_memcpy(&h, p, sizeof(h));
  return (Vector)(__builtin_convertvector(h, Words) << 16);
#endif
}

AWNET_INLINE void store(BFloat16* p, Vector v) {
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const Words quiet_nan = (bits >> 16) | 0x40u;
  const Words words = v == v ? rounded : quiet_nan;
#if AWNET_VECTOR_BITS == 512
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)words));
#else
  const Halves h = __builtin_convertvector(words, Halves);
  __builtin_memcpy(p, &h, sizeof(h));
#endif
}

AWNET_INLINE Vector load(const Float16* p) {
#if AWNET_VECTOR_BITS == 512
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif AWNET_VECTOR_BITS == 256
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
  Vector v;
  __builtin_memcpy(&v, &low, sizeof(low));
  __builtin_memcpy((char*)&v + sizeof(low), &high, sizeof(high));
  return v;
#else
  Vector v;
  for (int i = 0; i < kWidth; ++i) v[i] = c10::detail::fp16_ieee_to_fp32_value(p[i].bits);
  return v;
#endif
}

AWNET_INLINE void store(Float16* p, Vector v) {
#if AWNET_VECTOR_BITS == 512
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif AWNET_VECTOR_BITS == 256
  __m256 low, high;
  __builtin_memcpy(&low, &v, sizeof(low));
  __builtin_memcpy(&high, (char*)&v + sizeof(low), sizeof(high));
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; ++i) p[i].bits = c10::detail::fp16_ieee_from_fp32_value(v[i]);
#endif
}

// A ReLU's mask: 1 where y is not <= 0, so that NaN passes.
AWNET_INLINE Vector load(const uint8_t* p) {
#if AWNET_VECTOR_BITS == 512
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif AWNET_VECTOR_BITS == 256
  const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))));
  Vector v;
  __builtin_memcpy(&v, &low, sizeof(low));
  __builtin_memcpy((char*)&v + sizeof(low), &high, sizeof(high));
  return v;
#else
  Bytes b;
  __builtin_memcpy(&b, p, sizeof(b));
  return __builtin_convertvector(__builtin_convertvector(b, Words), Vector);
#endif
}

AWNET_INLINE void store(uint8_t* p, Vector y) {
#if AWNET_VECTOR_BITS == 512
  const __mmask16 passes = _mm512_cmp_ps_mask((__m512)y, _mm512_setzero_ps(), _CMP_NLE_UQ);
  _mm_storeu_si128((__m128i*)p, _mm_maskz_set1_epi8(passes, 1));
#else
  const Words cut = (Words)(y <= 0.0f);
  const Bytes b = __builtin_convertvector(cut + 1u, Bytes);
  __builtin_memcpy(p, &b, sizeof(b));
#endif
}

// One value, for the values after the last full vector.
AWNET_INLINE float load_one(const float* p) { return *p; }
AWNET_INLINE float load_one(const BFloat16* p) { return c10::detail::f32_from_bits(p->bits); }
AWNET_INLINE float load_one(const Float16* p) { return c10::detail::fp16_ieee_to_fp32_value(p->bits); }
AWNET_INLINE float load_one(const uint8_t* p) { return *p; }
AWNET_INLINE void store_one(uint8_t* p, float y) { *p = !(y <= 0.0f); }
AWNET_INLINE void store_one(float* p, float v) { *p = v; }
AWNET_INLINE void store_one(BFloat16* p, float v) { p->bits = c10::detail::round_to_nearest_even(v); }
AWNET_INLINE void store_one(Float16* p, float v) { p->bits = c10::detail::fp16_ieee_from_fp32_value(v); }

// Calls body(offset, read, write) for every vector of [0, n), then for every remaining value. `read` returns
// and `write` takes a Vector or a float.
template <class Body>
AWNET_INLINE void for_values(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    body(
        i, [](auto* p) __attribute__((always_inline)) { return load(p); },
        [](auto* p, Vector v) __attribute__((always_inline)) { store(p, v); });
  }
  for (; i < n; ++i) {
    body(
        i, [](auto* p) __attribute__((always_inline)) { return load_one(p); },
        [](auto* p, float v) __attribute__((always_inline)) { store_one(p, v); });
  }
}

AWNET_INLINE float total_of(Vector v) {
  using Quarter = float __attribute__((vector_size(16)));
  Quarter q[4];
  __builtin_memcpy(q, &v, sizeof(v));
  const Quarter sum = (q[0] + q[1]) + (q[2] + q[3]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// One block's sum over a plane.
struct Sum {
  Vector lanes = {};
  float rest = 0.0f;

  __attribute__((always_inline)) void operator+=(Vector v) { lanes += v; }
  __attribute__((always_inline)) void operator+=(float v) { rest += v; }
  __attribute__((always_inline)) void operator+=(const Sum& other) { lanes += other.lanes; }
  __attribute__((always_inline)) double total() const { return double{total_of(lanes)} + rest; }
};

// totals[s] = the sum over [0, n) of what body(offset, read, sums) adds to sums[s]; `read` as in for_values.
template <int kSums, class Body>
AWNET_INLINE void sum_values(int64_t n, double (&totals)[kSums], Body body) {
  const auto vector = [](auto* p) __attribute__((always_inline)) { return load(p); };
  const auto single = [](auto* p) __attribute__((always_inline)) { return load_one(p); };
  constexpr int64_t block = kBlock * kWidth, step = kChains * kWidth;
  for (int s = 0; s < kSums; ++s) totals[s] = 0.0;
  for (int64_t i = 0; i < n;) {
    const int64_t end = i + block < n ? i + block : n;
    Sum sums[kChains][kSums];
    for (; i + step <= end; i += step) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) body(i + chain * kWidth, vector, sums[chain]);
    }
    for (; i + kWidth <= end; i += kWidth) body(i, vector, sums[0]);
    for (; i < end; ++i) body(i, single, sums[0]);
#pragma GCC unroll 4
    for (int chain = 1; chain < kChains; ++chain) {
      for (int s = 0; s < kSums; ++s) sums[0][s] += sums[chain][s];
    }
    for (int s = 0; s < kSums; ++s) totals[s] += sums[0][s].total();
  }
}

// totals[s] = the sum of what block(first, last, parts) writes to parts[s], over all blocks of a
// channels_last column, by Kahan's compensated addition. Value: Vector or float.
template <int kSums, class Value, class Block>
AWNET_INLINE void sum_blocks(int64_t pixels, Value (&totals)[kSums], Block block) {
  block(0, pixels < kBlock ? pixels : kBlock, totals);
  Value excess[kSums] = {};
  for (int64_t begin = kBlock; begin < pixels; begin += kBlock) {
    Value parts[kSums];
    block(begin, begin + kBlock < pixels ? begin + kBlock : pixels, parts);
    for (int s = 0; s < kSums; ++s) {
      const Value corrected = parts[s] - excess[s], next = totals[s] + corrected;
      const Value rounding = (next - totals[s]) - corrected;
      excess[s] = rounding == rounding ? rounding : Value{};  // an infinite sum has no rounding error
      totals[s] = next;
    }
  }
}

// As torch's ReLU: NaN passes.
AWNET_INLINE Vector rectified(Vector v) { return v <= 0.0f ? Vector{} : v; }
AWNET_INLINE Vector masked(Vector grad, Vector y) { return y <= 0.0f ? Vector{} : grad; }
AWNET_INLINE float rectified(float v) { return v <= 0.0f ? 0.0f : v; }
AWNET_INLINE float masked(float grad, float y) { return y <= 0.0f ? 0.0f : grad; }

// The gradient of the activation's input at value i; `read` as in for_values. kSlope: the gate is a slope.
template <bool kSlope, class T, class Read>
AWNET_INLINE auto passed_grad(const T* grad, Gate<T> gate, int64_t i, Read read) {
  const auto g = read(grad + i);
  if constexpr (kSlope) return g * read(gate.slope + i);
  if (gate.y != nullptr) return masked(g, read(gate.y + i));
  if (gate.mask != nullptr) return masked(g, read(gate.mask + i));
  return g;
}

// e^x, with a relative error of some 2^-23; 0 below -87.3 and infinity above 88.3.
AWNET_INLINE Vector exponential(Vector x) {
  const Vector low = splat(-87.3f), high = splat(88.3f), rounder = splat(12582912.0f);  // 1.5 * 2^23
  const Vector bounded = x < low ? low : x > high ? high : x;
  const Vector shifted = bounded * 1.44269504f + rounder, n = shifted - rounder;  // n = round(x / log(2))
  const Vector r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Vector series = splat(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    series = series * r + term;
  }
  const Words exponent = (Words)shifted - 0x4b400000u + 127u;
  const Vector power = series * (Vector)(exponent << 23);
  return x < low ? Vector{} : x > high ? splat(__builtin_inff()) : power;
}

// z becomes act(z), and slope its derivative there. Not inline: one copy serves every dtype.
static __attribute__((noinline)) void activate(Vector& z, Vector& slope, Activation activation) {
  const Vector one = splat(1.0f);
  if (activation == kSilu) {
    const Vector s = one / (one + exponential(-z));
    slope = s * (one + z * (one - s));
    z = z * s;
  } else if (activation == kGelu) {
    const Vector far = z < 0.0f ? -z : z, density = exponential(z * z * -0.5f);
    // The normal distribution function at -|z|, divided by `density`, as t times a polynomial in t: a fit by
    // Chebyshev polynomials with a relative error of 5e-8 from 0 to 14. So the tails keep their digits.
    const Vector t = one / (one + far * 0.353553391f);
    Vector tail = splat(-0.0300543538f);
    for (const float term : {0.144723050f, -0.248414808f, 0.144257573f, -0.0166995099f, 0.102680214f,
                             0.121239671f, 0.141226866f, 0.141041179f}) {
      tail = tail * t + term;
    }
    tail = tail * t * density;
    const Vector distribution = z < 0.0f ? tail : one - tail;
    slope = distribution + z * density * 0.398942280f;
    z = z * distribution;
  } else {
    slope = z > 0.0f ? one : splat(0.01f);
    z = z * slope;
  }
}

static inline void activate(float& z, float& slope, Activation activation) {
  Vector values = splat(z), slopes;
  activate(values, slopes, activation);
  z = values[0];
  slope = slopes[0];
}

template <class T, bool kResidual, bool kRelu>
AWNET_INLINE void apply_values(T* y, uint8_t* relu_mask, const T* u, const T* r, int64_t n, float scale,
                               float shift) {
  for_values(n, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
    auto v = read(u + i) * scale + shift;
    if (kResidual) v += read(r + i);
    write(y + i, kRelu ? rectified(v) : v);
    if (kRelu && relu_mask != nullptr) write(relu_mask + i, read(y + i));  // of y as it is stored
  });
}

template <class T>
void apply_plane(T* y, uint8_t* relu_mask, const T* u, const T* r, int64_t n, float scale, float shift,
                 bool relu) {
  if (r != nullptr) {
    relu ? apply_values<T, true, true>(y, relu_mask, u, r, n, scale, shift)
         : apply_values<T, true, false>(y, relu_mask, u, r, n, scale, shift);
  } else {
    relu ? apply_values<T, false, true>(y, relu_mask, u, r, n, scale, shift)
         : apply_values<T, false, false>(y, relu_mask, u, r, n, scale, shift);
  }
}

template <class T>
void apply_rows(T* y, uint8_t* relu_mask, const T* u, const T* r, int64_t pixels, int64_t channels,
                const float* scale, const float* shift, bool relu) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t row = pixel * channels;
    for_values(channels, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
      auto v = read(u + row + i) * read(scale + i) + read(shift + i);
      if (r != nullptr) v += read(r + row + i);
      write(y + row + i, relu ? rectified(v) : v);
      if (relu_mask != nullptr) write(relu_mask + row + i, read(y + row + i));
    });
  }
}

template <class T>
void activate_plane(T* y, T* slope, const T* u, const T* r, int64_t n, float scale, float shift,
                    Activation activation) {
  for_values(n, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
    auto v = read(u + i) * scale + shift;
    if (r != nullptr) v += read(r + i);
    decltype(v) by;
    activate(v, by, activation);
    write(y + i, v);
    if (slope != nullptr) write(slope + i, by);
  });
}

template <class T>
void activate_rows(T* y, T* slope, const T* u, const T* r, int64_t pixels, int64_t channels,
                   const float* scale, const float* shift, Activation activation) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t row = pixel * channels;
    for_values(channels, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
      auto v = read(u + row + i) * read(scale + i) + read(shift + i);
      if (r != nullptr) v += read(r + row + i);
      decltype(v) by;
      activate(v, by, activation);
      write(y + row + i, v);
      if (slope != nullptr) write(slope + row + i, by);
    });
  }
}

template <class T>
void statistics_plane(const T* u, int64_t n, float* mean, float* m2) {
  double sum[1], squares[1];
  sum_values(n, sum,
             [=](int64_t i, auto read, Sum* sums) __attribute__((always_inline)) { sums[0] += read(u + i); });
  const float centre = static_cast<float>(sum[0] / static_cast<double>(n));
  sum_values(n, squares, [=](int64_t i, auto read, Sum* sums) __attribute__((always_inline)) {
    const auto d = read(u + i) - centre;
    sums[0] += d * d;
  });
  *mean = centre;
  *m2 = static_cast<float>(squares[0]);
}

template <class T>
void statistics_rows(const T* u, int64_t pixels, int64_t channels, int64_t first, int64_t last, float* mean,
                     float* m2) {
  for_values(last - first, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
    const T* column = u + first + i;
    using Value = decltype(read(column));
    Value sum[1], squares[1];
    sum_blocks(pixels, sum, [=](int64_t from, int64_t to, Value* parts) __attribute__((always_inline)) {
      Value part = {};
      for (int64_t pixel = from; pixel < to; ++pixel) part += read(column + pixel * channels);
      parts[0] = part;
    });
    const Value centre = sum[0] / static_cast<float>(pixels);
    sum_blocks(pixels, squares, [=](int64_t from, int64_t to, Value* parts) __attribute__((always_inline)) {
      Value part = {};
      for (int64_t pixel = from; pixel < to; ++pixel) {
        const Value d = read(column + pixel * channels) - centre;
        part += d * d;
      }
      parts[0] = part;
    });
    write(mean + first + i, centre);
    write(m2 + first + i, squares[0]);
  });
}

template <class T, bool kSlope>
AWNET_INLINE void reduce_plane_by(const T* grad, const T* u, Gate<T> gate, int64_t n, float centre, float* g1,
                                  float* gc) {
  double totals[2];
  sum_values(n, totals, [=](int64_t i, auto read, Sum* sums) __attribute__((always_inline)) {
    const auto g = passed_grad<kSlope>(grad, gate, i, read);
    sums[0] += g;
    sums[1] += g * (read(u + i) - centre);
  });
  *g1 = static_cast<float>(totals[0]);
  *gc = static_cast<float>(totals[1]);
}

template <class T>
void reduce_plane(const T* grad, const T* u, Gate<T> gate, int64_t n, float centre, float* g1, float* gc) {
  gate.slope ? reduce_plane_by<T, true>(grad, u, gate, n, centre, g1, gc)
             : reduce_plane_by<T, false>(grad, u, gate, n, centre, g1, gc);
}

template <class T, bool kSlope>
AWNET_INLINE void reduce_rows_by(const T* grad, const T* u, Gate<T> gate, int64_t pixels, int64_t channels,
                                 int64_t first, int64_t last, const float* centre, float* g1, float* gc) {
  for_values(last - first, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
    const int64_t column = first + i;
    const auto middle = read(centre + column);
    using Value = decltype(read(grad));
    Value sums[2];
    sum_blocks(pixels, sums, [=](int64_t from, int64_t to, Value* parts) __attribute__((always_inline)) {
      Value sum = {}, along = {};
      for (int64_t at = from * channels + column; at < to * channels + column; at += channels) {
        const auto g = passed_grad<kSlope>(grad, gate, at, read);
        sum += g;
        along += g * (read(u + at) - middle);
      }
      parts[0] = sum;
      parts[1] = along;
    });
    write(g1 + column, sums[0]);
    write(gc + column, sums[1]);
  });
}

template <class T>
void reduce_rows(const T* grad, const T* u, Gate<T> gate, int64_t pixels, int64_t channels, int64_t first,
                 int64_t last, const float* centre, float* g1, float* gc) {
  gate.slope ? reduce_rows_by<T, true>(grad, u, gate, pixels, channels, first, last, centre, g1, gc)
             : reduce_rows_by<T, false>(grad, u, gate, pixels, channels, first, last, centre, g1, gc);
}

template <class T, bool kSlope>
AWNET_INLINE void propagate_plane_by(T* d_u, T* d_residual, const T* grad, const T* u, Gate<T> gate,
                                     int64_t n, PropagateCoeffs<float> coeffs) {
  for_values(n, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
    const auto g = passed_grad<kSlope>(grad, gate, i, read);
    auto d = g * coeffs.by_grad;
    if (u != nullptr) d += (read(u + i) - coeffs.centre) * coeffs.by_input + coeffs.constant;
    write(d_u + i, d);
    if (d_residual != nullptr) write(d_residual + i, g);
  });
}

template <class T>
void propagate_plane(T* d_u, T* d_residual, const T* grad, const T* u, Gate<T> gate, int64_t n,
                     PropagateCoeffs<float> coeffs) {
  gate.slope ? propagate_plane_by<T, true>(d_u, d_residual, grad, u, gate, n, coeffs)
             : propagate_plane_by<T, false>(d_u, d_residual, grad, u, gate, n, coeffs);
}

template <class T, bool kSlope>
AWNET_INLINE void propagate_rows_by(T* d_u, T* d_residual, const T* grad, const T* u, Gate<T> gate,
                                    int64_t pixels, int64_t channels, PropagateCoeffs<const float*> coeffs) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t row = pixel * channels;
    for_values(channels, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
      const auto g = passed_grad<kSlope>(grad, gate, row + i, read);
      auto d = g * read(coeffs.by_grad + i);
      if (u != nullptr) {
        d += (read(u + row + i) - read(coeffs.centre + i)) * read(coeffs.by_input + i) +
             read(coeffs.constant + i);
      }
      write(d_u + row + i, d);
      if (d_residual != nullptr) write(d_residual + row + i, g);
    });
  }
}

template <class T>
void propagate_rows(T* d_u, T* d_residual, const T* grad, const T* u, Gate<T> gate, int64_t pixels,
                    int64_t channels, PropagateCoeffs<const float*> coeffs) {
  gate.slope ? propagate_rows_by<T, true>(d_u, d_residual, grad, u, gate, pixels, channels, coeffs)
             : propagate_rows_by<T, false>(d_u, d_residual, grad, u, gate, pixels, channels, coeffs);
}

template <class T>
constexpr Kernels<T> table() {
  return {apply_plane<T>,     apply_rows<T>,   activate_plane<T>, activate_rows<T>,   statistics_plane<T>,
          statistics_rows<T>, reduce_plane<T>, reduce_rows<T>,    propagate_plane<T>, propagate_rows<T>};
}

extern const Kernels<float> float32_kernels = table<float>();
extern const Kernels<BFloat16> bfloat16_kernels = table<BFloat16>();
extern const Kernels<Float16> float16_kernels = table<Float16>();
