// A layer below autograd; layer.cpp.
#pragma once

#include <vector>

#include "ops.h"

namespace awnet {

// One layer call, as in awnet/ops/args.py.
struct LayerArgs {
  Tensor input;  // in a backward undefined unless the weight's gradient is required
  MaybeTensor weight;
  Conv conv;
  Mix mix;
  std::optional<MixNorm> norm;
  MaybeTensor shift;  // [B, C_out], only without a norm
  MaybeTensor residual;
  int64_t activation = kNone;
};

struct LayerOutputs {
  Tensor y, u, mask, mean, m2, batch_mean, batch_var, n;
};

struct LayerBackwardArgs {
  Tensor grad;
  LayerArgs args;  // in train mode its norm has the statistics of the batch
  std::vector<int64_t> input_shape;
  MaybeTensor u, relu_mask, slope;
  Tensor mean, m2, n;  // of a forward in train mode
  bool channels_last = false;
  Needs needs;
};

// Empty where not required.
struct LayerGradients {
  Tensor input, weight, filter_scale, p_clean, bn_weight, bn_bias, shift, residual;
};

at::MemoryFormat layout_of(const Tensor& x);

LayerOutputs layer_forward(const LayerArgs& args, Keep keep);
LayerGradients layer_backward(const LayerBackwardArgs& args);

// y, u and the mask or slope; empty where not kept, or where u is the input.
std::tuple<Tensor, Tensor, Tensor> affine_forward(const AffineArgs& args, Keep keep);

// The gradients of input, weight and residual, and the sums.
std::tuple<Tensor, Tensor, Tensor, Reduced> affine_backward(AffineBackwardArgs args);

// The gradient of the scale; that of the shift is g1.
Tensor scale_gradient(const Reduced& sums);

// Whether the backward of eval mode is one kernel on the device of `x`, which also chooses the center.
bool fuses(const Tensor& x);

// A [B, C] center for the sums of `reduce`.
Tensor center_of(const Tensor& u);

}  // namespace awnet
