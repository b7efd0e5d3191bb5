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
      "(Tensor y, "
      "Tensor mask)");
  m.def(
      "reduce(Tensor grad, Tensor u, Tensor centre, Tensor? relu_mask, Tensor? slope=None) -> (Tensor g1, "
      "Tensor gc)");
  m.def(
      "propagate(Tensor grad, Tensor? u, Tensor? centre, Tensor? relu_mask, Tensor by_grad, Tensor? "
      "by_input, "
      "Tensor? constant, bool residual, Tensor? slope=None) -> (Tensor d_u, Tensor d_residual)");
  m.def(
      "eval_coefficients(Tensor? filter_scale, Tensor? p_clean, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor "
      "var, float eps, int batch) -> (Tensor scale, Tensor shift)");
  m.def(
      "eval_gradients(Tensor g1, Tensor gc, Tensor centre, Tensor? filter_scale, Tensor? p_clean, Tensor "
      "weight, Tensor bias, Tensor mean, Tensor var, float eps, bool[4] needs) -> (Tensor d_filter_scale, "
      "Tensor d_p_clean, Tensor d_weight, Tensor d_bias)");
  m.def(
      "batch_statistics(Tensor mean, Tensor m2, int hw, Tensor? filter_scale, Tensor? is_clean, int "
      "stat_rows) "
      "-> (Tensor batch_mean, Tensor batch_var, Tensor n)");
  m.def(
      "train_coefficients(Tensor? filter_scale, Tensor? is_clean, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor var, float eps, int batch) -> (Tensor scale, Tensor shift)");
  m.def(
      "train_sums(Tensor g1, Tensor gc, Tensor centre, Tensor? filter_scale, Tensor? is_clean, Tensor "
      "weight, "
      "Tensor bias, Tensor mean, Tensor var, float eps) -> (Tensor d_weight, Tensor d_bias, Tensor through)");
  m.def(
      "train_gradients(Tensor g1, Tensor gc, Tensor centre, Tensor mean, Tensor m2, int hw, Tensor? "
      "filter_scale, Tensor? is_clean, Tensor weight, Tensor bias, Tensor batch_mean, Tensor batch_var, "
      "float "
      "eps, Tensor n, bool need_filter_scale, Tensor? through) -> (Tensor d_filter_scale, Tensor d_weight, "
      "Tensor d_bias, Tensor by_grad, Tensor by_input, Tensor constant)");
  m.def(
      "convolves(Tensor input, Tensor weight, int groups, int[2] stride=1, int[2] padding=0, int[2] "
      "dilation=1) "
      "-> bool");
  m.def(
      "convolve_apply(Tensor input, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, int "
      "activation, int[2] stride, int[2] padding, int[2] dilation, bool keep_u, bool keep_mask) -> (Tensor "
      "y, Tensor u, "
      "Tensor mask)");
  m.def(
      "convolve_back(Tensor grad, Tensor? u, Tensor? centre, Tensor? relu_mask, Tensor scale, Tensor weight, "
      "int[] "
      "input_shape, int[2] stride, int[2] padding, int[2] dilation, bool residual, Tensor? slope=None) -> "
      "(Tensor d_input, "
      "Tensor "
      "d_residual, Tensor g1, Tensor gc)");
}

