// Many layers of a frozen network as one operator: act(conv(x) * scale + shift + residual) one after another,
// and back. Small images on a CPU would else spend as long between the layers as in them. Of a layer's output
// it gives the mean over pixels, taken while the output is in the cache.
#include "network.h"

#include <ATen/ops/addcmul.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "arithmetic.h"
#include "cpu/convolution.h"
#include "layer.h"

namespace awnet {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Layer {
  Tensor u, mask;
  std::vector<int64_t> shape;  // of its output
  bool channels_last;
};

// The means of the layers with `averaged`, and of each layer what its backward needs.
std::pair<variable_list, std::vector<Layer>> run(const Tensor& x, at::TensorList scales,
                                                 at::TensorList shifts, at::TensorList weights,
                                                 const std::vector<Step>& steps, bool keep_u,
                                                 bool keep_mask) {
  const size_t count = steps.size();
  TORCH_CHECK(scales.size() == count && shifts.size() == count, "expected a scale and a shift for each of ",
              count, " layers, got ", scales.size(), " and ", shifts.size());
  std::vector<size_t> last(count);  // layer that takes a layer's output last
  for (size_t i = 0; i < count; ++i) {
    if (steps[i].input >= 0) last[steps[i].input] = i;
    if (steps[i].residual >= 0) last[steps[i].residual] = i;
  }
  std::vector<Tensor> y(count);
  std::vector<Layer> layers;
  variable_list means;
  for (size_t i = 0; i < count; ++i) {
    const Step& s = steps[i];
    const Tensor& input = s.input < 0 ? x : y[s.input];
    const MaybeTensor residual = s.residual < 0 ? std::nullopt : MaybeTensor(y[s.residual]);
    const std::array<int64_t, 2> table = {x.size(0), weights[i].size(0)};
    TORCH_CHECK(scales[i].sizes() == Sizes(table) && shifts[i].sizes() == Sizes(table), "layer ", i,
                " needs a scale and a shift ", Sizes(table), ", got ", scales[i].sizes(), " and ",
                shifts[i].sizes());
    Tensor u, mask;
    const cpu::Window window{s.stride, s.padding, s.dilation};
    if (cpu::convolves(input, weights[i], window, s.groups)) {
      std::tie(y[i], u, mask) = cpu::convolve_apply(input, weights[i], window, scales[i], shifts[i], residual,
                                                    s.relu, keep_u, keep_mask && s.relu);
    } else {
      LayerArgs args;
      args.input = input;
      args.weight = weights[i];
      args.conv = {s.stride, s.padding, s.dilation, s.groups};
      args.mix.filter_scale = scales[i];
      args.shift = shifts[i];
      args.residual = residual;
      args.relu = s.relu;
      const LayerOutputs out = layer_forward(args, {keep_u, keep_mask && s.relu});
      y[i] = out.y;
      u = out.u;
      mask = out.mask;
    }
    layers.push_back({u, mask, y[i].sizes().vec(), layout_of(y[i]) == at::MemoryFormat::ChannelsLast});
    if (s.averaged) means.push_back(at::mean(y[i], {2, 3}));
    for (const int64_t source : {s.input, s.residual}) {
      if (source >= 0 && last[source] == i) y[source] = Tensor();
    }
  }
  return {means, layers};
}

// Adds a part, whose memory may be kept, to a gradient.
void add(Tensor& total, const Tensor& part) {
  if (total.defined()) {
    total.add_(part);
  } else {
    total = part;
  }
}

// The gradient of images from that of their means.
Tensor spread(const Tensor& d_mean, Sizes shape) {
  return at::div(d_mean, shape[2] * shape[3]).unsqueeze(-1).unsqueeze(-1).expand(shape);
}

class Network : public torch::autograd::Function<Network> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList scales,
                               at::TensorList shifts, const std::vector<Tensor>& weights,
                               const std::vector<int64_t>& numbers) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto steps = steps_of(numbers, weights.size());
    const auto asked = [](const Tensor& table) { return table.requires_grad(); };
    const bool tables =
        std::any_of(scales.begin(), scales.end(), asked) || std::any_of(shifts.begin(), shifts.end(), asked);
    auto [means, layers] = run(x, scales, shifts, weights, steps, tables, tables || x.requires_grad());
    variable_list saved;
    std::vector<int64_t> shapes = x.sizes().vec();
    std::vector<int64_t> channels_last;
    for (size_t i = 0; i < layers.size(); ++i) {
      saved.insert(saved.end(), {weights[i], scales[i], shifts[i], layers[i].u, layers[i].mask});
      shapes.insert(shapes.end(), layers[i].shape.begin(), layers[i].shape.end());
      channels_last.push_back(layers[i].channels_last);
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["numbers"] = numbers;
    ctx->saved_data["shapes"] = shapes;
    ctx->saved_data["channels_last"] = channels_last;
    ctx->set_materialize_grads(false);
    return means;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "a frozen network has a first derivative only; for a second one run it inside `with "
                "awnet.use_backend('reference')`");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    const size_t count = saved.size() / 5;
    const auto steps = steps_of(ctx->saved_data["numbers"].toIntVector(), count);
    const auto shapes = ctx->saved_data["shapes"].toIntVector();
    const auto channels_last = ctx->saved_data["channels_last"].toIntVector();
    const auto shape_of = [&](int64_t layer) { return Sizes(shapes.data() + 4 * (layer + 1), 4); };
    variable_list result(1 + 2 * count + 2);  // of x, scales, shifts; the last two are not differentiable
    Tensor& d_x = result[0];
    std::vector<Tensor> d(count);
    size_t means = grads.size();
    for (size_t i = count; i-- > 0;) {
      const Step& s = steps[i];
      if (s.averaged && grads[--means].defined()) add(d[i], spread(grads[means], shape_of(i)));
      if (!d[i].defined()) continue;
      const Tensor &weight = saved[5 * i], &scale = saved[5 * i + 1], &shift = saved[5 * i + 2],
                   &u = saved[5 * i + 3], &mask = saved[5 * i + 4];
      const size_t of_scale = 1 + i, of_shift = 1 + count + i;
      const bool need_input = s.input >= 0 || ctx->needs_input_grad(0),
                 need_scale = ctx->needs_input_grad(of_scale), need_shift = ctx->needs_input_grad(of_shift);
      const MaybeTensor kept = need_scale || need_shift ? MaybeTensor(u) : std::nullopt;
      const MaybeTensor gate = s.relu ? MaybeTensor(mask) : std::nullopt;
      if (!channels_last[i]) d[i] = d[i].contiguous();
      const cpu::Window window{s.stride, s.padding, s.dilation};
      if (need_input && cpu::convolves_back(shape_of(s.input), d[i], weight, window, s.groups)) {
        MaybeTensor centre, onto;
        if (kept) centre = u.select(3, 0).select(2, 0).contiguous();
        Tensor& total = s.input < 0 ? d_x : d[s.input];
        if (total.defined() && total.is_contiguous()) onto = total;
        const auto back =
            cpu::convolve_back(d[i], kept, centre, gate, scale, {}, {}, weight, shape_of(s.input), window,
                               kept.has_value(), s.residual >= 0, false, onto);
        d[i] = Tensor();
        if (!onto) add(total, back.d_input);
        if (s.residual >= 0) add(d[s.residual], back.d_residual);
        if (need_scale) result[of_scale] = at::addcmul(back.gc, *centre, back.g1);
        if (need_shift) result[of_shift] = back.g1;
        continue;
      }
      LayerBackwardArgs back;
      back.grad = d[i];
      back.args.weight = weight;
      back.args.conv = {s.stride, s.padding, s.dilation, s.groups};
      back.args.mix.filter_scale = scale;
      back.args.shift = shift;
      back.input_shape = shape_of(s.input).vec();
      back.u = kept;
      back.relu_mask = gate;
      back.channels_last = channels_last[i] != 0;
      back.needs.input = need_input;
      back.needs.filter_scale = need_scale;
      back.needs.shift = need_shift;
      back.needs.residual = s.residual >= 0;
      const LayerGradients grads_of = layer_backward(back);
      d[i] = Tensor();
      if (need_input) add(s.input < 0 ? d_x : d[s.input], grads_of.input);
      if (s.residual >= 0) add(d[s.residual], grads_of.residual);
      if (need_scale) result[of_scale] = grads_of.filter_scale;
      if (need_shift) result[of_shift] = grads_of.shift;
    }
    return result;
  }
};

