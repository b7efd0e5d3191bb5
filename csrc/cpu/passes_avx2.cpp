// The passes for x86-64 processors with AVX2; empty elsewhere.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#if defined(__x86_64__)
#include <immintrin.h>

#include "passes.h"
#include "target.h"

AWNET_BEGIN_TARGET("avx2,fma,f16c", "")

#define AWNET_VECTOR_BITS 256

namespace awnet::cpu::avx2 {
#include "passes.inl"
}  // namespace awnet::cpu::avx2

AWNET_END_TARGET
#endif
