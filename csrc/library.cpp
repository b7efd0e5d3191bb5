// Registers the operators with torch, once for all devices.
#include <torch/library.h>

#include "cpu/convolution.h"
#include "ops.h"

TORCH_LIBRARY_FRAGMENT(awnet, m) {
  m.def("statistics(Tensor u) -> (Tensor mean, Tensor m2)");
  m.def(
      "apply(Tensor u, Tensor scale, Tensor shift, Tensor? residual, bool relu, bool keep_mask) -> (Tensor "
      "y, "
      "Tensor mask)");
  m.def("reduce(Tensor grad, Tensor u, Tensor centre, Tensor? gate) -> (Tensor g1, Tensor gc)");
  m.def(
      "propagate(Tensor grad, Tensor? u, Tensor? centre, Tensor? gate, Tensor by_grad, Tensor? by_input, "
      "Tensor? constant, bool residual) -> (Tensor d_u, Tensor d_residual)");
  m.def(
      "testing_coefficients(Tensor? omega, Tensor weight, Tensor bias, Tensor mean, Tensor var, Tensor? "
      "p_clean, "
      "float eps, int batch) -> (Tensor scale, Tensor shift)");
  m.def(
      "testing_gradients(Tensor g1, Tensor gc, Tensor centre, Tensor? omega, Tensor weight, Tensor bias, "
      "Tensor mean, Tensor var, Tensor? p_clean, float eps, bool[4] needs) -> (Tensor d_omega, Tensor d_p, "
      "Tensor d_weight, Tensor d_bias)");
  m.def(
      "batch_statistics(Tensor mean, Tensor m2, int hw, Tensor? omega, Tensor? is_clean, int rows) -> "
      "(Tensor batch_mean, Tensor batch_var, Tensor n)");
  m.def(
      "training_coefficients(Tensor? omega, Tensor weight, Tensor bias, Tensor batch_mean, Tensor batch_var, "
      "Tensor? is_clean, float eps, int batch) -> (Tensor scale, Tensor shift)");
  m.def(
      "training_sums(Tensor g1, Tensor gc, Tensor mean, Tensor? omega, Tensor weight, Tensor batch_mean, "
      "Tensor batch_var, Tensor? is_clean, float eps) -> (Tensor d_weight, Tensor d_bias, Tensor through)");
  m.def(
      "training_gradients(Tensor g1, Tensor gc, Tensor mean, Tensor m2, int hw, Tensor? omega, Tensor "
      "weight, Tensor batch_mean, Tensor batch_var, Tensor n, Tensor? is_clean, float eps, bool need_omega, "
      "Tensor? through) -> (Tensor d_omega, Tensor d_weight, Tensor d_bias, Tensor by_grad, Tensor by_input, "
      "Tensor constant)");
  m.def(
      "convolves(Tensor input, Tensor weight, int groups, int[2] stride=1, int[2] padding=0, int[2] "
      "dilation=1) "
      "-> bool");
  m.def(
      "convolve_apply(Tensor input, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, bool relu, "
      "int[2] stride, int[2] padding, int[2] dilation, bool keep_u, bool keep_mask) -> (Tensor y, Tensor u, "
      "Tensor mask)");
  m.def(
      "convolve_back(Tensor grad, Tensor? u, Tensor? centre, Tensor? gate, Tensor scale, Tensor weight, "
      "int[] "
      "input_shape, int[2] stride, int[2] padding, int[2] dilation, bool residual) -> (Tensor d_input, "
      "Tensor "
      "d_residual, Tensor g1, Tensor gc)");
}

#define AWNET_IMPLEMENT(space)                                    \
  m.impl("statistics", &space::statistics);                       \
  m.impl("apply", &not_in_place<&space::apply>);                  \
  m.impl("reduce", &space::reduce);                               \
  m.impl("propagate", &space::propagate);                         \
  m.impl("testing_coefficients", &space::testing_coefficients);   \
  m.impl("testing_gradients", &space::testing_gradients);         \
  m.impl("batch_statistics", &space::batch_statistics);           \
  m.impl("training_coefficients", &space::training_coefficients); \
  m.impl("training_sums", &space::training_sums);                 \
  m.impl("training_gradients", &space::training_gradients);

namespace {
using awnet::MaybeTensor, at::Tensor;

// u may be overwritten where the layer has just made it, never where a caller brings it
template <auto apply>
std::tuple<Tensor, Tensor> not_in_place(const Tensor& u, const Tensor& scale, const Tensor& shift,
                                        const MaybeTensor& residual, bool relu, bool keep_mask) {
  return apply(u, scale, shift, residual, relu, keep_mask, false);
}

using awnet::cpu::Sizes;

bool convolves(const Tensor& input, const Tensor& weight, int64_t groups, Sizes stride, Sizes padding,
               Sizes dilation) {
  return awnet::cpu::convolves(input, weight, {stride, padding, dilation}, groups);
}

std::tuple<Tensor, Tensor, Tensor> convolve_apply(const Tensor& input, const Tensor& weight,
                                                  const Tensor& scale, const Tensor& shift,
                                                  const MaybeTensor& residual, bool relu, Sizes stride,
                                                  Sizes padding, Sizes dilation, bool keep_u,
                                                  bool keep_mask) {
  return awnet::cpu::convolve_apply(input, weight, {stride, padding, dilation}, scale, shift, residual, relu,
                                    keep_u, keep_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> convolve_back(const Tensor& grad, const MaybeTensor& u,
                                                         const MaybeTensor& centre, const MaybeTensor& gate,
                                                         const Tensor& scale, const Tensor& weight,
                                                         Sizes input_shape, Sizes stride, Sizes padding,
                                                         Sizes dilation, bool residual) {
  const auto back = awnet::cpu::convolve_back(grad, u, centre, gate, scale, {}, {}, weight, input_shape,
                                              {stride, padding, dilation}, u.has_value(), residual, false);
  return {back.d_input, back.d_residual, back.g1, back.gc};
}
}  // namespace

TORCH_LIBRARY_IMPL(awnet, CPU, m) {
  AWNET_IMPLEMENT(awnet::cpu)
  m.impl("convolves", &convolves);
  m.impl("convolve_apply", &convolve_apply);
  m.impl("convolve_back", &convolve_back);
}
#if defined(AWNET_CUDA)
TORCH_LIBRARY_IMPL(awnet, CUDA, m) { AWNET_IMPLEMENT(awnet::cuda) }
#endif
