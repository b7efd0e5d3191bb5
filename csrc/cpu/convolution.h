// A direct convolution of float32 NCHW images on the CPU with the layer's passes around it, for few channels,
// where a library's loses its time in bringing images and weights into its own layouts. AVX512 alone.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace awnet::cpu {

using Sizes = at::IntArrayRef;

struct Window {
  Sizes stride, padding, dilation;
};

// Whether it takes such images, weights and sizes: within the limits where it was measured to win, and where
// its packed images are small. Everything else is the library's.
bool convolves(const at::Tensor& input, const at::Tensor& weight, const Window& window, int64_t groups);
// The same for `convolve_back`, which turns `grad` into the gradient of an input of `input_shape`.
bool convolves_back(Sizes input_shape, const at::Tensor& grad, const at::Tensor& weight, const Window& window,
                    int64_t groups);

// y = act(u * scale + shift + residual) for u = conv(input, weight); u, empty without keep_u; the mask.
std::tuple<at::Tensor, at::Tensor, at::Tensor> convolve_apply(const at::Tensor& input,
                                                              const at::Tensor& weight, const Window& window,
                                                              const at::Tensor& scale,
                                                              const at::Tensor& shift,
                                                              const std::optional<at::Tensor>& residual,
                                                              bool relu, bool keep_u, bool keep_mask);

// u = conv(input, weight), and its mean and m2 as `statistics` gives them.
std::tuple<at::Tensor, at::Tensor, at::Tensor> convolve_statistics(const at::Tensor& input,
                                                                   const at::Tensor& weight,
                                                                   const Window& window);

struct Back {
  at::Tensor d_input, d_residual, d_u, g1, gc;  // empty where not asked for
};

// The input's gradient of such a layer: `reduce` (where sums are asked for, around `centre`) and `propagate`,
// whose d_u goes straight into the convolution; it is written out only where it is asked for. The input's
// gradient is added to `onto`, in place, where there is such a tensor.
Back convolve_back(const at::Tensor& grad, const std::optional<at::Tensor>& u,
                   const std::optional<at::Tensor>& centre, const std::optional<at::Tensor>& gate,
                   const at::Tensor& by_grad, const std::optional<at::Tensor>& by_input,
                   const std::optional<at::Tensor>& constant, const at::Tensor& weight, Sizes input_shape,
                   const Window& window, bool sums, bool residual, bool keep_d_u,
                   const std::optional<at::Tensor>& onto = {});

}  // namespace awnet::cpu
