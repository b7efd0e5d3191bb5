#pragma once

#include "cuda_runtime.h"

using __half = _Float16;

inline __half __float2half_rn(float value) { return static_cast<_Float16>(value); }
