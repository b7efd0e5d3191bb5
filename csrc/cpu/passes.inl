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

AWNET_INLINE float horizontal_sum(Vector v) {
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
  __attribute__((always_inline)) double total() const { return double{horizontal_sum(lanes)} + rest; }
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
AWNET_INLINE Vector relu(Vector v) { return v <= 0.0f ? Vector{} : v; }
AWNET_INLINE Vector relu_backward(Vector grad, Vector y) { return y <= 0.0f ? Vector{} : grad; }
AWNET_INLINE float relu(float v) { return v <= 0.0f ? 0.0f : v; }
AWNET_INLINE float relu_backward(float grad, float y) { return y <= 0.0f ? 0.0f : grad; }

// The gradient of the activation's input at value i; `read` as in for_values. kSlope: the activation is saved
// as its slope.
template <bool kSlope, class T, class Read>
AWNET_INLINE auto activation_backward(const T* grad, SavedActivation<T> saved, int64_t i, Read read) {
  const auto g = read(grad + i);
  if constexpr (kSlope) return g * read(saved.slope + i);
  if (saved.y != nullptr) return relu_backward(g, read(saved.y + i));
  if (saved.mask != nullptr) return relu_backward(g, read(saved.mask + i));
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

// Writes act(v) to value i of y, and the mask or slope if there is one. kKind: the activation, or kSilu for
// all that have a slope.
template <Activation kKind, class T, class Value, class Read, class Write>
AWNET_INLINE void write_activation(ApplyArgs<T> a, int64_t i, Value v, Read read, Write write) {
  if constexpr (kKind == kSilu) {
    Value slope;
    activate(v, slope, a.activation);
    write(a.y + i, v);
    if (a.slope != nullptr) write(a.slope + i, slope);
  } else {
    write(a.y + i, kKind == kRelu ? relu(v) : v);
    if (kKind == kRelu && a.relu_mask != nullptr)
      write(a.relu_mask + i, read(a.y + i));  // of y as it is stored
  }
}

template <Activation kKind, bool kResidual, class T>
AWNET_INLINE void apply_plane(ApplyArgs<T> a, int64_t plane, int64_t n) {
  const float scale = a.scale[plane], shift = a.shift[plane];
  const int64_t first = plane * n;
  for_values(n, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
    auto v = read(a.u + first + i) * scale + shift;
    if (kResidual) v += read(a.residual + first + i);
    write_activation<kKind>(a, first + i, v, read, write);
  });
}

template <Activation kKind, class T>
AWNET_INLINE void apply_nchw(ApplyArgs<T> a, Extent e) {
  for (int64_t plane = e.first; plane < e.last; ++plane) {
    a.residual != nullptr ? apply_plane<kKind, true>(a, plane, e.pixels)
                          : apply_plane<kKind, false>(a, plane, e.pixels);
  }
}

template <Activation kKind, class T>
AWNET_INLINE void apply_channels_last(ApplyArgs<T> a, Extent e) {
  for (int64_t pixel = 0; pixel < e.pixels; ++pixel) {
    const int64_t row = pixel * e.channels;
    for_values(e.channels, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
      auto v = read(a.u + row + i) * read(a.scale + i) + read(a.shift + i);
      if (a.residual != nullptr) v += read(a.residual + row + i);
      write_activation<kKind>(a, row + i, v, read, write);
    });
  }
}

template <class T>
void statistics_nchw(const StatisticsArgs<T>& a, Extent e) {
  const int64_t n = e.pixels;
  for (int64_t plane = e.first; plane < e.last; ++plane) {
    const T* const u = a.u + plane * n;
    double sum[1], squares[1];
    sum_values(n, sum, [=](int64_t i, auto read, Sum* sums) __attribute__((always_inline)) {
      sums[0] += read(u + i);
    });
    const float center = static_cast<float>(sum[0] / static_cast<double>(n));
    sum_values(n, squares, [=](int64_t i, auto read, Sum* sums) __attribute__((always_inline)) {
      const auto d = read(u + i) - center;
      sums[0] += d * d;
    });
    a.mean[plane] = center;
    a.m2[plane] = static_cast<float>(squares[0]);
  }
}

template <class T>
void statistics_channels_last(const StatisticsArgs<T>& args, Extent e) {
  const StatisticsArgs<T> a = args;
  const int64_t pixels = e.pixels, channels = e.channels, first = e.first;
  for_values(e.last - first, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
    const T* column = a.u + first + i;
    using Value = decltype(read(column));
    Value sum[1], squares[1];
    sum_blocks(pixels, sum, [=](int64_t from, int64_t to, Value* parts) __attribute__((always_inline)) {
      Value part = {};
      for (int64_t pixel = from; pixel < to; ++pixel) part += read(column + pixel * channels);
      parts[0] = part;
    });
    const Value center = sum[0] / static_cast<float>(pixels);
    sum_blocks(pixels, squares, [=](int64_t from, int64_t to, Value* parts) __attribute__((always_inline)) {
      Value part = {};
      for (int64_t pixel = from; pixel < to; ++pixel) {
        const Value d = read(column + pixel * channels) - center;
        part += d * d;
      }
      parts[0] = part;
    });
    write(a.mean + first + i, center);
    write(a.m2 + first + i, squares[0]);
  });
}

