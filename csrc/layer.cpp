// The whole layer as one operator with its gradient: the library's convolution around the passes and the
// algebra. awnet/ops/autograd.py is the same in Python for the backends whose passes are not native; the schemas
// are its own.
#include "layer.h"

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

namespace awnet {

namespace amx = cpu::amx;

namespace {

#define AWNET_FIELDS(space)                                                                           \
  &space::statistics, &space::apply, &space::reduce, &space::propagate, &space::testing_coefficients, \
      &space::testing_gradients, &space::batch_statistics, &space::training_coefficients,             \
      &space::training_sums, &space::training_gradients

struct Passes {
  decltype(&cpu::statistics) statistics;
  decltype(&cpu::apply) apply;
  decltype(&cpu::reduce) reduce;
  decltype(&cpu::propagate) propagate;
  decltype(&cpu::testing_coefficients) testing_coefficients;
  decltype(&cpu::testing_gradients) testing_gradients;
  decltype(&cpu::batch_statistics) batch_statistics;
  decltype(&cpu::training_coefficients) training_coefficients;
  decltype(&cpu::training_sums) training_sums;
  decltype(&cpu::training_gradients) training_gradients;
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

struct Norm {
  Tensor weight, bias, mean, var;
};

std::optional<Norm> norm_of(const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& mean,
                            const MaybeTensor& var) {
  if (!weight) return std::nullopt;
  return Norm{*table(weight), *table(bias), *table(mean), *table(var)};
}

// Collectives over a process group's ranks; awnet/ops/distributed.py registers them.
std::tuple<Tensor, Tensor, Tensor> joined_statistics(const Tensor& mean, const Tensor& var, const Tensor& n,
                                                     const std::string& process_group) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("awnet::joined_statistics", "")
                             .typed<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                                       const Tensor&, c10::string_view)>();
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

Outputs layer_forward(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& filter_scale,
                      const MaybeTensor& p_clean, const MaybeTensor& bn_weight, const MaybeTensor& bn_bias,
                      const MaybeTensor& residual, const MaybeTensor& running_mean,
                      const MaybeTensor& running_var, const MaybeTensor& is_clean, bool training, double eps,
                      bool relu, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                      std::string process_group, bool keep_u, bool keep_mask) {
  const Passes& passes = passes_of(input);
  const auto layout = layout_of(input);
  const auto floats = input.options().dtype(at::kFloat);
  Tensor u = input.contiguous(layout);
  Tensor mean = at::empty({0}, floats), m2 = at::empty({0}, floats);
  const auto norm = norm_of(bn_weight, bn_bias, running_mean, running_var);
  const bool by_batch = norm && training;
  const cpu::Window window{stride, padding, dilation};
  const bool direct = weight && u.is_cpu() && cpu::convolves(u, *weight, window, groups);
  if (direct && by_batch) {
    std::tie(u, mean, m2) = cpu::convolve_statistics(u, *weight, window);
  } else if (weight && !direct) {
    u = amx::takes(amx::Pass::kForward, u, *weight, {}, window, groups)
            ? amx::convolution(u, *weight, window)
            : at::convolution(u, *weight, std::nullopt, stride, padding, dilation, false, {0, 0}, groups);
    u = u.contiguous(layout);
  }
  const int64_t batch = u.size(0), channels = weight ? weight->size(0) : u.size(1);
  const MaybeTensor omega = table(filter_scale);
  Tensor batch_mean = at::empty({0}, floats), batch_var = at::empty({0}, floats), n = at::empty({0}, floats),
         scale, shift;
  if (!norm) {
    scale = omega ? *omega : at::ones({batch, channels}, floats);
    shift = bn_bias ? *table(bn_bias) : at::zeros_like(scale);  // without a norm's weight the shift itself
  } else if (training) {
    if (!direct) std::tie(mean, m2) = passes.statistics(u);
    const auto kind = dense(is_clean);
    std::tie(batch_mean, batch_var, n) =
        passes.batch_statistics(mean, m2, u.size(2) * u.size(3), omega, kind, norm->mean.size(0));
    if (!process_group.empty()) {
      std::tie(batch_mean, batch_var, n) = joined_statistics(batch_mean, batch_var, n, process_group);
    }
    std::tie(scale, shift) = passes.training_coefficients(omega, norm->weight, norm->bias, batch_mean,
                                                          batch_var, kind, eps, batch);
  } else {
    std::tie(scale, shift) = passes.testing_coefficients(omega, norm->weight, norm->bias, norm->mean,
                                                         norm->var, table(p_clean), eps, batch);
  }
  if (direct && !by_batch) {
    const auto [y, kept, mask] =
        cpu::convolve_apply(u, *weight, window, scale, shift, residual, relu, keep_u, keep_mask);
    return {y, kept, mask, mean, m2, batch_mean, batch_var, n};
  }
  const bool own_u = weight.has_value();
  auto [y, mask] = passes.apply(u, scale, shift, residual, relu, keep_mask, own_u && !keep_u);
  const Tensor kept = own_u && keep_u ? u : at::empty({0}, input.options());
  return {y, kept, mask, mean, m2, batch_mean, batch_var, n};
}

Gradients layer_backward(const Tensor& grad_in, const MaybeTensor& input, const MaybeTensor& weight,
                         const MaybeTensor& filter_scale, const MaybeTensor& p_clean,
                         const MaybeTensor& bn_weight, const MaybeTensor& bn_bias,
                         const MaybeTensor& /*residual*/, const MaybeTensor& running_mean,
                         const MaybeTensor& running_var, const MaybeTensor& is_clean, bool training,
                         double eps, bool /*relu*/, Sizes stride, Sizes padding, Sizes dilation,
                         int64_t groups, std::string process_group, const MaybeTensor& u_in,
                         const MaybeTensor& gate, const Tensor& mean, const Tensor& m2,
                         const Tensor& batch_mean, const Tensor& batch_var, const Tensor& n,
                         Sizes input_shape, bool channels_last, c10::List<bool> needs) {
  const bool need_input = needs[0], need_weight = needs[1], need_scale = needs[2], need_p = needs[3],
             need_gamma = needs[4], need_beta = needs[5], need_residual = needs[6];
  const Passes& passes = passes_of(grad_in);
  const auto layout = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor grad = grad_in.contiguous(layout);
  const MaybeTensor omega = table(filter_scale), p = table(p_clean);
  const auto norm = norm_of(bn_weight, bn_bias, running_mean, running_var);
  const bool by_batch = norm && training;
  const bool need_images = need_input || need_weight || need_residual;
  const int64_t hw = grad.size(2) * grad.size(3);

  const cpu::Window window{stride, padding, dilation};
  const bool direct = weight && need_input && grad.is_cpu() &&
                      cpu::convolves_back(input_shape, grad, *weight, window, groups);
  Tensor d_scale, d_p, d_gamma, d_beta, by_grad;
  MaybeTensor u, centre, by_input, constant;
  std::optional<cpu::Back> back;
  const auto convolve_back = [&](bool sums) {
    back = cpu::convolve_back(grad, u, centre, gate, by_grad, by_input, constant, *weight, input_shape,
                              window, sums, need_residual, need_weight);
  };
  if (need_scale || need_p || need_gamma || need_beta || (by_batch && need_images)) {
    TORCH_CHECK(u_in.has_value(), "the forward was told that its backward would not need u");
    u = u_in->contiguous(layout);
    // any centre is exact; one near the channel's mean keeps the digits, and a pixel of u is such a one
    centre = by_batch ? mean : u->select(3, 0).select(2, 0).to(at::kFloat).contiguous();
    Tensor g1, gc;
    if (direct && !norm) {
      by_grad = omega ? *omega : at::ones({grad.size(0), grad.size(1)}, grad.options());
      convolve_back(true);
      g1 = back->g1;
      gc = back->gc;
    } else {
      std::tie(g1, gc) = passes.reduce(grad, *u, *centre, gate);
    }
    if (!norm) {
      d_scale = at::addcmul(gc, *centre, g1);
      d_beta = g1;
    } else if (training) {
      const auto kind = dense(is_clean);
      Tensor gamma_part, beta_part, input_part, constant_part;
      MaybeTensor through;
      if (!process_group.empty()) {
        std::tie(d_gamma, d_beta, through) =
            passes.training_sums(g1, gc, mean, omega, norm->weight, batch_mean, batch_var, kind, eps);
        through = summed(*through, process_group);
      }
      std::tie(d_scale, gamma_part, beta_part, by_grad, input_part, constant_part) =
          passes.training_gradients(g1, gc, mean, m2, hw, omega, norm->weight, batch_mean, batch_var, n, kind,
                                    eps, need_scale, through);
      if (!through) {
        d_gamma = gamma_part;
        d_beta = beta_part;
      }
      by_input = input_part;
      constant = constant_part;
    } else {
      std::tie(d_scale, d_p, d_gamma, d_beta) =
          passes.testing_gradients(g1, gc, *centre, omega, norm->weight, norm->bias, norm->mean, norm->var, p,
                                   eps, {need_scale, need_p, need_gamma, need_beta});
    }
  }
  Tensor d_input, d_weight, d_residual, d_u;
  if (need_images) {
    if (!by_grad.defined()) {
      if (norm) {
        by_grad = std::get<0>(passes.testing_coefficients(omega, norm->weight, norm->bias, norm->mean,
                                                          norm->var, p, eps, grad.size(0)));
      } else {
        by_grad = omega ? *omega : at::ones({grad.size(0), grad.size(1)}, grad.options().dtype(at::kFloat));
      }
    }
    if (direct) {
      if (!back) convolve_back(false);
      d_input = back->d_input;
      d_residual = back->d_residual;
      d_u = back->d_u;
    } else {
      std::tie(d_u, d_residual) =
          passes.propagate(grad, u, centre, gate, by_grad, by_input, constant, need_residual);
    }
  }
  const bool ask_input = need_input && !direct;
  if (!weight) {
    d_input = d_u;
  } else if (ask_input || need_weight) {
    // the gradient of the input needs the input's shape alone
    const Tensor source = input ? *input : at::empty(input_shape, grad.options(), layout);
    const cpu::Window window{stride, padding, dilation};
    const bool input_on_tiles =
        ask_input && amx::takes(amx::Pass::kInputGradient, source, *weight, d_u, window, groups);
    const bool weight_on_tiles =
        need_weight && amx::takes(amx::Pass::kWeightGradient, source, *weight, d_u, window, groups);
    const auto [input_found, weight_found] =
        amx::convolution_backward(d_u, source, *weight, window, input_on_tiles, weight_on_tiles);
    const std::array<bool, 3> rest = {ask_input && !input_on_tiles, need_weight && !weight_on_tiles, false};
    Tensor d_rest;
    if (rest[0] || rest[1]) {
      std::tie(d_rest, d_weight, std::ignore) = at::convolution_backward(
          d_u, source, *weight, std::nullopt, stride, padding, dilation, false, {0, 0}, groups, rest);
    }
    if (ask_input) d_input = input_on_tiles ? input_found : d_rest;
    if (weight_on_tiles) d_weight = weight_found;
  }
  const auto wanted = [&](bool need, const Tensor& value, at::ScalarType dtype) {
    return need && value.defined() ? value.to(dtype) : at::empty({0}, grad.options());
  };
  const auto images = grad.scalar_type();
  const auto dtype_of = [&](const MaybeTensor& x) { return x ? x->scalar_type() : images; };
  return {wanted(need_input, d_input, images),
          wanted(need_weight, d_weight, images),
          wanted(need_scale, d_scale, dtype_of(filter_scale)),
          wanted(need_p, d_p, dtype_of(p_clean)),
          wanted(need_gamma, d_gamma, dtype_of(bn_weight)),
          wanted(need_beta, d_beta, dtype_of(bn_bias)),
          wanted(need_residual, d_residual, images)};
}

namespace {

// --- autograd: in C++, where only the gradients that are asked for at run time are computed

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

constexpr int kArguments = 20, kDifferentiable = 7;

Outputs call_forward(const Tensor& input, const std::vector<MaybeTensor>& t, bool training, double eps,
                     bool relu, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                     const std::string& process_group, bool keep_u, bool keep_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("awnet::layer_native", "")
                             .typed<decltype(layer_forward)>();
  return op.call(input, t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], training, eps, relu, stride,
                 padding, dilation, groups, process_group, keep_u, keep_mask);
}

class Layer : public torch::autograd::Function<Layer> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const MaybeTensor& weight,
                               const MaybeTensor& filter_scale, const MaybeTensor& p_clean,
                               const MaybeTensor& bn_weight, const MaybeTensor& bn_bias,
                               const MaybeTensor& residual, const MaybeTensor& running_mean,
                               const MaybeTensor& running_var, const MaybeTensor& is_clean, bool training,
                               double eps, bool relu, std::vector<int64_t> stride,
                               std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                               std::string process_group, bool keep_u, bool keep_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [y, u, mask, mean, m2, batch_mean, batch_var, n] = call_forward(
        input,
        {input, weight, filter_scale, p_clean, bn_weight, bn_bias, residual, running_mean, running_var,
         is_clean},
        training, eps, relu, stride, padding, dilation, groups, process_group, keep_u, keep_mask);
    // without a weight the input is u itself; with one, its values serve the weight's gradient only
    const bool keep_input = weight ? weight->requires_grad() : keep_u;
    const Tensor gate = keep_mask ? mask : y, kept_u = weight && keep_u ? u : Tensor();
    const auto kept = [](const MaybeTensor& x) { return x ? *x : Tensor(); };
    ctx->save_for_backward({keep_input ? input : Tensor(), kept(weight), kept(filter_scale), kept(p_clean),
                            kept(bn_weight), kept(bn_bias),
                            // training normalises by the batch, and is about to change the running statistics
                            training ? batch_mean : kept(running_mean),
                            training ? batch_var : kept(running_var), kept(is_clean), relu ? gate : Tensor(),
                            kept_u, mean, m2, batch_mean, batch_var, n});
    ctx->saved_data["folded"] = weight.has_value();
    ctx->saved_data["channels_last"] = layout_of(y) == at::MemoryFormat::ChannelsLast;
    ctx->saved_data["process_group"] = process_group;
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["relu"] = relu;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["shape"] = input.sym_sizes().vec();
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({u, mask, mean, m2, batch_mean, batch_var, n});
    return {y, u, mask, mean, m2, batch_mean, batch_var, n};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(kArguments);
    if (!grads[0].defined()) return result;
    const variable_list s = ctx->get_saved_variables();
    const auto maybe = [](const Tensor& x) { return x.defined() ? MaybeTensor(x) : std::nullopt; };
    const auto& data = ctx->saved_data;
    const bool folded = data.at("folded").toBool();
    // autograd numbers the tensors that were there, not the arguments
    const bool present[kDifferentiable] = {true,
                                           folded,
                                           s[2].defined(),
                                           s[3].defined(),
                                           s[4].defined(),
                                           s[5].defined(),
                                           data.at("has_residual").toBool()};
    c10::List<bool> needs;
    for (int i = 0, edge = 0; i < kDifferentiable; ++i) {
      needs.push_back(present[i] && ctx->needs_input_grad(edge));
      edge += present[i];
    }
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("awnet::layer_native_backward", "")
            .typed<Gradients(const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                             const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                             const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, bool, double, bool,
                             Sizes, Sizes, Sizes, int64_t, std::string, const MaybeTensor&,
                             const MaybeTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                             const Tensor&, c10::SymIntArrayRef, bool, c10::List<bool>)>();
    const auto ints = [&](const char* name) { return data.at(name).toIntVector(); };
    const auto shape = data.at("shape").toSymIntVector();
    // the operator's own autograd only says that there is no second derivative
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled()) guard.emplace();
    const auto found =
        op.call(grads[0], folded ? maybe(s[0]) : std::nullopt, maybe(s[1]), maybe(s[2]), maybe(s[3]),
                maybe(s[4]), maybe(s[5]), std::nullopt, maybe(s[6]), maybe(s[7]), maybe(s[8]),
                data.at("training").toBool(), data.at("eps").toDouble(), data.at("relu").toBool(),
                ints("stride"), ints("padding"), ints("dilation"), data.at("groups").toInt(),
                data.at("process_group").toStringRef(), maybe(folded ? s[10] : s[0]), maybe(s[9]), s[11],
                s[12], s[13], s[14], s[15], shape, data.at("channels_last").toBool(), needs);
    const Tensor all[kDifferentiable] = {std::get<0>(found), std::get<1>(found), std::get<2>(found),
                                         std::get<3>(found), std::get<4>(found), std::get<5>(found),
                                         std::get<6>(found)};
    for (int i = 0; i < kDifferentiable; ++i) {
      if (needs[i]) result[i] = all[i];
    }
    return result;
  }
};

