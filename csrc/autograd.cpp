// Autograd of layers and frozen networks, and the registration of their operators. In C++, where only the
// gradients that are required at run time are computed. One file, since torch's autograd headers take longer
// to compile than all of this.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "cpu/amx/amx.h"
#include "cpu/amx/network.h"
#include "layer.h"
#include "network.h"
#include "stack.h"

namespace awnet {
namespace {

namespace amx = cpu::amx;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// --- one layer, boxed: the orders below are those of the schemas in awnet/ops/args.py

constexpr size_t kForwardArguments = 21, kBackwardArguments = 27, kOutputs = 8;

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
  args.activation = in.integer();
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
  b.slope = in.maybe_tensor();
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
         keep.u ? kept_u : Tensor(), args.activation == kRelu ? (keep.mask ? mask : y) : Tensor(),
         args.activation > kRelu ? mask : Tensor(), out[3], out[4], out[7]});
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
    torch::jit::push(stack, maybe(s[10]), maybe(s[11]), maybe(s[12]), s[13], s[14], s[15],
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

void layer_autograd(const c10::OperatorHandle& op, Stack* stack) {
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

// --- frozen networks

// The gradients of a network's autograd function, whose `others` last arguments have none.
variable_list flat(const NetworkGradients& d, size_t others) {
  variable_list result{d.x};
  result.insert(result.end(), d.scales.begin(), d.scales.end());
  result.insert(result.end(), d.shifts.begin(), d.shifts.end());
  result.resize(result.size() + others);
  return result;
}

NetworkNeeds needs_of(const AutogradContext& ctx, size_t layers) {
  NetworkNeeds needs{ctx.needs_input_grad(0), {}, {}};
  for (size_t i = 0; i < layers; ++i) {
    needs.scales.push_back(ctx.needs_input_grad(1 + i));
    needs.shifts.push_back(ctx.needs_input_grad(1 + layers + i));
  }
  return needs;
}

class Network : public torch::autograd::Function<Network> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList scales,
                               at::TensorList shifts, const std::vector<Tensor>& weights,
                               const std::vector<int64_t>& numbers) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto requires_grad = [](const Tensor& table) { return table.requires_grad(); };
    const bool tables = std::any_of(scales.begin(), scales.end(), requires_grad) ||
                        std::any_of(shifts.begin(), shifts.end(), requires_grad);
    const NetworkOutputs out = network_forward(x, scales, shifts, weights, steps_of(numbers, weights.size()),
                                               tables, tables || x.requires_grad());
    variable_list saved;
    std::vector<int64_t> shapes, channels_last;
    for (const SavedLayer& layer : out.layers) {
      saved.insert(saved.end(), {layer.weight, layer.scale, layer.u, layer.mask, layer.shift});
      shapes.insert(shapes.end(), layer.shape.begin(), layer.shape.end());
      channels_last.push_back(layer.channels_last);
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["numbers"] = numbers;
    ctx->saved_data["images"] = x.sizes().vec();
    ctx->saved_data["shapes"] = shapes;
    ctx->saved_data["channels_last"] = channels_last;
    ctx->set_materialize_grads(false);
    return out.means;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "a frozen network has a first derivative only; for a second one run it inside `with "
                "awnet.use_backend('reference')`");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    const auto shapes = ctx->saved_data["shapes"].toIntVector();
    const auto channels_last = ctx->saved_data["channels_last"].toIntVector();
    const size_t count = channels_last.size();
    std::vector<SavedLayer> layers;
    for (size_t i = 0; i < count; ++i) {
      const Tensor* const of = saved.data() + 5 * i;
      layers.push_back({of[0],
                        of[1],
                        of[2],
                        of[3],
                        of[4],
                        {shapes.begin() + 4 * i, shapes.begin() + 4 * i + 4},
                        channels_last[i] != 0});
    }
    const auto steps = steps_of(ctx->saved_data["numbers"].toIntVector(), count);
    const auto images = ctx->saved_data["images"].toIntVector();
    return flat(network_backward(steps, layers, images, grads, needs_of(*ctx, count)), 2);
  }
};

std::vector<Tensor> network_native(const Tensor& x, at::TensorList scales, at::TensorList shifts,
                                   at::TensorList weights, Sizes numbers) {
  return network_forward(x, scales, shifts, weights, steps_of(numbers, weights.size()), false, false).means;
}

