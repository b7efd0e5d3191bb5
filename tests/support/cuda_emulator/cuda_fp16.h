#pragma once

#include <cstring>

#include "cuda_runtime.h"

using __half = _Float16;

inline __half __ushort_as_half(unsigned short bits) {
  __half value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline __half __float2half_rn(float value) { return static_cast<_Float16>(value); }