namespace awnet {
namespace {

using torch::CppFunction;

// Each adapter reads an operator's arguments in the order of its schema and calls it with records.

// u may be overwritten where the layer has just made it, never where a caller passes it
template <auto apply>
std::tuple<Tensor, Tensor> not_in_place(const Tensor& u, const Tensor& scale, const Tensor& shift,
                                        const MaybeTensor& residual, int64_t activation, bool keep_mask) {
  return apply(u, scale, shift, residual, activation, keep_mask, false);
}

template <auto propagate>
std::tuple<Tensor, Tensor> propagated(const Tensor& grad, const MaybeTensor& u, const MaybeTensor& centre,
                                      const MaybeTensor& relu_mask, const Tensor& by_grad,
                                      const MaybeTensor& by_input, const MaybeTensor& constant, bool residual,
                                      const MaybeTensor& slope) {
  return propagate(grad, u, centre, relu_mask, {by_grad, by_input, constant}, residual, slope);
}

MixNorm read_norm(Arguments& in) {
  MixNorm norm;
  for (Tensor* x : {&norm.weight, &norm.bias, &norm.mean, &norm.var}) *x = in.tensor();
  norm.eps = in.real();
  return norm;
}

Mix read_eval_mix(Arguments& in) {
  Mix mix;
  mix.filter_scale = in.maybe_tensor();
  mix.p_clean = in.maybe_tensor();
  return mix;
}

Mix read_train_mix(Arguments& in) {
  Mix mix;
  mix.filter_scale = in.maybe_tensor();
  mix.is_clean = in.maybe_tensor();
  return mix;
}

Reduced read_reduced(Arguments& in) {
  Reduced sums;
  for (Tensor* x : {&sums.g1, &sums.gc, &sums.centre}) *x = in.tensor();
  return sums;
}

SampleStats read_stats(Arguments& in) {
  SampleStats stats;
  stats.mean = in.tensor();
  stats.m2 = in.tensor();
  stats.hw = in.integer();
  return stats;
}

// A boxed operator from a function that reads its arguments and returns a tuple of tensors.
template <auto call>
void boxed(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  Arguments in(*stack, count);
  const auto outputs = call(in);
  std::apply([&](const auto&... x) { return_outputs(*stack, count, x...); }, outputs);
}

template <auto eval_coefficients>
auto call_eval_coefficients(Arguments& in) {
  const Mix mix = read_eval_mix(in);
  const MixNorm norm = read_norm(in);
  return eval_coefficients(mix, norm, in.integer());
}

template <auto eval_gradients>
auto call_eval_gradients(Arguments& in) {
  const Reduced sums = read_reduced(in);
  const Mix mix = read_eval_mix(in);
  const MixNorm norm = read_norm(in);
  const auto required = in.next().toBoolList();
  Needs needs;
  needs.filter_scale = required[0];
  needs.p_clean = required[1];
  needs.bn_weight = required[2];
  needs.bn_bias = required[3];
  return eval_gradients(sums, mix, norm, needs);
}

template <auto batch_statistics>
auto call_batch_statistics(Arguments& in) {
  const SampleStats stats = read_stats(in);
  const Mix mix = read_train_mix(in);
  return batch_statistics(stats, mix, in.integer());
}

template <auto train_coefficients>
auto call_train_coefficients(Arguments& in) {
  const Mix mix = read_train_mix(in);
  const MixNorm norm = read_norm(in);
  return train_coefficients(mix, norm, in.integer());
}

template <auto train_sums>
auto call_train_sums(Arguments& in) {
  const Reduced sums = read_reduced(in);
  const Mix mix = read_train_mix(in);
  return train_sums(sums, mix, read_norm(in));
}

template <auto train_gradients>
auto call_train_gradients(Arguments& in) {
  const Reduced sums = read_reduced(in);
  const SampleStats stats = read_stats(in);
  const Mix mix = read_train_mix(in);
  const MixNorm norm = read_norm(in);
  const Tensor n = in.tensor();
  const bool need_filter_scale = in.flag();
  return train_gradients(sums, stats, mix, norm, n, need_filter_scale, in.maybe_tensor());
}

bool convolves(const Tensor& input, const Tensor& weight, int64_t groups, Sizes stride, Sizes padding,
               Sizes dilation) {
  return cpu::convolves(input, weight, {stride, padding, dilation}, groups);
}

Conv read_window(Arguments& in) {
  Conv conv;
  conv.stride = in.pair();
  conv.padding = in.pair();
  conv.dilation = in.pair();
  return conv;
}

auto call_convolve_apply(Arguments& in) {
  const Tensor input = in.tensor(), weight = in.tensor(), scale = in.tensor(), shift = in.tensor();
  const MaybeTensor residual = in.maybe_tensor();
  const int64_t activation = in.integer();
  const Conv conv = read_window(in);
  const bool keep_u = in.flag(), keep_mask = in.flag();
  return cpu::convolve_apply(input, weight, conv.window(), scale, shift, residual, activation, keep_u,
                             keep_mask);
}

auto call_convolve_back(Arguments& in) {
  cpu::BackArgs args;
  args.grad = in.tensor();
  args.u = in.maybe_tensor();
  args.centre = in.maybe_tensor();
  args.relu_mask = in.maybe_tensor();
  args.propagation.by_grad = in.tensor();
  args.weight = in.tensor();
  const std::vector<int64_t> input_shape = in.integers();
  const Conv conv = read_window(in);
  args.input_shape = input_shape;
  args.window = conv.window();
  args.need_sums = args.u.has_value();
  args.need_residual = in.flag();
  args.slope = in.maybe_tensor();
  const auto back = cpu::convolve_back(args);
  return std::make_tuple(back.d_input, back.d_residual, back.g1, back.gc);
}

#define AWNET_BOXED(name, space) \
  m.impl(#name, CppFunction::makeFromBoxedFunction<&boxed<&call_##name<&space::name>>>());

#define AWNET_IMPLEMENT(space)                         \
  m.impl("statistics", &space::statistics);            \
  m.impl("apply", &not_in_place<&space::apply>);       \
  m.impl("reduce", &space::reduce);                    \
  m.impl("propagate", &propagated<&space::propagate>); \
  AWNET_BOXED(eval_coefficients, space)                \
  AWNET_BOXED(eval_gradients, space)                   \
  AWNET_BOXED(batch_statistics, space)                 \
  AWNET_BOXED(train_coefficients, space)               \
  AWNET_BOXED(train_sums, space)                       \
  AWNET_BOXED(train_gradients, space)

}  // namespace

TORCH_LIBRARY_IMPL(awnet, CPU, m) {
  AWNET_IMPLEMENT(cpu)
  m.impl("convolves", &convolves);
  m.impl("convolve_apply", CppFunction::makeFromBoxedFunction<&boxed<&call_convolve_apply>>());
  m.impl("convolve_back", CppFunction::makeFromBoxedFunction<&boxed<&call_convolve_back>>());
}
#if defined(AWNET_CUDA)
// What the layers call from C++, for the self-check; outputs that are not required are empty.
namespace {

auto call_eval_backward(Arguments& in) {
  EvalBackwardArgs args;
  args.grad = in.tensor();
  for (MaybeTensor* x : {&args.other_grad, &args.d_mean, &args.u, &args.relu_mask}) *x = in.maybe_tensor();
  args.scale = in.tensor();
  args.shift = in.maybe_tensor();
  for (bool* flag : {&args.residual, &args.sums, &args.centred}) *flag = in.flag();
  args.slope = in.maybe_tensor();
  const auto out = cuda::eval_backward(args);
  const auto given = [&](const Tensor& x) { return x.defined() ? x : new_tensor({0}, args.scale.options()); };
  return std::make_tuple(given(out.d_u), given(out.d_residual), given(out.sums.g1), given(out.sums.gc),
                         given(out.sums.centre));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(awnet, m) {
  m.def(
      "eval_backward(Tensor grad, Tensor? other_grad, Tensor? d_mean, Tensor? u, Tensor? relu_mask, Tensor "
      "scale, Tensor? shift, bool residual, bool sums, bool centred, Tensor? slope=None) -> "
      "(Tensor d_u, Tensor d_residual, Tensor g1, Tensor gc, Tensor centre)");
}

TORCH_LIBRARY_IMPL(awnet, CUDA, m) {
  AWNET_IMPLEMENT(cuda)
  m.impl("eval_backward", CppFunction::makeFromBoxedFunction<&boxed<&call_eval_backward>>());
}
#endif

}  // namespace awnet
