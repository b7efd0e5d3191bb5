// A layer below autograd; layer.cpp.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "cpu/convolution.h"
#include "ops.h"

namespace awnet {

using Sizes = at::IntArrayRef;

struct Conv {
  std::array<int64_t, 2> stride{1, 1}, padding{0, 0}, dilation{1, 1};
  int64_t groups = 1;

  cpu::Window window() const { return {stride, padding, dilation}; }  // refers to this record
};

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

// What the backward will need of the forward.
struct Keep {
  bool u = false, mask = false;
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

// y = act(u * scale + shift + residual) for u = conv(input, weight), or u = input without a weight: a layer
// in eval mode, or a layer of a frozen network.
struct AffineArgs {
  Tensor input;
  MaybeTensor weight;
  Conv conv;
  Tensor scale, shift;  // [B, C_out]
  MaybeTensor residual;
  int64_t activation = kNone;
};

struct AffineOutputs {
  Tensor y, u, mask;  // mask: of a ReLU, or the slope of another activation
};

AffineOutputs affine_forward(const AffineArgs& args, Keep keep);

struct AffineBackwardArgs {
  Tensor grad, input;  // input: undefined unless the weight's gradient is required
  std::vector<int64_t> input_shape;
  MaybeTensor weight;
  Conv conv;
  MaybeTensor u, centre;  // see centre_of: for the sums and in train mode
  MaybeTensor relu_mask, slope;
  // only where `fuses`: further gradients of the output and of its mean, and a shift to compute the mask from
  // u
  MaybeTensor other_grad, d_mean, shift;
  Propagation propagation;  // by_grad is the scale; the rest is for train mode
  MaybeTensor onto;         // a gradient of the input, to which this one is added in place
  bool channels_last = false;
  bool need_sums = false, need_input = false, need_weight = false, need_residual = false;
  bool centred = true;  // where `fuses`: whether the sums have a centre
};

struct AffineGradients {
  Tensor input, weight, residual;
  Reduced sums;

  // That of the shift is sums.g1.
  Tensor scale() const;
};

AffineGradients affine_backward(const AffineBackwardArgs& args);

// Whether the backward of eval mode is one kernel on the device of `x`, which also finds the centre.
bool fuses(const Tensor& x);

// A [B, C] centre for the sums of `reduce`.
Tensor centre_of(const Tensor& u);

}  // namespace awnet
