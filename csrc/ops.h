// The operators of a backend, by device: library.cpp registers them, layer.cpp calls them. What each computes
// is in awnet/ops/coefficients.py and awnet/ops/backends/base.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "arithmetic.h"

namespace awnet {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The records below have the names and fields of those in awnet/ops/args.py and awnet/ops/coefficients.py.

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

// g1 = sum g and gc = sum g (u - centre), each [B, C].
struct Reduced {
  Tensor g1, gc, centre;
};

// d_u = by_grad g + by_input (u - centre) + constant, each [B, C].
struct Propagation {
  Tensor by_grad;
  MaybeTensor by_input, constant;
};

// For which arguments a gradient is required.
struct Needs {
  bool input = false, weight = false, filter_scale = false, p_clean = false, bn_weight = false,
       bn_bias = false, shift = false, residual = false;

  bool coefficients() const { return filter_scale || p_clean || bn_weight || bn_bias || shift; }
  bool images() const { return input || weight || residual; }
};

// The backward of eval mode: g = grad + other_grad + d_mean / pixels where the activation passed, d_u = g
// scale, d_residual = g, and the sums. With `shift` the activation is that of u scale + shift, without a
// residual.
struct EvalBackwardArgs {
  Tensor grad;
  MaybeTensor other_grad, d_mean, u, relu_mask, slope;
  Tensor scale;
  MaybeTensor shift;
  bool residual = false, sums = false;
  bool centred = false;  // otherwise gc is the gradient of the scale, and there is no centre
};

struct EvalBackwardOutputs {
  Tensor d_u, d_residual;  // undefined if not required, as are the sums
  Reduced sums;
};

// relu_mask is y or a bool mask of where the ReLU passed; slope is the derivative of another activation.
// apply returns y and, with keep_mask, the mask or the slope. Outputs that are not required are empty.
#define AWNET_DECLARE_OPS                                                                                   \
  std::tuple<Tensor, Tensor> statistics(const Tensor& u);                                                   \
  std::tuple<Tensor, Tensor> apply(const Tensor& u, const Tensor& scale, const Tensor& shift,               \
                                   const MaybeTensor& residual, int64_t activation, bool keep_mask,         \
                                   bool in_place);                                                          \
  std::tuple<Tensor, Tensor> reduce(const Tensor& grad, const Tensor& u, const Tensor& centre,              \
                                    const MaybeTensor& relu_mask, const MaybeTensor& slope);                \
  std::tuple<Tensor, Tensor> propagate(const Tensor& grad, const MaybeTensor& u, const MaybeTensor& centre, \
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

namespace cpu {
AWNET_DECLARE_OPS
const char* instruction_set();  // "avx512", "avx2" or "baseline"
}  // namespace cpu

// where the CUDA part is built, see setup.py
namespace cuda {
AWNET_DECLARE_OPS
EvalBackwardOutputs eval_backward(const EvalBackwardArgs& args);
}  // namespace cuda

}  // namespace awnet
