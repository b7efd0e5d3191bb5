// Registers the operators with torch, once for all devices.
#include <torch/library.h>

#include "cpu/convolution.h"
#include "layer.h"
#include "ops.h"
#include "stack.h"
#include "tensors.h"

TORCH_LIBRARY_FRAGMENT(awnet, m) {
  m.def("statistics(Tensor u) -> (Tensor mean, Tensor m2)");
  m.def(
      "apply(Tensor u, Tensor scale, Tensor shift, Tensor? residual, int activation, bool keep_mask) -> "
      "(Tensor y, Tensor mask)");
  m.def(
      "reduce(Tensor grad, Tensor u, Tensor center, Tensor? relu_mask, Tensor? slope=None) -> (Tensor g1, "
      "Tensor gc)");
  m.def(
      "propagate(Tensor grad, Tensor? u, Tensor? center, Tensor? relu_mask, Tensor by_grad, Tensor? "
      "by_input, Tensor? constant, bool residual, Tensor? slope=None) -> (Tensor d_u, Tensor d_residual)");
  m.def(
      "eval_coefficients(Tensor? filter_scale, Tensor? p_clean, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor var, float eps, int batch) -> (Tensor scale, Tensor shift)");
  m.def(
      "eval_gradients(Tensor g1, Tensor gc, Tensor center, Tensor? filter_scale, Tensor? p_clean, Tensor "
      "weight, Tensor bias, Tensor mean, Tensor var, float eps, bool[4] needs) -> (Tensor d_filter_scale, "
      "Tensor d_p_clean, Tensor d_weight, Tensor d_bias)");
  m.def(
      "batch_statistics(Tensor mean, Tensor m2, int hw, Tensor? filter_scale, Tensor? is_clean, int "
      "stat_rows) -> (Tensor batch_mean, Tensor batch_var, Tensor n)");
  m.def(
      "train_coefficients(Tensor? filter_scale, Tensor? is_clean, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor var, float eps, int batch) -> (Tensor scale, Tensor shift)");
  m.def(
      "train_sums(Tensor g1, Tensor gc, Tensor center, Tensor? filter_scale, Tensor? is_clean, Tensor "
      "weight, Tensor bias, Tensor mean, Tensor var, float eps) -> (Tensor d_weight, Tensor d_bias, Tensor "
      "through)");
  m.def(
      "train_gradients(Tensor g1, Tensor gc, Tensor center, Tensor mean, Tensor m2, int hw, Tensor? "
      "filter_scale, Tensor? is_clean, Tensor weight, Tensor bias, Tensor batch_mean, Tensor batch_var, "
      "float eps, Tensor n, bool need_filter_scale, Tensor? through) -> (Tensor d_filter_scale, Tensor "
      "d_weight, Tensor d_bias, Tensor by_grad, Tensor by_input, Tensor constant)");
  m.def(
      "convolves(Tensor input, Tensor weight, int groups, int[2] stride=1, int[2] padding=0, int[2] "
      "dilation=1) -> bool");
  m.def(
      "convolve_apply(Tensor input, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, int "
      "activation, int[2] stride, int[2] padding, int[2] dilation, bool keep_u, bool keep_mask) -> (Tensor "
      "y, Tensor u, Tensor mask)");
  m.def(
      "convolve_back(Tensor grad, Tensor? u, Tensor? center, Tensor? relu_mask, Tensor scale, Tensor "
      "weight, int[] input_shape, int[2] stride, int[2] padding, int[2] dilation, bool residual, Tensor? "
      "slope=None) -> (Tensor d_input, Tensor d_residual, Tensor g1, Tensor gc)");
}