Outputs differentiable(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& filter_scale,
                       const MaybeTensor& p_clean, const MaybeTensor& bn_weight, const MaybeTensor& bn_bias,
                       const MaybeTensor& residual, const MaybeTensor& running_mean,
                       const MaybeTensor& running_var, const MaybeTensor& is_clean, bool training, double eps,
                       bool relu, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                       std::string process_group, bool keep_u, bool keep_mask) {
  const auto r = Layer::apply(input, weight, filter_scale, p_clean, bn_weight, bn_bias, residual,
                              running_mean, running_var, is_clean, training, eps, relu, stride.vec(),
                              padding.vec(), dilation.vec(), groups, process_group, keep_u, keep_mask);
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(awnet, m) {
  const std::string arguments =
      " input, Tensor? weight, Tensor? filter_scale, Tensor? p_clean, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor? residual, Tensor? running_mean, Tensor? running_var, Tensor? is_clean, bool training, float "
      "eps, bool relu, int[2] stride, int[2] padding, int[2] dilation, int groups, str process_group, ";
  const std::string forward_schema =
      "layer_native(Tensor" + arguments +
      "bool keep_u, bool keep_mask) -> (Tensor y, Tensor u, Tensor mask, Tensor "
      "mean, Tensor m2, Tensor batch_mean, Tensor batch_var, Tensor n)";
  const std::string backward_schema =
      "layer_native_backward(Tensor grad, Tensor?" + arguments +
      "Tensor? u, Tensor? gate, Tensor mean, Tensor m2, Tensor batch_mean, Tensor batch_var, Tensor n, "
      "SymInt[] input_shape, bool channels_last, bool[] needs) -> (Tensor input, Tensor weight, Tensor "
      "filter_scale, Tensor p_clean, Tensor bn_weight, Tensor bn_bias, Tensor residual)";
  m.def(forward_schema.c_str());
  m.def(backward_schema.c_str());
}

TORCH_LIBRARY_IMPL(awnet, CPU, m) {
  m.impl("layer_native", &layer_forward);
  m.impl("layer_native_backward", &layer_backward);
}

#if defined(AWNET_CUDA)
TORCH_LIBRARY_IMPL(awnet, CUDA, m) {
  m.impl("layer_native", &layer_forward);
  m.impl("layer_native_backward", &layer_backward);
}
#endif

TORCH_LIBRARY_IMPL(awnet, Autograd, m) { m.impl("layer_native", &differentiable); }

}  // namespace awnet
