// Convolutions of bfloat16 images on AMX tiles, of frozen networks and of single layers; tiles.h has the
// layout.
#pragma once

#include "../../ops.h"
#include "tiles.h"

namespace awnet::cpu::amx {

// Those of the processor, or plain loops. Throws if the processor's cannot be used.
const Kernels& kernels(bool emulate);

// The kernels for single layers that AWNET_AMX selects (awnet/ops/backends/amx.py); null if there are none.
const Kernels* kernels_for_layers();

// Bytes from a pool, to which they return with the tensor. Mapping the pages of the tens of megabytes that a
// batch needs takes as long as a layer; a pool's pages are mapped already.
Tensor pooled_memory(int64_t bytes);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// bfloat16 filters [C_out, C_in, kh, kw] in the order that the forward convolution reads, then in that of the
// backward.
Tensor pack_weight(const Tensor& weight);

// The operations per second of tile products on all threads together, measured for `seconds`.
double peak(double seconds);

// The convolutions of single layers, for training: from and to bfloat16 channels_last images.
enum class Pass { kForward, kInputGradient, kWeightGradient };

// Whether tiles support such a pass (16 images or more, whole blocks of channels, no groups) and were
// measured to be faster. `grad` is the output's, for the backward passes.
bool takes(Pass pass, const Tensor& input, const Tensor& weight, const Tensor& grad, const Conv& conv);

Tensor convolution(const Tensor& input, const Tensor& weight, const Conv& conv);

// The gradients of input and weight; undefined where not required. The first needs only the shape of `input`.
std::pair<Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                               const Conv& conv, bool need_input, bool need_weight);

}  // namespace awnet::cpu::amx
