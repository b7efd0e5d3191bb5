// The operators of a backend, by device: library.cpp registers them, layer.cpp calls them. What each computes
// is in awnet/ops/coefficients.py and awnet/ops/backends/base.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arithmetic.h"

namespace awnet {

using at::Tensor;
using at::TensorList;
using MaybeTensor = std::optional<Tensor>;
using Sizes = at::IntArrayRef;

// The records below have the names and fields of those in awnet/ops/args.py and awnet/ops/coefficients.py.

struct Conv {
  std::array<int64_t, 2> stride{1, 1}, padding{0, 0}, dilation{1, 1};
  int64_t groups = 1;
};

// Per-sample inputs of the coefficients, float32 and contiguous (is_clean: bool).
struct Mix {
  MaybeTensor filter_scale;  // [B, C]
  MaybeTensor p_clean;       // [B]
  MaybeTensor is_clean;      // [B]
};

// A batch norm of 1 or 2 branches, float32 and contiguous; in train mode with the statistics of the batch.
struct MixNorm {
  Tensor weight, bias;  // [K, C]
  Tensor mean, var;     // [S, C]
  double eps = 1e-5;
  bool training = false;
  std::string process_group;
};

struct SampleStats {
  Tensor mean, m2;  // [B, C] of u
  int64_t hw = 0;
};

// g1 = sum g and gc = sum g (u - center), each [B, C].
struct Reduced {
  Tensor g1, gc, center;
};

// d_u = by_grad g + by_input (u - center) + constant, each [B, C].
struct Propagation {
  Tensor by_grad;
  MaybeTensor by_input, constant;
};

// What the backward will need of the forward.
struct Keep {
  bool u = false, mask = false;
};

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

struct AffineBackwardArgs {
  Tensor grad, input;  // input: undefined unless the weight's gradient is required
  std::vector<int64_t> input_shape;
  MaybeTensor weight;
  Conv conv;
  MaybeTensor u, center;  // see center_of: for the sums and in train mode
  MaybeTensor relu_mask, slope;
  // only where `fuses`: gradients of the output and of its mean to add to grad, and the shift, with which the
  // mask is computed from u
  MaybeTensor other_grad, d_mean, shift;
  Propagation propagation;  // by_grad is the scale; the rest is for train mode
  MaybeTensor add_to;       // a gradient of the input, to which this one is added in place
  bool channels_last = false;
  bool need_sums = false, need_input = false, need_weight = false, need_residual = false;
  bool centered = true;  // where `fuses`: whether the sums have a center
};

// For which arguments a gradient is required.
struct Needs {
  bool input = false, weight = false, filter_scale = false, p_clean = false, bn_weight = false,
       bn_bias = false, shift = false, residual = false;

  bool coefficients() const { return filter_scale || p_clean || bn_weight || bn_bias || shift; }
  bool images() const { return input || weight || residual; }
};

// The backward of eval mode: d = grad + other_grad + d_mean / pixels, g the gradient of the activation's
// input, d_u = g scale, d_residual = g, and the sums. With `shift` the ReLU's mask is computed from
// u scale + shift.
struct EvalBackwardArgs {
  Tensor grad;
  MaybeTensor other_grad, d_mean, u, relu_mask, slope;
  Tensor scale;
  MaybeTensor shift;
  bool residual = false, sums = false;
  bool centered = false;  // otherwise gc is the gradient of the scale, and there is no center
};

struct EvalBackwardOutputs {
  Tensor d_u, d_residual;  // undefined if not required, as are the sums
  Reduced sums;
};

// relu_mask is y or a bool mask, true where y is not <= 0; slope is the derivative of another activation.
// apply returns y and, with keep_mask, the mask or the slope. Outputs that are not required are empty.
#define AWNET_DECLARE_OPS                                                                                   \
  std::tuple<Tensor, Tensor> statistics(const Tensor& u);                                                   \
  std::tuple<Tensor, Tensor> apply(const Tensor& u, const Tensor& scale, const Tensor& shift,               \
                                   const MaybeTensor& residual, int64_t activation, bool keep_mask,         \
                                   bool in_place);                                                          \
  std::tuple<Tensor, Tensor> reduce(const Tensor& grad, const Tensor& u, const Tensor& center,              \
                                    const MaybeTensor& relu_mask, const MaybeTensor& slope);                \
  std::tuple<Tensor, Tensor> propagate(const Tensor& grad, const MaybeTensor& u, const MaybeTensor& center, \
                                       const MaybeTensor& relu_mask, const Propagation& propagation,        \
                                       bool residual, const MaybeTensor& slope);                            \
  std::tuple<Tensor, Tensor> eval_coefficients(const Mix& mix, const MixNorm& norm, int64_t batch);         \
  std::tuple<Tensor, Tensor, Tensor, Tensor> eval_gradients(const Reduced& sums, const Mix& mix,            \
                                                            const MixNorm& norm, const Needs& needs);       \
  std::tuple<Tensor, Tensor, Tensor> batch_statistics(const SampleStats& stats, const Mix& mix,             \
                                                      int64_t stat_rows);                                   \
  std::tuple<Tensor, Tensor> train_coefficients(const Mix& mix, const MixNorm& norm, int64_t batch);        \
  std::tuple<Tensor, Tensor, Tensor> train_sums(const Reduced& sums, const Mix& mix, const MixNorm& norm);  \
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_gradients(                               \
      const Reduced& sums, const SampleStats& stats, const Mix& mix, const MixNorm& norm, const Tensor& n,  \
      bool need_filter_scale, const MaybeTensor& through);

#define AWNET_FOR_EACH_OP(use)                                                                     \
  use(statistics) use(apply) use(reduce) use(propagate) use(eval_coefficients) use(eval_gradients) \
      use(batch_statistics) use(train_coefficients) use(train_sums) use(train_gradients)

namespace cpu {
AWNET_DECLARE_OPS
}

// where the CUDA part is built, see setup.py
namespace cuda {
AWNET_DECLARE_OPS
EvalBackwardOutputs eval_backward(const EvalBackwardArgs& args);
}  // namespace cuda

}  // namespace awnet
