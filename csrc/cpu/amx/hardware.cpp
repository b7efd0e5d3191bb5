// The kernels on AMX and AVX512; empty on other processors' builds.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../target.h"
#include "tiles.h"

AWNET_BEGIN_TARGET("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16", ",prefer-vector-width=512")

namespace awnet::cpu::amx::hardware {
namespace {

struct Tiles {
  // assembly, as the compiler's intrinsics take a tile's number as a literal only
  template <int tile>
  static void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  template <int tile>
  static void load(const Bits* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t{64}), "i"(tile) : "memory");
  }
  template <int tile>  // 16 columns of [16][32]
  static void load_sums(const float* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t{128}), "i"(tile) : "memory");
  }
  template <int sum, int a, int b>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(b), "i"(a), "i"(sum));
  }
  template <int tile>  // 16 columns of [16][32]
  static void store(float* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t{128}), "i"(tile) : "memory");
  }
};

struct Row {
  __m512 low, high;

  static Row zero() { return {_mm512_setzero_ps(), _mm512_setzero_ps()}; }
  static Row load(const float* from) { return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}; }
  static __m512 wide(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Row load(const Bits* from) {
    return {wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))),
            wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 16)))};
  }
  void store(float* to) const {
    _mm512_storeu_ps(to, low);
    _mm512_storeu_ps(to + 16, high);
  }
  void store(Bits* to) const {
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
  Row plus(Row b) const { return {_mm512_add_ps(low, b.low), _mm512_add_ps(high, b.high)}; }
  Row times(Row b) const { return {_mm512_mul_ps(low, b.low), _mm512_mul_ps(high, b.high)}; }
  uint32_t relu_mask() const {  // true of NaN
    const __m512 zero = _mm512_setzero_ps();
    const uint32_t first = _mm512_cmp_ps_mask(low, zero, _CMP_NLE_UQ);
    return first | static_cast<uint32_t>(_mm512_cmp_ps_mask(high, zero, _CMP_NLE_UQ)) << 16;
  }
  Row where(uint32_t bits) const {
    return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), low),
            _mm512_maskz_mov_ps(static_cast<__mmask16>(bits >> 16), high)};
  }
};

struct Words {
  // the 32 values of two rows, alternating: columns 0 to 15, then 16 to 31
  static void interleave(Bits* low, Bits* high, const Bits* even, const Bits* odd) {
    const auto wide = [](const Bits* row, int64_t half) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row) + half));
    };
    const auto both = [&](int64_t half) {
      return _mm512_or_si512(wide(even, half), _mm512_slli_epi32(wide(odd, half), 16));
    };
    _mm512_storeu_si512(low, both(0));
    _mm512_storeu_si512(high, both(1));
  }

  // 16 rows of 16 words of 32 bits
  static void transpose(Bits* to, const Bits* const rows[16]) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i]);
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {  // a quarter of r[4 i + j] is one column of four rows
      const __m512i first = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x44);
      const __m512i second = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xee);
      const __m512i third = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x44);
      const __m512i fourth = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xee);
      _mm512_storeu_si512(to + 32 * j, _mm512_shuffle_i32x4(first, third, 0x88));
      _mm512_storeu_si512(to + 32 * (4 + j), _mm512_shuffle_i32x4(first, third, 0xdd));
      _mm512_storeu_si512(to + 32 * (8 + j), _mm512_shuffle_i32x4(second, fourth, 0x88));
      _mm512_storeu_si512(to + 32 * (12 + j), _mm512_shuffle_i32x4(second, fourth, 0xdd));
    }
  }
};

void configure() {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}

void release() { asm volatile("tilerelease"); }

#include "kernels.inl"

}  // namespace

extern const Kernels kernels = table();

}  // namespace awnet::cpu::amx::hardware

AWNET_END_TARGET
#endif
