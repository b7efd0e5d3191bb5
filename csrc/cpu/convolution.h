// A direct convolution of float32 NCHW images on CPUs with AVX512, with the layer's passes around it. It is
// for few channels, where the library's spends its time on changing the layout of images and weights.
#pragma once

#include <tuple>

#include "../ops.h"

namespace awnet::cpu {

// Whether it supports such images, weights and sizes: within the limits where it was measured to be faster,
// and where its packed images are small. Everything else is left to the library.
bool convolves(const Tensor& input, const Tensor& weight, const Conv& conv);
// The same for `convolve_backward`, which turns `grad` into the gradient of an input of `input_shape`.
bool convolves_backward(Sizes input_shape, const Tensor& grad, const Tensor& weight, const Conv& conv);

// As affine_forward in layer.h.
std::tuple<Tensor, Tensor, Tensor> convolve_apply(const AffineArgs& args, Keep keep);

// u = conv(input, weight), and its mean and m2 as `statistics` gives them.
std::tuple<Tensor, Tensor, Tensor> convolve_statistics(const Tensor& input, const Tensor& weight,
                                                       const Conv& conv);

// The gradients of input and residual, d_u and the sums: `reduce` and `propagate`, whose d_u is the input of
// the convolution that gives the input's gradient. What is not required is empty; d_u is written to memory
// only where the weight's gradient is required. `add_to` must be contiguous.
std::tuple<Tensor, Tensor, Tensor, Reduced> convolve_backward(const AffineBackwardArgs& args);

}  // namespace awnet::cpu
