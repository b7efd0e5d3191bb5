// The kernels on AMX and AVX512; empty on other processors' builds.
#if defined(__x86_64__)
#include <immintrin.h>

#include "tiles.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,prefer-vector-width=512")
#endif

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
  uint32_t not_below_or_zero() const {  // true of NaN
    const __m512 zero = _mm512_setzero_ps();
    const uint32_t first = _mm512_cmp_ps_mask(low, zero, _CMP_NLE_UQ);
    return first | static_cast<uint32_t>(_mm512_cmp_ps_mask(high, zero, _CMP_NLE_UQ)) << 16;
  }
  Row where(uint32_t bits) const {
    return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), low),
            _mm512_maskz_mov_ps(static_cast<__mmask16>(bits >> 16), high)};
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

extern const Kernels kernels = {configure, release, apply, propagate, finish};

}  // namespace awnet::cpu::amx::hardware

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
