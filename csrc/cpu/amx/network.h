// A frozen network on tiles, below autograd.
#pragma once

#include <vector>

#include "../../network.h"

namespace awnet::cpu::amx {

struct NetworkArgs {
  std::vector<int64_t> images;  // [B, C, H, W]
  at::MemoryFormat format;      // of the images' gradient
  std::vector<Step> steps;
  std::vector<std::vector<int64_t>> shapes;  // of the filters
  std::vector<bool> keep_u;                  // where the backward may require gradients of scale or shift
  bool keep_mask;                            // whether there may be a backward
  bool emulate;
};

// For a forward without a backward. Checks all arguments of the network; `packed` holds pack_weight of each
// layer's filters.
NetworkArgs network_args(const Tensor& x, TensorList scales, TensorList shifts, TensorList weights,
                         TensorList packed, Sizes numbers, bool emulate);

struct Outputs {
  std::vector<Tensor> means;  // of the layers with `averaged`
  Tensor saved;               // for the backward
};

Outputs network_forward(const NetworkArgs& args, const Tensor& x, TensorList scales, TensorList shifts,
                        TensorList packed);

// `d_means` has a gradient for each of the forward's means, or an undefined tensor.
NetworkGradients network_backward(const NetworkArgs& args, TensorList packed, const Tensor& saved,
                                  TensorList d_means, const NetworkNeeds& needs);

}  // namespace awnet::cpu::amx
