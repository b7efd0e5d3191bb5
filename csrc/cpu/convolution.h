// A direct convolution of float32 NCHW images on CPUs with AVX512, with the layer's passes around it. It is
// for few channels, where the library's spends its time on changing the layout of images and weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "../ops.h"

namespace awnet::cpu {

using Sizes = at::IntArrayRef;

struct Window {
  Sizes stride, padding, dilation;
};

// Whether it supports such images, weights and sizes: within the limits where it was measured to be faster,
// and where its packed images are small. Everything else is left to the library.
bool convolves(const at::Tensor& input, const at::Tensor& weight, const Window& window, int64_t groups);
// The same for `convolve_back`, which turns `grad` into the gradient of an input of `input_shape`.
bool convolves_back(Sizes input_shape, const at::Tensor& grad, const at::Tensor& weight, const Window& window,
                    int64_t groups);

// y = act(u * scale + shift + residual) for u = conv(input, weight); u, empty without keep_u; the mask or
// slope.
std::tuple<at::Tensor, at::Tensor, at::Tensor> convolve_apply(
    const at::Tensor& input, const at::Tensor& weight, const Window& window, const at::Tensor& scale,
    const at::Tensor& shift, const std::optional<at::Tensor>& residual, int64_t activation, bool keep_u,
    bool keep_mask);

// u = conv(input, weight), and its mean and m2 as `statistics` gives them.
std::tuple<at::Tensor, at::Tensor, at::Tensor> convolve_statistics(const at::Tensor& input,
                                                                   const at::Tensor& weight,
                                                                   const Window& window);

struct BackArgs {
  at::Tensor grad;
  std::optional<at::Tensor> u, centre, relu_mask;
  Propagation propagation;
  at::Tensor weight;
  Sizes input_shape;
  Window window;
  std::optional<at::Tensor> slope;
  std::optional<at::Tensor> onto;  // a contiguous tensor to which the input's gradient is added in place
  bool need_sums = false, need_residual = false, need_d_u = false;
};

struct Back {
  at::Tensor d_input, d_residual, d_u, g1, gc;  // empty where not required
};

// `reduce` (if the sums are required) and `propagate`, whose d_u goes straight into the convolution that
// gives the input's gradient. d_u is written to memory only if it is required.
Back convolve_back(const BackArgs& args);

}  // namespace awnet::cpu
