// Frozen networks of bfloat16 images on AMX; tiles.h has the layout.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "tiles.h"

namespace awnet::cpu::amx {

// Why this process cannot use AMX: the processor has none, or the kernel refuses it; empty where it can.
const std::string& obstacle();

// Those of the processor, or plain loops. Throws where the processor's cannot be used.
const Kernels& kernels(bool emulate);

// Memory that is kept for the next call when the tensor dies. Its pages are mapped then, which for the tens
// of megabytes that a batch needs takes as long as a layer.
at::Tensor kept_memory(int64_t bytes);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Filters [C_out, C_in, kh, kw] of bfloat16 as the forward and then the backward convolution reads them.
at::Tensor pack_weight(const at::Tensor& weight);

}  // namespace awnet::cpu::amx
