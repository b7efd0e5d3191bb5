#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
  operator float() const { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    bits = value == value ? (word + 0x7fffu + ((word >> 16) & 1u)) >> 16 : 0x7fffu;
  }
};

inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