std::vector<Tensor> network_autograd(const Tensor& x, at::TensorList scales, at::TensorList shifts,
                                     at::TensorList weights, Sizes numbers) {
  return Network::apply(x, scales, shifts, weights.vec(), numbers.vec());
}

class Coefficients : public torch::autograd::Function<Coefficients> {
 public:
  static variable_list forward(AutogradContext* ctx, const MaybeTensor& filter_scale, const Tensor& p_clean,
                               const Tensor& tables, const std::vector<int64_t>& widths, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({filter_scale.value_or(Tensor()), p_clean, tables});
    ctx->saved_data["widths"] = widths;
    ctx->saved_data["eps"] = eps;
    ctx->set_materialize_grads(false);
    return network_coefficients({filter_scale, p_clean, tables, widths, eps});
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "a frozen network's coefficients have a first derivative only; for a second one run it "
                "inside `with awnet.use_backend('reference')`");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    const auto [d_filter_scale, d_p_clean] = network_coefficients_backward(
        {saved[0].defined() ? MaybeTensor(saved[0]) : std::nullopt, saved[1], saved[2],
         ctx->saved_data["widths"].toIntVector(), ctx->saved_data["eps"].toDouble()},
        grads);
    return {d_filter_scale, d_p_clean, Tensor(), Tensor(), Tensor()};
  }
};

std::vector<Tensor> coefficients_native(const MaybeTensor& filter_scale, const Tensor& p_clean,
                                        const Tensor& tables, Sizes widths, double eps) {
  return network_coefficients({filter_scale, p_clean, tables, widths.vec(), eps});
}

std::vector<Tensor> coefficients_autograd(const MaybeTensor& filter_scale, const Tensor& p_clean,
                                          const Tensor& tables, Sizes widths, double eps) {
  return Coefficients::apply(filter_scale, p_clean, tables, widths.vec(), eps);
}

class AmxNetwork : public torch::autograd::Function<AmxNetwork> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList scales,
                               at::TensorList shifts, const std::vector<Tensor>& weights,
                               const std::vector<Tensor>& packed, const std::vector<int64_t>& numbers,
                               bool emulate) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const size_t count = weights.size();
    amx::NetworkArgs args{x.sizes().vec(), amx::shapes_of(weights), steps_of(numbers, count), {}, false,
                          emulate};
    TORCH_CHECK(scales.size() == count && shifts.size() == count, "expected a scale and a shift for each of ",
                count, " layers, got ", scales.size(), " and ", shifts.size());
    bool tables = false;
    std::vector<int64_t> shapes;
    for (size_t i = 0; i < count; ++i) {
      args.keep_u.push_back(scales[i].requires_grad() || shifts[i].requires_grad());
      tables = tables || args.keep_u[i];
      shapes.insert(shapes.end(), args.shapes[i].begin(), args.shapes[i].end());
      shapes.push_back(args.keep_u[i]);
    }
    args.keep_mask = tables || x.requires_grad();
    const amx::Outputs outputs = amx::network_forward(args, x, scales, shifts, packed);
    variable_list tensors = packed;
    tensors.push_back(outputs.saved);
    ctx->save_for_backward(tensors);
    ctx->saved_data["numbers"] = numbers;
    ctx->saved_data["shapes"] = shapes;
    ctx->saved_data["images"] = args.images;
    ctx->saved_data["channels_last"] = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
    ctx->saved_data["emulate"] = emulate;
    ctx->set_materialize_grads(false);
    return outputs.means;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "a frozen network has a first derivative only; for a second one run the network itself");
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list packed = ctx->get_saved_variables();
    const Tensor saved = packed.back();
    packed.pop_back();
    const size_t count = packed.size();
    const auto shapes = ctx->saved_data["shapes"].toIntVector();
    amx::NetworkArgs args{ctx->saved_data["images"].toIntVector(),
                          {},
                          steps_of(ctx->saved_data["numbers"].toIntVector(), count),
                          {},
                          true,
                          ctx->saved_data["emulate"].toBool()};
    for (size_t i = 0; i < count; ++i) {
      args.shapes.emplace_back(shapes.begin() + 5 * i, shapes.begin() + 5 * i + 4);
      args.keep_u.push_back(shapes[5 * i + 4] != 0);
    }
    const bool channels_last = ctx->saved_data["channels_last"].toBool();
    const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    return flat(amx::network_backward(args, packed, saved, grads, needs_of(*ctx, count), format), 4);
  }
};

