// A frozen network below autograd: the forward and backward of layers act(conv(x) * scale + shift + residual)
// in sequence. It is one operator because with small images on a CPU the overhead between two layers is as
// long as a layer. The mean over a layer's output is computed while the output is in the cache.
#include "network.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <numeric>

#include "layer.h"

namespace awnet {
namespace {

void add(Tensor& total, const Tensor& part) { total = total.defined() ? total.add_(part) : part; }

// The gradient of images from that of their means.
Tensor mean_backward(const Tensor& d_mean, Sizes shape) {
  return at::div(d_mean, shape[2] * shape[3]).unsqueeze(-1).unsqueeze(-1).expand(shape);
}

}  // namespace

NetworkOutputs network_forward(const Tensor& x, TensorList scales, TensorList shifts, TensorList weights,
                               const std::vector<Step>& steps, bool keep_u, bool keep_mask) {
  const size_t count = steps.size();
  TORCH_CHECK(scales.size() == count && shifts.size() == count, "expected a scale and a shift for each of ",
              count, " layers, got ", scales.size(), " and ", shifts.size());
  std::vector<size_t> last(count);  // the layer that reads a layer's output last
  for (size_t i = 0; i < count; ++i) {
    if (steps[i].input >= 0) last[steps[i].input] = i;
    if (steps[i].residual >= 0) last[steps[i].residual] = i;
  }
  std::vector<Tensor> y(count);
  NetworkOutputs out;
  for (size_t i = 0; i < count; ++i) {
    const Step& s = steps[i];
    const std::array<int64_t, 2> table = {x.size(0), weights[i].size(0)};
    TORCH_CHECK(scales[i].sizes() == Sizes(table) && shifts[i].sizes() == Sizes(table), "layer ", i,
                " needs a scale and a shift ", Sizes(table), ", got ", scales[i].sizes(), " and ",
                shifts[i].sizes());
    const MaybeTensor residual = s.residual < 0 ? std::nullopt : MaybeTensor(y[s.residual]);
    const bool mask_from_u = fuses(x) && s.activation == kRelu && keep_mask && keep_u && s.residual < 0;
    SavedLayer layer{weights[i], scales[i]};
    std::tie(y[i], layer.u, layer.mask) = affine_forward(
        {s.input < 0 ? x : y[s.input], weights[i], s.conv, scales[i], shifts[i], residual, s.activation},
        {keep_u, keep_mask && s.activation != kNone && !mask_from_u});
    if (mask_from_u) layer.shift = shifts[i];
    layer.shape = y[i].sizes().vec();
    layer.channels_last = layout_of(y[i]) == at::MemoryFormat::ChannelsLast;
    out.layers.push_back(std::move(layer));
    if (s.averaged) out.means.push_back(at::mean(y[i], {2, 3}));
    for (const int64_t source : {s.input, s.residual}) {
      if (source >= 0 && last[source] == i) y[source] = Tensor();
    }
  }
  return out;
}

NetworkGradients network_backward(const std::vector<Step>& steps, const std::vector<SavedLayer>& layers,
                                  Sizes images, TensorList d_means, const NetworkNeeds& needs) {
  const size_t count = steps.size();
  NetworkGradients result{Tensor(), std::vector<Tensor>(count), std::vector<Tensor>(count)};
  // of the layers' outputs; where `fuses`, the layer itself adds a second one
  std::vector<Tensor> d(count), second(count);
  size_t means = d_means.size();
  const auto collect = [&](int64_t source, const Tensor& grad) {
    if (d[source].defined() && !second[source].defined() && fuses(grad)) {
      second[source] = grad;
    } else {
      add(d[source], grad);
    }
  };
  for (size_t i = count; i-- > 0;) {
    const Step& s = steps[i];
    const SavedLayer& layer = layers[i];
    MaybeTensor d_mean;
    if (s.averaged && d_means[--means].defined()) {
      if (d[i].defined() && fuses(d[i])) {
        d_mean = d_means[means].to(at::kFloat);
      } else {
        add(d[i], mean_backward(d_means[means], layer.shape));
      }
    }
    if (!d[i].defined()) continue;
    const Sizes input_shape = s.input < 0 ? images : Sizes(layers[s.input].shape);
    AffineBackwardArgs args{d[i], {}, input_shape.vec(), layer.weight, s.conv};
    args.d_mean = d_mean;
    if (second[i].defined()) args.other_grad = second[i];
    d[i] = second[i] = Tensor();
    args.need_input = s.input >= 0 || needs.x;
    args.need_residual = s.residual >= 0;
    args.need_sums = needs.scales[i] || needs.shifts[i];
    const bool fused = fuses(args.grad), mask_from_u = layer.shift.defined();
    args.centered = false;
    if (args.need_sums || mask_from_u) args.u = layer.u;
    if (args.need_sums && !fused) args.center = center_of(layer.u);
    if (mask_from_u) {
      args.shift = layer.shift.to(at::kFloat);
    } else if (s.activation == kRelu) {
      args.relu_mask = layer.mask;
    } else if (s.activation != kNone) {
      args.slope = layer.mask;
    }
    args.propagation.by_grad = layer.scale.to(at::kFloat);
    args.channels_last = layer.channels_last;
    const bool joins = fused && s.input >= 0;  // the layer below adds the gradients
    Tensor& d_input = s.input < 0 ? result.x : d[s.input];
    if (args.need_input && !joins && d_input.defined()) args.add_to = d_input;
    const bool need_input = args.need_input;
    const auto [d_x, d_weight, d_residual, sums] = affine_backward(std::move(args));
    if (joins && need_input) {
      collect(s.input, d_x);
    } else if (need_input) {
      d_input = d_x;
    }
    if (s.residual >= 0) collect(s.residual, d_residual);
    if (needs.scales[i]) result.scales[i] = scale_gradient(sums);
    if (needs.shifts[i]) result.shifts[i] = sums.g1;
  }
  return result;
}

namespace {

MixNorm norm_of(const CoefficientArgs& args) {
  const Tensor& tables = args.tables;
  TORCH_CHECK(tables.scalar_type() == at::kFloat && tables.is_contiguous() && tables.dim() == 3 &&
                  tables.size(0) == 4 && tables.size(1) == 2,
              "tables must be contiguous float32 [4, 2, T], got ", tables.scalar_type(), " ", tables.sizes());
  TORCH_CHECK(std::accumulate(args.widths.begin(), args.widths.end(), int64_t{0}) == tables.size(2),
              "the widths ", args.widths, " do not sum to ", tables.size(2));
  MixNorm norm;
  norm.weight = tables.select(0, 0);
  norm.bias = tables.select(0, 1);
  norm.mean = tables.select(0, 2);
  norm.var = tables.select(0, 3);
  norm.eps = args.eps;
  return norm;
}

// With a filter scale of 1 for the columns that have none.
Mix mix_of(const CoefficientArgs& args) {
  Mix mix;
  mix.p_clean = args.p_clean.contiguous();
  if (!args.filter_scale) return mix;
  const Tensor& filter_scale = *args.filter_scale;
  const int64_t others = args.tables.size(2) - filter_scale.size(1);
  mix.filter_scale =
      others == 0
          ? filter_scale.contiguous()
          : at::cat({filter_scale, at::ones({filter_scale.size(0), others}, filter_scale.options())}, 1);
  return mix;
}

}  // namespace

std::vector<Tensor> network_coefficients(const CoefficientArgs& args) {
  const auto [scale, shift] = cpu::eval_coefficients(mix_of(args), norm_of(args), args.p_clean.size(0));
  std::vector<Tensor> outputs;
  int64_t first = 0;
  for (const int64_t width : args.widths) {
    outputs.push_back(scale.narrow(1, first, width).contiguous());
    outputs.push_back(shift.narrow(1, first, width).contiguous());
    first += width;
  }
  return outputs;
}

std::pair<Tensor, Tensor> network_coefficients_backward(const CoefficientArgs& args, TensorList grads) {
  const int64_t batch = args.p_clean.size(0);
  std::vector<Tensor> d_scales, d_shifts;
  for (size_t i = 0; i < args.widths.size(); ++i) {
    const auto given = [&](const Tensor& grad) {
      return grad.defined() ? grad : at::zeros({batch, args.widths[i]}, args.tables.options());
    };
    d_scales.push_back(given(grads[2 * i]));
    d_shifts.push_back(given(grads[2 * i + 1]));
  }
  // around a center of 0 the sums are the gradients of shift and scale
  const Reduced sums{at::cat(d_shifts, 1), at::cat(d_scales, 1),
                     at::zeros({batch, args.tables.size(2)}, args.tables.options())};
  Needs needs;
  needs.filter_scale = args.filter_scale.has_value();
  needs.p_clean = true;
  const auto [d_filter_scale, d_p_clean, d_weight, d_bias] =
      cpu::eval_gradients(sums, mix_of(args), norm_of(args), needs);
  return {needs.filter_scale ? d_filter_scale.narrow(1, 0, args.filter_scale->size(1)) : Tensor(), d_p_clean};
}

}  // namespace awnet
