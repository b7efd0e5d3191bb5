// The layer's operator for callers in C++, below autograd; layer.cpp.
#pragma once

#include <ATen/core/List.h>

#include <string>

#include "ops.h"

namespace awnet {

using Sizes = at::IntArrayRef;
// y, u, mask, mean, m2, batch_mean, batch_var, n
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// of input, weight, filter_scale, p_clean, bn_weight, bn_bias, residual
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

at::MemoryFormat layout_of(const Tensor& x);

Outputs layer_forward(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& filter_scale,
                      const MaybeTensor& p_clean, const MaybeTensor& bn_weight, const MaybeTensor& bn_bias,
                      const MaybeTensor& residual, const MaybeTensor& running_mean,
                      const MaybeTensor& running_var, const MaybeTensor& is_clean, bool training, double eps,
                      bool relu, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                      std::string process_group, bool keep_u, bool keep_mask);

Gradients layer_backward(const Tensor& grad_in, const MaybeTensor& input, const MaybeTensor& weight,
                         const MaybeTensor& filter_scale, const MaybeTensor& p_clean,
                         const MaybeTensor& bn_weight, const MaybeTensor& bn_bias,
                         const MaybeTensor& residual, const MaybeTensor& running_mean,
                         const MaybeTensor& running_var, const MaybeTensor& is_clean, bool training,
                         double eps, bool relu, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                         std::string process_group, const MaybeTensor& u_in, const MaybeTensor& gate,
                         const Tensor& mean, const Tensor& m2, const Tensor& batch_mean,
                         const Tensor& batch_var, const Tensor& n, Sizes input_shape, bool channels_last,
                         c10::List<bool> needs);

}  // namespace awnet
