// A frozen network on tiles, below autograd.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../../network.h"

namespace awnet::cpu::amx {

struct NetworkArgs {
  std::vector<int64_t> images;               // [B, C, H, W]
  std::vector<std::vector<int64_t>> shapes;  // of the filters
  std::vector<Step> steps;
  std::vector<bool> keep_u;  // for which layers the backward may require gradients of scale or shift
  bool keep_mask;            // whether there may be a backward
  bool emulate;
};

struct Outputs {
  std::vector<at::Tensor> means;  // of the layers with `averaged`
  at::Tensor saved;               // for the backward
};

// `packed` holds pack_weight of each layer's filters.
Outputs network_forward(const NetworkArgs& args, const at::Tensor& x, at::TensorList scales,
                        at::TensorList shifts, at::TensorList packed);

// `d_means` has a gradient for each of the forward's means, or an undefined tensor.
NetworkGradients network_backward(const NetworkArgs& args, at::TensorList packed, const at::Tensor& saved,
                                  at::TensorList d_means, const NetworkNeeds& needs, at::MemoryFormat format);

std::vector<std::vector<int64_t>> shapes_of(at::TensorList weights);

}  // namespace awnet::cpu::amx