// The coefficients of all layers in test mode, from tables [4, 2, T] of weight, bias, mean and variance.
struct Columns {
  int64_t count;
  std::vector<Branch> branches[2];

  Columns(const Tensor& tables, Sizes widths, double eps) : count(tables.size(2)) {
    TORCH_CHECK(tables.scalar_type() == at::kFloat && tables.is_contiguous() && tables.numel() == 8 * count,
                "tables must be contiguous float32 [4, 2, T], got ", tables.scalar_type(), " ",
                tables.sizes());
    TORCH_CHECK(std::accumulate(widths.begin(), widths.end(), int64_t{0}) == count, "the widths ", widths,
                " do not sum to ", count);
    const float* t = tables.const_data_ptr<float>();
    for (int64_t k = 0; k < 2; ++k) {
      const float* own = t + k * count;
      for (int64_t c = 0; c < count; ++c) {
        branches[k].push_back({own[c], own[2 * count + c], own[4 * count + c],
                               inverse_std(own[6 * count + c], static_cast<float>(eps))});
      }
    }
  }
};

// A [B, D] table of which the columns from D on are all 1.
struct Omega {
  const float* data;
  int64_t width;

  Omega(const Tensor& omega) : data(nullptr), width(0) {
    if (!omega.defined()) return;
    data = omega.const_data_ptr<float>();
    width = omega.size(1);
  }
  float at(int64_t b, int64_t c) const { return c < width ? data[b * width + c] : 1.0f; }
};

Tensor dense(const MaybeTensor& x) {
  if (!x || !x->defined()) return Tensor();
  TORCH_CHECK(x->scalar_type() == at::kFloat, "expected float32, got ", x->scalar_type());
  return x->contiguous();
}

