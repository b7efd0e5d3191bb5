// A whole layer with its gradient: the convolution, the passes and the coefficients. awnet/ops/autograd.py is
// the same in Python for the backends whose passes are not native.
#include "layer.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "cpu/amx/amx.h"
#include "cpu/convolution.h"
#include "tensors.h"

namespace awnet {

namespace amx = cpu::amx;

namespace {

struct Passes {
#define AWNET_FIELD(op) decltype(&cpu::op) op;
  AWNET_FOR_EACH_OP(AWNET_FIELD)
};

#define AWNET_ON_CPU(op) &cpu::op,
#define AWNET_ON_CUDA(op) &cuda::op,

const Passes& passes_of(const Tensor& x) {
  static const Passes on_cpu = {AWNET_FOR_EACH_OP(AWNET_ON_CPU)};
#if defined(AWNET_CUDA)
  static const Passes on_cuda = {AWNET_FOR_EACH_OP(AWNET_ON_CUDA)};
  if (x.is_cuda()) return on_cuda;
#endif
  TORCH_CHECK(x.is_cpu(), "this build of awnet has no native kernels for ", x.device());
  return on_cpu;
}

MaybeTensor table(const MaybeTensor& x) {
  return x ? MaybeTensor(x->to(at::kFloat).contiguous()) : std::nullopt;
}

// The [B, C] inputs in the dtype and layout that the passes take.
Mix to_tables(const Mix& mix) {
  return {table(mix.filter_scale), table(mix.p_clean),
          mix.is_clean ? MaybeTensor(mix.is_clean->contiguous()) : std::nullopt};
}

std::optional<MixNorm> to_tables(std::optional<MixNorm> norm) {
  if (norm) {
    for (Tensor* x : {&norm->weight, &norm->bias, &norm->mean, &norm->var}) *x = *table(*x);
  }
  return norm;
}

// Collectives over the ranks of a process group; awnet/ops/distributed.py registers them.
using BatchStats = std::tuple<Tensor, Tensor, Tensor>;  // mean, var, n

BatchStats joined_statistics(const BatchStats& local, const std::string& process_group) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("awnet::joined_statistics", "")
          .typed<BatchStats(const Tensor&, const Tensor&, const Tensor&, c10::string_view)>();
  const auto& [mean, var, n] = local;
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

bool fuses([[maybe_unused]] const Tensor& x) {
#if defined(AWNET_CUDA)
  return x.is_cuda();
#else
  return false;
#endif
}

Tensor scale_gradient(const Reduced& sums) {
  return sums.center.defined() ? at::addcmul(sums.gc, sums.center, sums.g1) : sums.gc;
}

Tensor center_of(const Tensor& u) {
  // any center is exact; one near the channel's mean keeps the digits, and a pixel of u is near it
  return u.select(3, 0).select(2, 0).to(at::kFloat).contiguous();
}

namespace {

Tensor convolve(const Tensor& x, const Tensor& weight, const Conv& conv) {
  const auto layout = layout_of(x);
  if (amx::takes(amx::Pass::kForward, x, weight, {}, conv)) {
    return amx::convolution(x, weight, conv).contiguous(layout);
  }
  return at::convolution(x, weight, std::nullopt, conv.stride, conv.padding, conv.dilation, false, {0, 0},
                         conv.groups)
      .contiguous(layout);
}

bool direct(const Tensor& x, const MaybeTensor& weight, const Conv& conv) {
  return weight && x.is_cpu() && cpu::convolves(x, *weight, conv);
}

// The gradients of the convolution's input and weight. The first needs only the shape of `input`.
std::pair<Tensor, Tensor> convolution_gradients(const Tensor& d_u, const Tensor& input, const Tensor& weight,
                                                const Conv& conv, bool need_input, bool need_weight) {
  const bool input_on_tiles = need_input && amx::takes(amx::Pass::kInputGradient, input, weight, d_u, conv);
  const bool weight_on_tiles =
      need_weight && amx::takes(amx::Pass::kWeightGradient, input, weight, d_u, conv);
  auto [d_input, d_weight] =
      amx::convolution_backward(d_u, input, weight, conv, input_on_tiles, weight_on_tiles);
  const std::array<bool, 3> rest = {need_input && !input_on_tiles, need_weight && !weight_on_tiles, false};
  if (rest[0] || rest[1]) {
    const auto grads = at::convolution_backward(d_u, input, weight, std::nullopt, conv.stride, conv.padding,
                                                conv.dilation, false, {0, 0}, conv.groups, rest);
    if (rest[0]) d_input = std::get<0>(grads);
    if (rest[1]) d_weight = std::get<1>(grads);
  }
  // the fake kernel promises the weight's strides; the library may return the input's layout
  if (need_weight && d_weight.strides() != weight.strides()) {
    d_weight = new_tensor_like(weight).copy_(d_weight);
  }
  return {d_input, d_weight};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> affine_forward(const AffineArgs& args, Keep keep) {
  const Tensor x = args.input.contiguous(layout_of(args.input));
  const Tensor scale = *table(args.scale), shift = *table(args.shift);
  if (direct(x, args.weight, args.conv)) {
    return cpu::convolve_apply({x, args.weight, args.conv, scale, shift, args.residual, args.activation},
                               keep);
  }
  const Tensor u = args.weight ? convolve(x, *args.weight, args.conv) : x;
  const bool keep_u = args.weight && keep.u;  // without a weight u is the input
  const auto [y, mask] = passes_of(x).apply(u, scale, shift, args.residual, args.activation, keep.mask,
                                            args.weight.has_value() && !keep_u);
  return {y, keep_u ? u : at::empty({0}, x.options()), mask};
}

namespace {

// d_u, d_residual and the sums.
std::tuple<Tensor, Tensor, Reduced> eval_backward([[maybe_unused]] const AffineBackwardArgs& args) {
#if defined(AWNET_CUDA)
  const bool reads_u = args.need_sums || args.shift;
  const auto out = cuda::eval_backward(
      {args.grad, args.other_grad, args.d_mean, reads_u ? args.u : std::nullopt, args.relu_mask, args.slope,
       args.propagation.by_grad, args.shift, args.need_residual, args.need_sums, args.centered});
  return {out.d_u, out.d_residual, out.sums};
#else
  TORCH_CHECK(false, "this build of awnet has no CUDA kernels");
#endif
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Reduced> affine_backward(AffineBackwardArgs args) {
  const Passes& passes = passes_of(args.grad);
  const auto layout = args.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor& grad = args.grad = args.grad.contiguous(layout);
  const MaybeTensor &weight = args.weight, add_to = args.add_to;
  Tensor d_input, d_weight, d_residual, d_u;
  Reduced sums;
  if (weight && args.need_input && grad.is_cpu() &&
      cpu::convolves_backward(args.input_shape, grad, *weight, args.conv)) {
    if (add_to && !add_to->is_contiguous()) args.add_to.reset();
    std::tie(d_input, d_residual, d_u, sums) = cpu::convolve_backward(args);
    if (args.need_weight) {
      d_weight = convolution_gradients(d_u, args.input, *weight, args.conv, false, true).second;
    }
    if (add_to && !args.add_to) d_input = add_to->add_(d_input);
    return {d_input, d_weight, d_residual, sums};
  }
  if (fuses(grad) && !args.propagation.by_input) {
    std::tie(d_u, d_residual, sums) = eval_backward(args);
  } else {
    if (args.need_sums) {
      std::tie(sums.g1, sums.gc) = passes.reduce(grad, *args.u, *args.center, args.relu_mask, args.slope);
      sums.center = *args.center;
    }
    if (args.need_input || args.need_weight || args.need_residual) {
      std::tie(d_u, d_residual) = passes.propagate(grad, args.u, args.center, args.relu_mask,
                                                   args.propagation, args.need_residual, args.slope);
    }
  }
  if (!weight) {
    d_input = d_u;
  } else if (args.need_input || args.need_weight) {
    const Tensor input =
        args.input.defined() ? args.input : at::empty(args.input_shape, grad.options(), layout);
    std::tie(d_input, d_weight) =
        convolution_gradients(d_u, input, *weight, args.conv, args.need_input, args.need_weight);
  }
  if (add_to && args.need_input) d_input = add_to->add_(d_input);
  return {d_input, d_weight, d_residual, sums};
}

LayerOutputs layer_forward(const LayerArgs& args, Keep keep) {
  const Passes& passes = passes_of(args.input);
  const auto floats = args.input.options().dtype(at::kFloat);
  const MaybeTensor& weight = args.weight;
  const Mix mix = to_tables(args.mix);
  auto norm = to_tables(args.norm);
  const int64_t batch = args.input.size(0), channels = weight ? weight->size(0) : args.input.size(1);
  LayerOutputs out;
  if (!norm || !norm->training) {
    for (Tensor* x : {&out.mean, &out.m2, &out.batch_mean, &out.batch_var, &out.n}) {
      *x = at::empty({0}, floats);
    }
    AffineArgs affine{args.input, weight, args.conv, {}, {}, args.residual, args.activation};
    if (norm) {
      std::tie(affine.scale, affine.shift) = passes.eval_coefficients(mix, *norm, batch);
    } else {
      affine.scale = mix.filter_scale ? *mix.filter_scale : at::ones({batch, channels}, floats);
      affine.shift = args.shift ? *args.shift : at::zeros({batch, channels}, floats);
    }
    std::tie(out.y, out.u, out.mask) = affine_forward(affine, keep);
    return out;
  }
  Tensor u = args.input.contiguous(layout_of(args.input));
  if (direct(u, weight, args.conv)) {
    std::tie(u, out.mean, out.m2) = cpu::convolve_statistics(u, *weight, args.conv);
  } else {
    if (weight) u = convolve(u, *weight, args.conv);
    std::tie(out.mean, out.m2) = passes.statistics(u);
  }
  auto stats = passes.batch_statistics({out.mean, out.m2, u.size(2) * u.size(3)}, mix, norm->mean.size(0));
  if (!norm->process_group.empty()) stats = joined_statistics(stats, norm->process_group);
  std::tie(out.batch_mean, out.batch_var, out.n) = stats;
  norm->mean = out.batch_mean;
  norm->var = out.batch_var;
  const auto [scale, shift] = passes.train_coefficients(mix, *norm, batch);
  const bool keep_u = weight && keep.u;
  std::tie(out.y, out.mask) =
      passes.apply(u, scale, shift, args.residual, args.activation, keep.mask, weight.has_value() && !keep_u);
  out.u = keep_u ? u : at::empty({0}, args.input.options());
  return out;
}

LayerGradients layer_backward(const LayerBackwardArgs& b) {
  const LayerArgs& args = b.args;
  const Needs& needs = b.needs;
  const Passes& passes = passes_of(b.grad);
  const auto layout = b.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor grad = b.grad.contiguous(layout);
  const int64_t batch = grad.size(0), channels = grad.size(1);
  const Mix mix = to_tables(args.mix);
  const auto norm = to_tables(args.norm);
  const bool batch_stats = norm && norm->training;
  AffineBackwardArgs affine{grad, args.input, b.input_shape, args.weight, args.conv};
  affine.relu_mask = b.relu_mask;
  affine.slope = b.slope;
  affine.channels_last = b.channels_last;
  affine.need_input = needs.input;
  affine.need_weight = needs.weight;
  affine.need_residual = needs.residual;
  affine.need_sums = !batch_stats && needs.coefficients();
  affine.centered = norm.has_value();
  if (needs.coefficients() || (batch_stats && needs.images())) {
    TORCH_CHECK(b.u.has_value(), "the forward was called with keep_u=False, and this backward needs u");
    affine.u = b.u->contiguous(layout);
    if (batch_stats || !fuses(grad)) affine.center = batch_stats ? b.mean : center_of(*affine.u);
  }
  LayerGradients d;
  if (batch_stats && affine.u) {
    Reduced sums{{}, {}, b.mean};
    std::tie(sums.g1, sums.gc) = passes.reduce(grad, *affine.u, b.mean, b.relu_mask, b.slope);
    MaybeTensor through;
    if (!norm->process_group.empty()) {
      std::tie(d.bn_weight, d.bn_bias, through) = passes.train_sums(sums, mix, *norm);
      through = summed(*through, norm->process_group);
    }
    Tensor d_weight, d_bias;
    std::tie(d.filter_scale, d_weight, d_bias, affine.propagation.by_grad, affine.propagation.by_input,
             affine.propagation.constant) =
        passes.train_gradients(sums, {b.mean, b.m2, grad.size(2) * grad.size(3)}, mix, *norm, b.n,
                               needs.filter_scale, through);
    if (!through) {
      d.bn_weight = d_weight;
      d.bn_bias = d_bias;
    }
  } else if (needs.images() || (affine.need_sums && fuses(grad))) {
    affine.propagation.by_grad = norm ? std::get<0>(passes.eval_coefficients(mix, *norm, batch))
                                 : mix.filter_scale
                                     ? *mix.filter_scale
                                     : at::ones({batch, channels}, grad.options().dtype(at::kFloat));
  }
  if (needs.images() || affine.need_sums) {
    Reduced sums;
    std::tie(d.input, d.weight, d.residual, sums) = affine_backward(affine);
    if (affine.need_sums && norm) {
      std::tie(d.filter_scale, d.p_clean, d.bn_weight, d.bn_bias) =
          passes.eval_gradients(sums, mix, *norm, needs);
    } else if (affine.need_sums) {
      d.filter_scale = scale_gradient(sums);
      d.shift = sums.g1;
    }
  }
  // in the dtype of the argument; empty where not required
  const auto finish = [&](bool need, Tensor& value, const MaybeTensor& argument) {
    const auto dtype = argument ? argument->scalar_type() : grad.scalar_type();
    value = need && value.defined() ? value.to(dtype) : at::empty({0}, grad.options());
  };
  finish(needs.input, d.input, grad);
  finish(needs.weight, d.weight, grad);
  finish(needs.filter_scale, d.filter_scale, args.mix.filter_scale);
  finish(needs.p_clean, d.p_clean, args.mix.p_clean);
  finish(needs.bn_weight, d.bn_weight, args.norm ? args.norm->weight : grad);
  finish(needs.bn_bias, d.bn_bias, args.norm ? args.norm->bias : grad);
  finish(needs.shift, d.shift, args.shift);
  finish(needs.residual, d.residual, grad);
  return d;
}

}  // namespace awnet
