// The passes for x86-64 processors with AVX512; empty elsewhere.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#if defined(__x86_64__)
#include <immintrin.h>

#include "passes.h"
#include "target.h"

AWNET_BEGIN_TARGET("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c", ",prefer-vector-width=512")

#define AWNET_VECTOR_BITS 512

namespace awnet::cpu::avx512 {
// clang-format off: each needs those before it
#include "passes.inl"
#include "convolution.inl"
#include "winograd.inl"
// clang-format on

extern const ConvolutionKernels convolution = {
    {convolve_rows<1>, convolve_rows<2>, convolve_rows<3>, convolve_rows<4>, convolve_rows<5>,
     convolve_rows<6>, convolve_rows<7>, convolve_rows<8>},
    winograd,
    winograd_input_transform,
    winograd_filter_transform,
    propagate,
    scatter,
    every_second,
    interleave};
}  // namespace awnet::cpu::avx512

AWNET_END_TARGET
#endif
