// The whole layer as one operator with its gradient: the library's convolution around the passes and the
// coefficients. awnet/ops/autograd.py is the same in Python for the backends whose passes are not native;
// awnet/ops/args.py has the schemas.
#include "layer.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "cpu/amx/amx.h"
#include "cpu/convolution.h"
#include "stack.h"

namespace awnet {

namespace amx = cpu::amx;

namespace {

#define AWNET_FIELDS(space)                                                                             \
  &space::statistics, &space::apply, &space::reduce, &space::propagate, &space::eval_coefficients,      \
      &space::eval_gradients, &space::batch_statistics, &space::train_coefficients, &space::train_sums, \
      &space::train_gradients

struct Passes {
  decltype(&cpu::statistics) statistics;
  decltype(&cpu::apply) apply;
  decltype(&cpu::reduce) reduce;
  decltype(&cpu::propagate) propagate;
  decltype(&cpu::eval_coefficients) eval_coefficients;
  decltype(&cpu::eval_gradients) eval_gradients;
  decltype(&cpu::batch_statistics) batch_statistics;
  decltype(&cpu::train_coefficients) train_coefficients;
  decltype(&cpu::train_sums) train_sums;
  decltype(&cpu::train_gradients) train_gradients;
};

const Passes& passes_of(const Tensor& x) {
  static const Passes on_cpu{AWNET_FIELDS(cpu)};
#if defined(AWNET_CUDA)
  static const Passes on_cuda{AWNET_FIELDS(cuda)};
  if (x.is_cuda()) return on_cuda;
#endif
  TORCH_CHECK(x.is_cpu(), "this build of awnet has no native kernels for ", x.device());
  return on_cpu;
}

MaybeTensor table(const MaybeTensor& x) {
  return x ? MaybeTensor(x->to(at::kFloat).contiguous()) : std::nullopt;
}
MaybeTensor dense(const MaybeTensor& x) { return x ? MaybeTensor(x->contiguous()) : std::nullopt; }

// The [B, C] inputs in the dtype and layout that the passes take.
Mix widened(const Mix& mix) { return {table(mix.filter_scale), table(mix.p_clean), dense(mix.is_clean)}; }

std::optional<MixNorm> widened(const std::optional<MixNorm>& norm) {
  if (!norm) return std::nullopt;
  MixNorm wide = *norm;
  for (Tensor* x : {&wide.weight, &wide.bias, &wide.mean, &wide.var}) *x = *table(*x);
  return wide;
}

// Collectives over the ranks of a process group; awnet/ops/distributed.py registers them.
using BatchStats = std::tuple<Tensor, Tensor, Tensor>;  // mean, var, n

BatchStats joined_statistics(const BatchStats& own, const std::string& process_group) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("awnet::joined_statistics", "")
          .typed<BatchStats(const Tensor&, const Tensor&, const Tensor&, c10::string_view)>();
  const auto& [mean, var, n] = own;
  return op.call(mean, var, n, process_group);
}

Tensor summed(const Tensor& x, const std::string& process_group) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("awnet::summed", "")
                             .typed<Tensor(const Tensor&, c10::string_view)>();
  return op.call(x, process_group);
}

}  // namespace