namespace awnet {
namespace {

// The layers let `apply` overwrite u, which they computed; a caller's u must stay as it is.
template <auto apply>
std::tuple<Tensor, Tensor> apply_out_of_place(const Tensor& u, const Tensor& scale, const Tensor& shift,
                                              const MaybeTensor& residual, int64_t activation,
                                              bool keep_mask) {
  return apply(u, scale, shift, residual, activation, keep_mask, false);
}

template <auto eval_gradients>
auto required_gradients(const Reduced& sums, const Mix& mix, const MixNorm& norm,
                        const c10::List<bool>& needs) {
  Needs required;
  required.filter_scale = needs[0];
  required.p_clean = needs[1];
  required.bn_weight = needs[2];
  required.bn_bias = needs[3];
  return eval_gradients(sums, mix, norm, required);
}

bool convolves(const Tensor& input, const Tensor& weight, int64_t groups, Conv conv) {
  conv.groups = groups;
  return cpu::convolves(input, weight, conv);
}

std::tuple<Tensor, Tensor, Tensor> convolve_apply(const Tensor& input, const Tensor& weight,
                                                  const Tensor& scale, const Tensor& shift,
                                                  const MaybeTensor& residual, int64_t activation,
                                                  const Conv& conv, bool keep_u, bool keep_mask) {
  return cpu::convolve_apply({input, weight, conv, scale, shift, residual, activation}, {keep_u, keep_mask});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> convolve_back(
    const Tensor& grad, const MaybeTensor& u, const MaybeTensor& center, const MaybeTensor& relu_mask,
    const Tensor& scale, const Tensor& weight, const std::vector<int64_t>& input_shape, const Conv& conv,
    bool residual, const MaybeTensor& slope) {
  AffineBackwardArgs args{grad, {}, input_shape, weight, conv, u, center, relu_mask, slope};
  args.propagation.by_grad = scale;
  args.need_sums = u.has_value();
  args.need_residual = residual;
  const auto [d_input, d_residual, d_u, sums] = cpu::convolve_backward(args);
  return {d_input, d_residual, sums.g1, sums.gc};
}

#define AWNET_IMPLEMENT(space)                                                                            \
  m.impl("statistics", boxed_function<&space::statistics>());                                             \
  m.impl("apply", boxed_function<&apply_out_of_place<&space::apply>>());                                  \
  m.impl("reduce", boxed_function<&space::reduce>());                                                     \
  m.impl("propagate", boxed_function<&space::propagate>());                                               \
  m.impl("eval_coefficients", boxed_function<&space::eval_coefficients, &Mix::p_clean>());                \
  m.impl("eval_gradients", boxed_function<&required_gradients<&space::eval_gradients>, &Mix::p_clean>()); \
  m.impl("batch_statistics", boxed_function<&space::batch_statistics, &Mix::is_clean>());                 \
  m.impl("train_coefficients", boxed_function<&space::train_coefficients, &Mix::is_clean>());             \
  m.impl("train_sums", boxed_function<&space::train_sums, &Mix::is_clean>());                             \
  m.impl("train_gradients", boxed_function<&space::train_gradients, &Mix::is_clean>());

}  // namespace

TORCH_LIBRARY_IMPL(awnet, CPU, m) {
  AWNET_IMPLEMENT(cpu)
  m.impl("convolves", boxed_function<&convolves>());
  m.impl("convolve_apply", boxed_function<&convolve_apply>());
  m.impl("convolve_back", boxed_function<&convolve_back>());
}

#if defined(AWNET_CUDA)
namespace {

// What the layers call from C++, for the self-check; outputs that are not required are empty.
void eval_backward(const c10::OperatorHandle&, Stack* stack) {
  constexpr size_t count = 11;
  Arguments in(*stack, count);
  EvalBackwardArgs args;
  in.read(args.grad, args.other_grad, args.d_mean, args.u, args.relu_mask, args.scale, args.shift,
          args.residual, args.sums, args.centered, args.slope);
  const auto out = cuda::eval_backward(args);
  const auto or_empty = [&](const Tensor& x) {
    return x.defined() ? x : new_tensor({0}, args.scale.options());
  };
  return_outputs(*stack, count, or_empty(out.d_u), or_empty(out.d_residual), or_empty(out.sums.g1),
                 or_empty(out.sums.gc), or_empty(out.sums.center));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(awnet, m) {
  m.def(
      "eval_backward(Tensor grad, Tensor? other_grad, Tensor? d_mean, Tensor? u, Tensor? relu_mask, Tensor "
      "scale, Tensor? shift, bool residual, bool sums, bool centered, Tensor? slope=None) -> (Tensor d_u, "
      "Tensor d_residual, Tensor g1, Tensor gc, Tensor center)");
}

TORCH_LIBRARY_IMPL(awnet, CUDA, m) {
  AWNET_IMPLEMENT(cuda)
  m.impl("eval_backward", torch::CppFunction::makeFromBoxedFunction<&eval_backward>());
}
#endif

}  // namespace awnet
