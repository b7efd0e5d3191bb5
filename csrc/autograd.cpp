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

// weight to process_group and the convolution's geometry; `residual`: whether there is one in between
void read_layer(Arguments& in, LayerArgs& args, bool residual) {
  MaybeTensor bn_weight, bn_bias, mean, var;
  MixNorm norm;
  in.read(args.weight, args.mix.filter_scale, args.mix.p_clean, bn_weight, bn_bias, args.shift);
  if (residual) in.read(args.residual);
  in.read(mean, var, args.mix.is_clean, norm.training, norm.eps, norm.process_group, args.conv,
          args.conv.groups);
  if (!bn_weight) return;
  norm.weight = *bn_weight;
  norm.bias = *bn_bias;
  norm.mean = *mean;
  norm.var = *var;
  args.norm = norm;
}

std::pair<LayerArgs, Keep> read_forward(const Stack& stack) {
  Arguments in(stack, kForwardArguments);
  LayerArgs args;
  Keep keep;
  in.read(args.input);
  read_layer(in, args, true);
  in.read(args.activation, keep.u, keep.mask);
  return {args, keep};
}

LayerBackwardArgs read_backward(const Stack& stack) {
  Arguments in(stack, kBackwardArguments);
  LayerBackwardArgs b;
  MaybeTensor input;
  c10::List<bool> needs;
  in.read(b.grad, input, b.input_shape);
  if (input) b.args.input = *input;
  read_layer(in, b.args, false);
  in.read(b.u, b.relu_mask, b.slope, b.mean, b.m2, b.n, b.channels_last, needs);
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
  static variable_list forward(AutogradContext* ctx, TensorList /*tensors*/,
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
    const bool batch_stats = args.norm && args.norm->training;
    const auto or_undefined = [](const MaybeTensor& x) { return x.value_or(Tensor()); };
    // without a weight the input is u itself; with one, its values serve the weight's gradient only
    const bool keep_input = args.weight && args.weight->requires_grad();
    const Tensor kept_u = args.weight ? u : args.input;
    const MixNorm norm = args.norm.value_or(MixNorm());
    ctx->save_for_backward(
        {keep_input ? args.input : Tensor(), or_undefined(args.weight), or_undefined(args.mix.filter_scale),
         or_undefined(args.mix.p_clean), norm.weight, norm.bias, or_undefined(args.shift),
         // the running statistics are about to be updated in place
         batch_stats ? out[5] : norm.mean, batch_stats ? out[6] : norm.var, or_undefined(args.mix.is_clean),
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
  const auto arguments = torch::jit::last(*stack, kForwardArguments);
  variable_list tensors;
  std::vector<int64_t> positions;
  for (size_t i = 0; i < kOutputs; ++i) {  // the schema starts with the arguments that have a gradient
    if (arguments[i].isNone()) continue;
    tensors.push_back(arguments[i].toTensor());
    positions.push_back(static_cast<int64_t>(i));
  }
  const variable_list out = Layer::apply(TensorList(tensors), positions, args, keep, op, stack);
  for (const Tensor& x : out) stack->emplace_back(x);
}

// --- frozen networks

// A C++ value among the saved data of an autograd function.
template <class T>
struct Saved : torch::CustomClassHolder {
  T value;

  explicit Saved(T from) : value(std::move(from)) {}
  static void save(AutogradContext* ctx, T value) {
    ctx->saved_data["value"] = c10::IValue::make_capsule(c10::make_intrusive<Saved>(std::move(value)));
  }
  static const T& load(const AutogradContext* ctx) {
    return static_cast<const Saved*>(ctx->saved_data.at("value").toCapsule().get())->value;
  }
};

void check_first_derivative(const char* what, const char* instead) {
  TORCH_CHECK(!at::GradMode::is_enabled(), what, " a first derivative only; for a second one run ", instead);
}

// The gradients of a network's autograd function, whose `others` last arguments have none.
variable_list flatten(const NetworkGradients& d, size_t others) {
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

struct SavedNetwork {
  std::vector<Step> steps;
  std::vector<SavedLayer> layers;  // whose tensors autograd saves
  std::vector<int64_t> images;
};

std::array<Tensor*, 5> tensors_of(SavedLayer& layer) {
  return {&layer.weight, &layer.scale, &layer.u, &layer.mask, &layer.shift};
}

class Network : public torch::autograd::Function<Network> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, TensorList scales, TensorList shifts,
                               const std::vector<Tensor>& weights, const std::vector<int64_t>& numbers) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto requires_grad = [](const Tensor& table) { return table.requires_grad(); };
    const bool tables = std::any_of(scales.begin(), scales.end(), requires_grad) ||
                        std::any_of(shifts.begin(), shifts.end(), requires_grad);
    const auto steps = steps_of(numbers, weights.size());
    NetworkOutputs out =
        network_forward(x, scales, shifts, weights, steps, tables, tables || x.requires_grad());
    variable_list saved;
    for (SavedLayer& layer : out.layers) {
      for (Tensor* tensor : tensors_of(layer)) saved.push_back(std::exchange(*tensor, Tensor()));
    }
    ctx->save_for_backward(saved);
    Saved<SavedNetwork>::save(ctx, {steps, out.layers, x.sizes().vec()});
    ctx->set_materialize_grads(false);
    return out.means;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_first_derivative("a frozen network has", "it inside `with awnet.use_backend('reference')`");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    const SavedNetwork& network = Saved<SavedNetwork>::load(ctx);
    std::vector<SavedLayer> layers = network.layers;
    size_t next = 0;
    for (SavedLayer& layer : layers) {
      for (Tensor* tensor : tensors_of(layer)) *tensor = saved[next++];
    }
    return flatten(
        network_backward(network.steps, layers, network.images, grads, needs_of(*ctx, layers.size())), 2);
  }
};

std::vector<Tensor> network_native(const Tensor& x, TensorList scales, TensorList shifts, TensorList weights,
                                   Sizes numbers) {
  return network_forward(x, scales, shifts, weights, steps_of(numbers, weights.size()), false, false).means;
}

std::vector<Tensor> network_autograd(const Tensor& x, TensorList scales, TensorList shifts,
                                     TensorList weights, Sizes numbers) {
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
    check_first_derivative("a frozen network's coefficients have",
                           "it inside `with awnet.use_backend('reference')`");
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
  static variable_list forward(AutogradContext* ctx, const Tensor& x, TensorList scales, TensorList shifts,
                               const std::vector<Tensor>& weights, const std::vector<Tensor>& packed,
                               const std::vector<int64_t>& numbers, bool emulate) {
    at::AutoDispatchBelowADInplaceOrView guard;
    amx::NetworkArgs args = amx::network_args(x, scales, shifts, weights, packed, numbers, emulate);
    args.keep_mask = x.requires_grad();
    for (size_t i = 0; i < weights.size(); ++i) {
      args.keep_u[i] = scales[i].requires_grad() || shifts[i].requires_grad();
      args.keep_mask = args.keep_mask || args.keep_u[i];
    }
    const amx::Outputs outputs = amx::network_forward(args, x, scales, shifts, packed);
    variable_list tensors = packed;
    tensors.push_back(outputs.saved);
    ctx->save_for_backward(tensors);
    Saved<amx::NetworkArgs>::save(ctx, args);
    ctx->set_materialize_grads(false);
    return outputs.means;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_first_derivative("a frozen network has", "the network itself");
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list packed = ctx->get_saved_variables();
    const Tensor saved = packed.back();
    packed.pop_back();
    const auto& args = Saved<amx::NetworkArgs>::load(ctx);
    return flatten(amx::network_backward(args, packed, saved, grads, needs_of(*ctx, packed.size())), 4);
  }
};

std::vector<Tensor> amx_forward(const Tensor& x, TensorList scales, TensorList shifts, TensorList weights,
                                TensorList packed, Sizes numbers, bool emulate) {
  const auto args = amx::network_args(x, scales, shifts, weights, packed, numbers, emulate);
  return amx::network_forward(args, x, scales, shifts, packed).means;
}

std::vector<Tensor> amx_autograd(const Tensor& x, TensorList scales, TensorList shifts, TensorList weights,
                                 TensorList packed, Sizes numbers, bool emulate) {
  return AmxNetwork::apply(x, scales, shifts, weights.vec(), packed.vec(), numbers.vec(), emulate);
}

std::vector<Tensor> amx_convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                             const Conv& conv, bool need_input, bool need_weight) {
  const auto [d_input, d_weight] =
      amx::convolution_backward(grad, input, weight, conv, need_input, need_weight);
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
  m.impl("amx_convolution", boxed_function<&amx::convolution>());
  m.impl("amx_convolution_backward", boxed_function<&amx_convolution_backward>());
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