at::MemoryFormat layout_of(const Tensor& x) {
  const bool last = !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

LayerOutputs layer_forward(const LayerArgs& args, Keep keep) {
  const Passes& passes = passes_of(args.input);
  const auto layout = layout_of(args.input);
  const auto floats = args.input.options().dtype(at::kFloat);
  const MaybeTensor& weight = args.weight;
  const Conv& conv = args.conv;
  Tensor u = args.input.contiguous(layout);
  LayerOutputs out;
  for (Tensor* x : {&out.mean, &out.m2, &out.batch_mean, &out.batch_var, &out.n}) *x = at::empty({0}, floats);
  const Mix mix = widened(args.mix);
  auto norm = widened(args.norm);
  const bool by_batch = norm && norm->training;
  const cpu::Window window = conv.window();
  const bool direct = weight && u.is_cpu() && cpu::convolves(u, *weight, window, conv.groups);
  if (direct && by_batch) {
    std::tie(u, out.mean, out.m2) = cpu::convolve_statistics(u, *weight, window);
  } else if (weight && !direct) {
    u = amx::takes(amx::Pass::kForward, u, *weight, {}, window, conv.groups)
            ? amx::convolution(u, *weight, window)
            : at::convolution(u, *weight, std::nullopt, conv.stride, conv.padding, conv.dilation, false,
                              {0, 0}, conv.groups);
    u = u.contiguous(layout);
  }
  const int64_t batch = u.size(0), channels = weight ? weight->size(0) : u.size(1);
  Tensor scale, shift;
  if (!norm) {
    scale = mix.filter_scale ? *mix.filter_scale : at::ones({batch, channels}, floats);
    shift = args.shift ? *table(args.shift) : at::zeros_like(scale);
  } else if (by_batch) {
    if (!direct) std::tie(out.mean, out.m2) = passes.statistics(u);
    auto stats = passes.batch_statistics({out.mean, out.m2, u.size(2) * u.size(3)}, mix, norm->mean.size(0));
    if (!norm->process_group.empty()) stats = joined_statistics(stats, norm->process_group);
    std::tie(out.batch_mean, out.batch_var, out.n) = stats;
    norm->mean = out.batch_mean;
    norm->var = out.batch_var;
    std::tie(scale, shift) = passes.train_coefficients(mix, *norm, batch);
  } else {
    std::tie(scale, shift) = passes.eval_coefficients(mix, *norm, batch);
  }
  if (direct && !by_batch) {
    std::tie(out.y, out.u, out.mask) =
        cpu::convolve_apply(u, *weight, window, scale, shift, args.residual, args.relu, keep.u, keep.mask);
    return out;
  }
  const bool keep_u = weight && keep.u;  // without a weight u is the input
  std::tie(out.y, out.mask) =
      passes.apply(u, scale, shift, args.residual, args.relu, keep.mask, weight && !keep_u);
  out.u = keep_u ? u : at::empty({0}, args.input.options());
  return out;
}

LayerGradients layer_backward(const LayerBackwardArgs& b) {
  const LayerArgs& args = b.args;
  const Needs& needs = b.needs;
  const MaybeTensor& weight = args.weight;
  const Conv& conv = args.conv;
  const Passes& passes = passes_of(b.grad);
  const auto layout = b.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor grad = b.grad.contiguous(layout);
  const Mix mix = widened(args.mix);
  const auto norm = widened(args.norm);
  const bool by_batch = norm && norm->training;
  const int64_t hw = grad.size(2) * grad.size(3);

  const cpu::Window window = conv.window();
  const bool direct = weight && needs.input && grad.is_cpu() &&
                      cpu::convolves_back(b.input_shape, grad, *weight, window, conv.groups);
  LayerGradients d;
  Propagation propagation;
  MaybeTensor u, centre;
  std::optional<cpu::Back> back;
  const auto convolve_back = [&](bool sums) {
    back = cpu::convolve_back(grad, u, centre, b.relu_mask, propagation.by_grad, propagation.by_input,
                              propagation.constant, *weight, b.input_shape, window, sums, needs.residual,
                              needs.weight);
  };
  const auto filter_scale = [&] {
    return mix.filter_scale ? *mix.filter_scale
                            : at::ones({grad.size(0), grad.size(1)}, grad.options().dtype(at::kFloat));
  };
  if (needs.coefficients() || (by_batch && needs.images())) {
    TORCH_CHECK(b.u.has_value(), "the forward was called with keep_u=False, and this backward needs u");
    u = b.u->contiguous(layout);
    // any centre is exact; one near the channel's mean keeps the digits, and a pixel of u is near it
    centre = by_batch ? b.mean : u->select(3, 0).select(2, 0).to(at::kFloat).contiguous();
    Reduced sums{{}, {}, *centre};
    if (direct && !norm) {
      propagation.by_grad = filter_scale();
      convolve_back(true);
      sums.g1 = back->g1;
      sums.gc = back->gc;
    } else {
      std::tie(sums.g1, sums.gc) = passes.reduce(grad, *u, *centre, b.relu_mask);
    }
    if (!norm) {
      d.filter_scale = at::addcmul(sums.gc, *centre, sums.g1);
      d.shift = sums.g1;
    } else if (by_batch) {
      Tensor own_weight, own_bias;
      MaybeTensor through;
      if (!norm->process_group.empty()) {
        std::tie(d.bn_weight, d.bn_bias, through) = passes.train_sums(sums, mix, *norm);
        through = summed(*through, norm->process_group);
      }
      std::tie(d.filter_scale, own_weight, own_bias, propagation.by_grad, propagation.by_input,
               propagation.constant) =
          passes.train_gradients(sums, {b.mean, b.m2, hw}, mix, *norm, b.n, needs.filter_scale, through);
      if (!through) {
        d.bn_weight = own_weight;
        d.bn_bias = own_bias;
      }
    } else {
      std::tie(d.filter_scale, d.p_clean, d.bn_weight, d.bn_bias) =
          passes.eval_gradients(sums, mix, *norm, needs);
    }
  }
  Tensor d_u;
  if (needs.images()) {
    if (!propagation.by_grad.defined()) {
      propagation.by_grad =
          norm ? std::get<0>(passes.eval_coefficients(mix, *norm, grad.size(0))) : filter_scale();
    }
    if (direct) {
      if (!back) convolve_back(false);
      d.input = back->d_input;
      d.residual = back->d_residual;
      d_u = back->d_u;
    } else {
      std::tie(d_u, d.residual) = passes.propagate(grad, u, centre, b.relu_mask, propagation, needs.residual);
    }
  }
  const bool convolve_input = needs.input && !direct;
  if (!weight) {
    d.input = d_u;
  } else if (convolve_input || needs.weight) {
    // the gradient of the input needs the input's shape alone
    const Tensor source =
        args.input.defined() ? args.input : at::empty(b.input_shape, grad.options(), layout);
    const bool input_on_tiles =
        convolve_input && amx::takes(amx::Pass::kInputGradient, source, *weight, d_u, window, conv.groups);
    const bool weight_on_tiles =
        needs.weight && amx::takes(amx::Pass::kWeightGradient, source, *weight, d_u, window, conv.groups);
    const auto [input_on_amx, weight_on_amx] =
        amx::convolution_backward(d_u, source, *weight, window, input_on_tiles, weight_on_tiles);
    const std::array<bool, 3> rest = {convolve_input && !input_on_tiles, needs.weight && !weight_on_tiles,
                                      false};
    Tensor d_rest;
    if (rest[0] || rest[1]) {
      std::tie(d_rest, d.weight, std::ignore) =
          at::convolution_backward(d_u, source, *weight, std::nullopt, conv.stride, conv.padding,
                                   conv.dilation, false, {0, 0}, conv.groups, rest);
    }
    if (convolve_input) d.input = input_on_tiles ? input_on_amx : d_rest;
    if (weight_on_tiles) d.weight = weight_on_amx;
  }
  const auto images = grad.scalar_type();
  const auto finish = [&](bool need, Tensor& value, at::ScalarType dtype) {
    value = need && value.defined() ? value.to(dtype) : at::empty({0}, grad.options());
  };
  const auto dtype_of = [&](const MaybeTensor& x) { return x ? x->scalar_type() : images; };
  const auto norm_dtype = args.norm ? args.norm->weight.scalar_type() : images;
  finish(needs.input, d.input, images);
  finish(needs.weight, d.weight, images);
  finish(needs.filter_scale, d.filter_scale, dtype_of(args.mix.filter_scale));
  finish(needs.p_clean, d.p_clean, dtype_of(args.mix.p_clean));
  finish(needs.bn_weight, d.bn_weight, norm_dtype);
  finish(needs.bn_bias, d.bn_bias, args.norm ? args.norm->bias.scalar_type() : images);
  finish(needs.shift, d.shift, dtype_of(args.shift));
  finish(needs.residual, d.residual, images);
  return d;
}

namespace {

// --- the operators, boxed: the orders below are those of the schemas in awnet/ops/args.py

constexpr size_t kForwardArguments = 21, kBackwardArguments = 26, kOutputs = 8;

std::optional<MixNorm> norm_of(const MaybeTensor& weight, const MaybeTensor& bias) {
  if (!weight) return std::nullopt;
  MixNorm norm;
  norm.weight = *weight;
  norm.bias = *bias;
  return norm;
}

// weight to process_group and the convolution's geometry; `residual`: whether there is one in between
void read_layer(Arguments& in, LayerArgs& args, bool residual) {
  args.weight = in.maybe_tensor();
  args.mix.filter_scale = in.maybe_tensor();
  args.mix.p_clean = in.maybe_tensor();
  const MaybeTensor bn_weight = in.maybe_tensor(), bn_bias = in.maybe_tensor();
  args.norm = norm_of(bn_weight, bn_bias);
  args.shift = in.maybe_tensor();
  if (residual) args.residual = in.maybe_tensor();
  const MaybeTensor mean = in.maybe_tensor(), var = in.maybe_tensor();
  args.mix.is_clean = in.maybe_tensor();
  const bool training = in.flag();
  const double eps = in.real();
  const std::string process_group = in.text();
  if (args.norm) {
    args.norm->mean = *mean;
    args.norm->var = *var;
    args.norm->training = training;
    args.norm->eps = eps;
    args.norm->process_group = process_group;
  }
  args.conv.stride = in.pair();
  args.conv.padding = in.pair();
  args.conv.dilation = in.pair();
  args.conv.groups = in.integer();
}

std::pair<LayerArgs, Keep> read_forward(const Stack& stack) {
  Arguments in(stack, kForwardArguments);
  LayerArgs args;
  args.input = in.tensor();
  read_layer(in, args, true);
  args.relu = in.flag();
  Keep keep;
  keep.u = in.flag();
  keep.mask = in.flag();
  return {args, keep};
}

LayerBackwardArgs read_backward(const Stack& stack) {
  Arguments in(stack, kBackwardArguments);
  LayerBackwardArgs b;
  b.grad = in.tensor();
  if (const MaybeTensor input = in.maybe_tensor()) b.args.input = *input;
  b.input_shape = in.integers();
  read_layer(in, b.args, false);
  b.u = in.maybe_tensor();
  b.relu_mask = in.maybe_tensor();
  b.mean = in.tensor();
  b.m2 = in.tensor();
  b.n = in.tensor();
  b.channels_last = in.flag();
  const auto needs = in.next().toBoolList();
  b.needs = {needs[0], needs[1], needs[2], needs[3], needs[4], needs[5], needs[6], needs[7]};
  return b;
}

void boxed_forward(const c10::OperatorHandle&, Stack* stack) {
  const auto [args, keep] = read_forward(*stack);
  const LayerOutputs out = layer_forward(args, keep);
  return_outputs(*stack, kForwardArguments, out.y, out.u, out.mask, out.mean, out.m2, out.batch_mean,
                 out.batch_var, out.n);
}

void boxed_backward(const c10::OperatorHandle&, Stack* stack) {
  const LayerGradients d = layer_backward(read_backward(*stack));
  return_outputs(*stack, kBackwardArguments, d.input, d.weight, d.filter_scale, d.p_clean, d.bn_weight,
                 d.bn_bias, d.shift, d.residual);
}

// --- autograd: in C++, where only the gradients that are required at run time are computed

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

c10::IValue maybe(const Tensor& x) { return x.defined() ? c10::IValue(x) : c10::IValue(); }

class Layer : public torch::autograd::Function<Layer> {
 public:
  // `tensors` are the differentiable arguments that are present, `positions` their places in LayerGradients;
  // the operator's arguments are on the stack.
  static variable_list forward(AutogradContext* ctx, at::TensorList /*tensors*/,
                               const std::vector<int64_t>& positions, const LayerArgs& args, Keep keep,
                               const c10::OperatorHandle& op, Stack* stack) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto given = torch::jit::last(*stack, kForwardArguments);
    // training, eps, process_group, stride, padding, dilation and groups
    std::vector<c10::IValue> options(given.begin() + 11, given.begin() + 18);
    op.callBoxed(stack);
    const auto results = torch::jit::last(*stack, kOutputs);
    variable_list out;
    for (const c10::IValue& value : results) out.push_back(value.toTensor());
    torch::jit::drop(*stack, kOutputs);
    const Tensor &y = out[0], &u = out[1], &mask = out[2];
    const bool by_batch = args.norm && args.norm->training;
    const auto given_or_none = [](const MaybeTensor& x) { return x ? *x : Tensor(); };
    // without a weight the input is u itself; with one, its values serve the weight's gradient only
    const bool keep_input = args.weight && args.weight->requires_grad();
    const Tensor kept_u = args.weight ? u : args.input;
    const MixNorm norm = args.norm.value_or(MixNorm());
    ctx->save_for_backward(
        {keep_input ? args.input : Tensor(), given_or_none(args.weight), given_or_none(args.mix.filter_scale),
         given_or_none(args.mix.p_clean), norm.weight, norm.bias, given_or_none(args.shift),
         // the running statistics are about to be updated in place
         by_batch ? out[5] : norm.mean, by_batch ? out[6] : norm.var, given_or_none(args.mix.is_clean),
         keep.u ? kept_u : Tensor(), args.relu ? (keep.mask ? mask : y) : Tensor(), out[3], out[4], out[7]});
    ctx->saved_data["options"] = c10::ivalue::Tuple::create(std::move(options));
    ctx->saved_data["positions"] = positions;
    ctx->saved_data["channels_last"] = layout_of(y) == at::MemoryFormat::ChannelsLast;
    ctx->saved_data["shape"] = args.input.sym_sizes().vec();
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({out.begin() + 1, out.end()});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto positions = ctx->saved_data.at("positions").toIntVector();
    constexpr size_t others = 5;  // arguments of `forward` that are not tensors
    variable_list result(positions.size() + others);
    if (!grads[0].defined()) return result;
    const variable_list s = ctx->get_saved_variables();
    c10::List<bool> needs;
    needs.resize(kOutputs, false);
    for (size_t i = 0; i < positions.size(); ++i) needs[positions[i]] = ctx->needs_input_grad(i);
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("awnet::layer_native_backward", "");
    Stack stack;
    stack.reserve(kBackwardArguments);
    torch::jit::push(stack, grads[0], maybe(s[0]), ctx->saved_data.at("shape"));
    for (size_t i = 1; i < 10; ++i) stack.push_back(maybe(s[i]));
    const auto options = ctx->saved_data.at("options").toTuple();
    for (const c10::IValue& option : options->elements()) stack.push_back(option);
    torch::jit::push(stack, maybe(s[10]), maybe(s[11]), s[12], s[13], s[14],
                     ctx->saved_data.at("channels_last"), needs);
    // the operator's own autograd only reports that there is no second derivative
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled()) guard.emplace();
    op.callBoxed(&stack);
    for (size_t i = 0; i < positions.size(); ++i) {
      if (ctx->needs_input_grad(i)) result[i] = stack[positions[i]].toTensor();
    }
    return result;
  }
};

