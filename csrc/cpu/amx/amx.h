// Convolutions of bfloat16 images on AMX tiles, of frozen networks and of single layers; tiles.h has the
// layout.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "../convolution.h"
#include "tiles.h"

namespace awnet::cpu::amx {

// Why this process cannot use AMX: the processor has none, or the kernel refuses it; empty where it can.
const std::string& obstacle();

// Those of the processor, or plain loops. Throws where the processor's cannot be used.
const Kernels& kernels(bool emulate);

// Those that AWNET_AMX (awnet/ops/backends/amx.py) and the processor give single layers; null where there are none.
const Kernels* kernels_for_layers();

// Memory that is kept for the next call when the tensor dies. Its pages are mapped then, which for the tens
// of megabytes that a batch needs takes as long as a layer.
at::Tensor kept_memory(int64_t bytes);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Filters [C_out, C_in, kh, kw] of bfloat16 as the forward and then the backward convolution reads them.
at::Tensor pack_weight(const at::Tensor& weight);

// One layer's convolutions, for training: bfloat16 images in channels_last come in and go out.
enum class Pass { kForward, kInputGradient, kWeightGradient };

// Whether tiles run such a pass (16 images or more, whole blocks of channels, no groups) and were measured to
// win. `grad` is the output's, of the backward passes.
bool takes(Pass pass, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& grad,
           const Window& window, int64_t groups);

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const Window& window);

// The gradients of input and weight; undefined where not asked for. Of `input` the first needs the shape
// alone.
std::pair<at::Tensor, at::Tensor> convolution_backward(const at::Tensor& grad, const at::Tensor& input,
                                                       const at::Tensor& weight, const Window& window,
                                                       bool need_input, bool need_weight);

}  // namespace awnet::cpu::amx