template <bool kSlope, class T>
AWNET_INLINE void reduce_nchw(BackwardArgs<T> a, Extent e) {
  for (int64_t plane = e.first; plane < e.last; ++plane) {
    const int64_t first = plane * e.pixels;
    const T *const grad = a.grad + first, *const u = a.u + first;
    const SavedActivation<T> saved = a.activation.from(first);
    const float center = a.center[plane];
    double totals[2];
    sum_values(e.pixels, totals, [=](int64_t i, auto read, Sum* sums) __attribute__((always_inline)) {
      const auto g = activation_backward<kSlope>(grad, saved, i, read);
      sums[0] += g;
      sums[1] += g * (read(u + i) - center);
    });
    a.g1[plane] = static_cast<float>(totals[0]);
    a.gc[plane] = static_cast<float>(totals[1]);
  }
}

template <bool kSlope, class T>
AWNET_INLINE void reduce_channels_last(BackwardArgs<T> a, Extent e) {
  const int64_t channels = e.channels;
  for_values(e.last - e.first, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
    const int64_t column = e.first + i;
    const auto center = read(a.center + column);
    using Value = decltype(read(a.grad));
    Value sums[2];
    sum_blocks(e.pixels, sums, [=](int64_t from, int64_t to, Value* parts) __attribute__((always_inline)) {
      Value sum = {}, products = {};
      for (int64_t j = from * channels + column; j < to * channels + column; j += channels) {
        const auto g = activation_backward<kSlope>(a.grad, a.activation, j, read);
        sum += g;
        products += g * (read(a.u + j) - center);
      }
      parts[0] = sum;
      parts[1] = products;
    });
    write(a.g1 + column, sums[0]);
    write(a.gc + column, sums[1]);
  });
}

template <bool kSlope, class T>
AWNET_INLINE void propagate_nchw(BackwardArgs<T> a, Extent e) {
  for (int64_t plane = e.first; plane < e.last; ++plane) {
    const int64_t first = plane * e.pixels;
    const bool affine = a.by_input != nullptr;
    const float by_grad = a.by_grad[plane], center = affine ? a.center[plane] : 0.0f,
                by_input = affine ? a.by_input[plane] : 0.0f, constant = affine ? a.constant[plane] : 0.0f;
    for_values(e.pixels, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
      const auto g = activation_backward<kSlope>(a.grad, a.activation, first + i, read);
      auto d = g * by_grad;
      if (affine) d += (read(a.u + first + i) - center) * by_input + constant;
      write(a.d_u + first + i, d);
      if (a.d_residual != nullptr) write(a.d_residual + first + i, g);
    });
  }
}

template <bool kSlope, class T>
AWNET_INLINE void propagate_channels_last(BackwardArgs<T> a, Extent e) {
  for (int64_t pixel = 0; pixel < e.pixels; ++pixel) {
    const int64_t row = pixel * e.channels;
    for_values(e.channels, [=](int64_t i, auto read, auto write) __attribute__((always_inline)) {
      const auto g = activation_backward<kSlope>(a.grad, a.activation, row + i, read);
      auto d = g * read(a.by_grad + i);
      if (a.by_input != nullptr) {
        d += (read(a.u + row + i) - read(a.center + i)) * read(a.by_input + i) + read(a.constant + i);
      }
      write(a.d_u + row + i, d);
      if (a.d_residual != nullptr) write(a.d_residual + row + i, g);
    });
  }
}

// A kernel for one of the kinds of activation.
template <class T, auto none, auto relu, auto other>
void for_kind(const ApplyArgs<T>& a, Extent e) {
  a.activation == kNone ? none(a, e) : a.activation == kRelu ? relu(a, e) : other(a, e);
}

// A kernel without a slope, or the one with a slope if there is one.
template <class T, auto without, auto with>
void for_slope(const BackwardArgs<T>& a, Extent e) {
  a.activation.slope != nullptr ? with(a, e) : without(a, e);
}

template <class T>
constexpr Layouts<T> layouts() {
  return {{for_kind<T, apply_nchw<kNone, T>, apply_nchw<kRelu, T>, apply_nchw<kSilu, T>>, statistics_nchw<T>,
           for_slope<T, reduce_nchw<false, T>, reduce_nchw<true, T>>,
           for_slope<T, propagate_nchw<false, T>, propagate_nchw<true, T>>},
          {for_kind<T, apply_channels_last<kNone, T>, apply_channels_last<kRelu, T>,
                    apply_channels_last<kSilu, T>>,
           statistics_channels_last<T>,
           for_slope<T, reduce_channels_last<false, T>, reduce_channels_last<true, T>>,
           for_slope<T, propagate_channels_last<false, T>, propagate_channels_last<true, T>>}};
}

extern const Dtypes kernels = {layouts<float>(), layouts<BFloat16>(), layouts<Float16>()};