// scale and shift [B, C] of each layer in turn
std::vector<Tensor> coefficients(const MaybeTensor& omega_in, const Tensor& p_clean, const Tensor& tables,
                                 Sizes widths, double eps) {
  const Columns columns(tables, widths, eps);
  const Tensor kept = dense(omega_in), p = dense(p_clean);
  const Omega omega(kept);
  const int64_t batch = p.size(0);
  const float* p_p = p.const_data_ptr<float>();
  std::vector<Tensor> made;
  int64_t begin = 0;
  for (const int64_t width : widths) {
    const Tensor scale = at::empty({batch, width}, tables.options()), shift = at::empty_like(scale);
    float *scale_p = scale.data_ptr<float>(), *shift_p = shift.data_ptr<float>();
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = begin; c < begin + width; ++c) {
        const Affine a =
            testing_coefficients(omega.at(b, c), p_p[b], columns.branches[0][c], columns.branches[1][c]);
        *scale_p++ = a.scale;
        *shift_p++ = a.shift;
      }
    }
    made.insert(made.end(), {scale, shift});
    begin += width;
  }
  return made;
}

class Coefficients : public torch::autograd::Function<Coefficients> {
 public:
  static variable_list forward(AutogradContext* ctx, const MaybeTensor& omega, const Tensor& p_clean,
                               const Tensor& tables, const std::vector<int64_t>& widths, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({dense(omega), dense(p_clean), tables});
    ctx->saved_data["widths"] = widths;
    ctx->saved_data["eps"] = eps;
    ctx->set_materialize_grads(false);
    return coefficients(omega, p_clean, tables, widths, eps);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(
        !at::GradMode::is_enabled(),
        "a frozen network's coefficients have a first derivative only; for a second one run it inside `with "
        "awnet.use_backend('reference')`");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    const auto widths = ctx->saved_data["widths"].toIntVector();
    const Columns columns(saved[2], widths, ctx->saved_data["eps"].toDouble());
    const Omega omega(saved[0]);
    const int64_t batch = saved[1].size(0);
    const float* p = saved[1].const_data_ptr<float>();
    const Tensor d_omega = omega.data ? at::zeros_like(saved[0]) : Tensor(), d_p = at::empty_like(saved[1]);
    float *d_omega_p = omega.data ? d_omega.data_ptr<float>() : nullptr, *d_p_p = d_p.data_ptr<float>();
    std::vector<double> sums(batch, 0.0);
    int64_t begin = 0;
    for (size_t layer = 0; layer < widths.size(); ++layer) {
      const Tensor d_scale = dense(grads[2 * layer]), d_shift = dense(grads[2 * layer + 1]);
      const auto values = [](const Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; };
      const float *by_scale = values(d_scale), *by_shift = values(d_shift);
      for (int64_t b = 0, i = 0; b < batch; ++b) {
        for (int64_t c = begin; c < begin + widths[layer]; ++c, ++i) {
          const Branch &adversarial = columns.branches[0][c], &clean = columns.branches[1][c];
          if (by_scale) {
            if (c < omega.width) {
              d_omega_p[b * omega.width + c] =
                  by_scale[i] * testing_coefficients(1.0f, p[b], adversarial, clean).scale;
            }
            sums[b] += by_scale[i] * omega.at(b, c) * (clean.gain() - adversarial.gain());
          }
          if (by_shift) sums[b] += by_shift[i] * (clean.offset() - adversarial.offset());
        }
      }
      begin += widths[layer];
    }
    for (int64_t b = 0; b < batch; ++b) d_p_p[b] = static_cast<float>(sums[b]);
    return {d_omega, d_p, Tensor(), Tensor(), Tensor()};
  }
};

std::vector<Tensor> differentiable_coefficients(const MaybeTensor& omega, const Tensor& p_clean,
                                                const Tensor& tables, Sizes widths, double eps) {
  return Coefficients::apply(omega, p_clean, tables, widths.vec(), eps);
}

std::vector<Tensor> below(const Tensor& x, at::TensorList scales, at::TensorList shifts,
                          at::TensorList weights, Sizes numbers) {
  return run(x, scales, shifts, weights, steps_of(numbers, weights.size()), false, false).first;
}

std::vector<Tensor> differentiable(const Tensor& x, at::TensorList scales, at::TensorList shifts,
                                   at::TensorList weights, Sizes numbers) {
  return Network::apply(x, scales, shifts, weights.vec(), numbers.vec());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(awnet, m) {
  m.def(
      "network_native(Tensor x, Tensor[] scales, Tensor[] shifts, Tensor[] weights, int[] numbers) -> "
      "Tensor[]");
  m.def(
      "network_coefficients_native(Tensor? omega, Tensor p_clean, Tensor tables, int[] widths, float eps) -> "
      "Tensor[]");
}

TORCH_LIBRARY_IMPL(awnet, CPU, m) {
  m.impl("network_native", &below);
  m.impl("network_coefficients_native", &coefficients);
}

TORCH_LIBRARY_IMPL(awnet, Autograd, m) {
  m.impl("network_native", &differentiable);
  m.impl("network_coefficients_native", &differentiable_coefficients);
}

}  // namespace awnet