std::vector<Tensor> amx_forward(const Tensor& x, at::TensorList scales, at::TensorList shifts,
                                at::TensorList weights, at::TensorList packed, at::IntArrayRef numbers,
                                bool emulate) {
  const amx::NetworkArgs args{x.sizes().vec(),
                              amx::shapes_of(weights),
                              steps_of(numbers, weights.size()),
                              std::vector<bool>(weights.size()),
                              false,
                              emulate};
  return amx::network_forward(args, x, scales, shifts, packed).means;
}

std::vector<Tensor> amx_autograd(const Tensor& x, at::TensorList scales, at::TensorList shifts,
                                 at::TensorList weights, at::TensorList packed, at::IntArrayRef numbers,
                                 bool emulate) {
  return AmxNetwork::apply(x, scales, shifts, weights.vec(), packed.vec(), numbers.vec(), emulate);
}

std::vector<Tensor> amx_convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                             at::IntArrayRef stride, at::IntArrayRef padding,
                                             at::IntArrayRef dilation, bool need_input, bool need_weight) {
  const auto [d_input, d_weight] =
      amx::convolution_backward(grad, input, weight, {stride, padding, dilation}, need_input, need_weight);
  std::vector<Tensor> grads;
  if (need_input) grads.push_back(d_input);
  if (need_weight) grads.push_back(d_weight);
  return grads;
}

using torch::CppFunction;

}  // namespace

TORCH_LIBRARY_FRAGMENT(awnet, m) {
  m.def("amx_peak(float seconds) -> float", &amx::peak);
  m.def("amx_pack_weight(Tensor weight) -> Tensor");
  m.def(
      "amx_convolution(Tensor input, Tensor weight, int[2] stride, int[2] padding, int[2] dilation) -> "
      "Tensor");
  m.def(
      "amx_convolution_backward(Tensor grad, Tensor input, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation, bool need_input, bool need_weight) -> Tensor[]");
  m.def(
      "network_amx(Tensor x, Tensor[] scales, Tensor[] shifts, Tensor[] weights, Tensor[] packed, int[] "
      "numbers, bool emulate) -> Tensor[]");
  m.def(
      "network_native(Tensor x, Tensor[] scales, Tensor[] shifts, Tensor[] weights, int[] numbers) -> "
      "Tensor[]");
  m.def(
      "network_coefficients_native(Tensor? filter_scale, Tensor p_clean, Tensor tables, int[] widths, float "
      "eps) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(awnet, CPU, m) {
  m.impl("layer_native", CppFunction::makeFromBoxedFunction<&boxed_forward>());
  m.impl("layer_native_backward", CppFunction::makeFromBoxedFunction<&boxed_backward>());
  m.impl("network_native", &network_native);
  m.impl("network_coefficients_native", &coefficients_native);
  m.impl("network_amx", &amx_forward);
  m.impl("amx_pack_weight", &amx::pack_weight);
  m.impl("amx_convolution",
         [](const Tensor& input, const Tensor& weight, Sizes stride, Sizes padding, Sizes dilation) {
           return amx::convolution(input, weight, {stride, padding, dilation});
         });
  m.impl("amx_convolution_backward", &amx_convolution_backward);
}

#if defined(AWNET_CUDA)
TORCH_LIBRARY_IMPL(awnet, CUDA, m) {
  m.impl("layer_native", CppFunction::makeFromBoxedFunction<&boxed_forward>());
  m.impl("layer_native_backward", CppFunction::makeFromBoxedFunction<&boxed_backward>());
  m.impl("network_native", &network_native);
}
#endif

TORCH_LIBRARY_IMPL(awnet, Autograd, m) {
  m.impl("layer_native", CppFunction::makeFromBoxedFunction<&layer_autograd>());
  m.impl("network_native", &network_autograd);
  m.impl("network_coefficients_native", &coefficients_autograd);
  m.impl("network_amx", &amx_autograd);
}

}  // namespace awnet