void differentiable(const c10::OperatorHandle& op, Stack* stack) {
  const auto [args, keep] = read_forward(*stack);
  const auto& norm = args.norm;
  const std::array<MaybeTensor, kOutputs> arguments = {
      args.input,
      args.weight,
      args.mix.filter_scale,
      args.mix.p_clean,
      norm ? MaybeTensor(norm->weight) : std::nullopt,
      norm ? MaybeTensor(norm->bias) : std::nullopt,
      args.shift,
      args.residual,
  };
  variable_list tensors;
  std::vector<int64_t> positions;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!arguments[i]) continue;
    tensors.push_back(*arguments[i]);
    positions.push_back(static_cast<int64_t>(i));
  }
  const variable_list out = Layer::apply(at::TensorList(tensors), positions, args, keep, op, stack);
  for (const Tensor& x : out) stack->emplace_back(x);
}

using torch::CppFunction;

}  // namespace

TORCH_LIBRARY_IMPL(awnet, CPU, m) {
  m.impl("layer_native", CppFunction::makeFromBoxedFunction<&boxed_forward>());
  m.impl("layer_native_backward", CppFunction::makeFromBoxedFunction<&boxed_backward>());
}

#if defined(AWNET_CUDA)
TORCH_LIBRARY_IMPL(awnet, CUDA, m) {
  m.impl("layer_native", CppFunction::makeFromBoxedFunction<&boxed_forward>());
  m.impl("layer_native_backward", CppFunction::makeFromBoxedFunction<&boxed_backward>());
}
#endif

TORCH_LIBRARY_IMPL(awnet, Autograd, m) {
  m.impl("layer_native", CppFunction::makeFromBoxedFunction<&differentiable>());
}

}  // namespace awnet
