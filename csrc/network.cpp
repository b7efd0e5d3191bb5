// Many layers of a frozen network as one operator: act(conv(x) * scale + shift + residual) one after another,
// and back. Small images on a CPU would else spend as long between the layers as in them.
#include <ATen/ops/add.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "layer.h"

namespace awnet {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// In numbers as awnet/ops/network.py writes them: of the layer that a tensor comes from, -1 for the images.
struct Step {
  int64_t input, residual;  // a residual of -1 is none
  bool output, relu;
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
};
constexpr size_t kFields = 11;

std::vector<Step> steps_of(Sizes numbers, size_t layers) {
  TORCH_CHECK(numbers.size() == kFields * layers, "expected ", kFields, " numbers for each of ", layers,
              " layers, got ", numbers.size());
  std::vector<Step> steps;
  for (size_t i = 0; i < layers; ++i) {
    const int64_t* n = numbers.data() + kFields * i;
    const auto own = static_cast<int64_t>(i);
    TORCH_CHECK(n[0] >= -1 && n[0] < own && n[1] >= -1 && n[1] < own, "layer ", i,
                " may take what earlier ones give, not ", n[0], " and ", n[1]);
    steps.push_back({n[0], n[1], n[2] != 0, n[3] != 0, {n[4], n[5]}, {n[6], n[7]}, {n[8], n[9]}, n[10]});
  }
  return steps;
}

Tensor columns(const Tensor& table, int64_t begin, const Tensor& weight) {
  TORCH_CHECK(begin + weight.size(0) <= table.size(1), "the tables are narrower than the layers");
  return table.narrow(1, begin, weight.size(0)).contiguous();
}

struct Layer {
  Tensor u, mask;
  std::vector<int64_t> input_shape;
  bool channels_last;
};

// What the layers with `output` give, and of each layer what its backward needs.
std::pair<variable_list, std::vector<Layer>> run(const Tensor& x, const std::vector<Tensor>& weights,
                                                 const Tensor& scale, const Tensor& shift,
                                                 const std::vector<Step>& steps, bool keep_u,
                                                 bool keep_mask) {
  const size_t count = steps.size();
  std::vector<size_t> last(count);  // layer that takes a layer's output last
  for (size_t i = 0; i < count; ++i) {
    if (steps[i].input >= 0) last[steps[i].input] = i;
    if (steps[i].residual >= 0) last[steps[i].residual] = i;
  }
  std::vector<Tensor> y(count);
  std::vector<Layer> layers;
  variable_list outputs;
  int64_t begin = 0;
  for (size_t i = 0; i < count; ++i) {
    const Step& s = steps[i];
    const Tensor& input = s.input < 0 ? x : y[s.input];
    const MaybeTensor residual = s.residual < 0 ? std::nullopt : MaybeTensor(y[s.residual]);
    const auto found =
        layer_forward(input, weights[i], columns(scale, begin, weights[i]), {}, {},
                      columns(shift, begin, weights[i]), residual, {}, {}, {}, false, 1e-5, s.relu, s.stride,
                      s.padding, s.dilation, s.groups, "", keep_u, keep_mask && s.relu);
    begin += weights[i].size(0);
    y[i] = std::get<0>(found);
    layers.push_back({std::get<1>(found), std::get<2>(found), input.sizes().vec(),
                      layout_of(y[i]) == at::MemoryFormat::ChannelsLast});
    if (s.output) outputs.push_back(y[i]);
    for (const int64_t source : {s.input, s.residual}) {
      if (source >= 0 && last[source] == i) y[source] = Tensor();
    }
  }
  return {outputs, layers};
}

// A gradient to which parts are added: in place where it is ours.
struct Total {
  Tensor value;
  bool own = false;

  void add(const Tensor& part) {
    if (!value.defined()) {
      value = part;
    } else if (own) {
      value.add_(part);
    } else {
      value = at::add(value, part);
    }
    own = true;
  }
};

class Network : public torch::autograd::Function<Network> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& scale,
                               const Tensor& shift, const std::vector<Tensor>& weights,
                               const std::vector<int64_t>& numbers) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto steps = steps_of(numbers, weights.size());
    const bool tables = scale.requires_grad() || shift.requires_grad();
    auto [outputs, layers] = run(x, weights, scale, shift, steps, tables, tables || x.requires_grad());
    variable_list saved = {scale, shift};
    std::vector<int64_t> shapes;
    std::vector<int64_t> channels_last;
    for (size_t i = 0; i < layers.size(); ++i) {
      saved.insert(saved.end(), {weights[i], layers[i].u, layers[i].mask});
      shapes.insert(shapes.end(), layers[i].input_shape.begin(), layers[i].input_shape.end());
      channels_last.push_back(layers[i].channels_last);
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["numbers"] = numbers;
    ctx->saved_data["shapes"] = shapes;
    ctx->saved_data["channels_last"] = channels_last;
    ctx->set_materialize_grads(false);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "a frozen network has a first derivative only; for a second one run the network itself");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &scale = saved[0], &shift = saved[1];
    const size_t count = (saved.size() - 2) / 3;
    const auto steps = steps_of(ctx->saved_data["numbers"].toIntVector(), count);
    const auto shapes = ctx->saved_data["shapes"].toIntVector();
    const auto channels_last = ctx->saved_data["channels_last"].toIntVector();
    const bool need_x = ctx->needs_input_grad(0), need_scale = ctx->needs_input_grad(1),
               need_shift = ctx->needs_input_grad(2);
    Total d_x;
    std::vector<Total> d(count);
    size_t number = 0;
    for (size_t i = 0; i < count; ++i) {
      if (steps[i].output) d[i].value = grads[number++];
    }
    const Tensor d_scale = need_scale ? at::zeros_like(scale) : Tensor(),
                 d_shift = need_shift ? at::zeros_like(shift) : Tensor();
    int64_t begin = scale.size(1);
    for (size_t i = count; i-- > 0;) {
      const Step& s = steps[i];
      const Tensor &weight = saved[2 + 3 * i], &u = saved[3 + 3 * i], &mask = saved[4 + 3 * i];
      begin -= weight.size(0);
      if (!d[i].value.defined()) continue;
      const bool need_input = s.input >= 0 || need_x;
      const c10::List<bool> needs({need_input, false, need_scale, false, false, need_shift, s.residual >= 0});
      const MaybeTensor kept = need_scale || need_shift ? MaybeTensor(u) : std::nullopt;
      const MaybeTensor gate = s.relu ? MaybeTensor(mask) : std::nullopt;
      const auto found = layer_backward(
          d[i].value, {}, weight, columns(scale, begin, weight), {}, {}, columns(shift, begin, weight), {},
          {}, {}, {}, false, 1e-5, s.relu, s.stride, s.padding, s.dilation, s.groups, "", kept, gate, {}, {},
          {}, {}, {}, Sizes(shapes.data() + 4 * i, 4), channels_last[i] != 0, needs);
      d[i].value = Tensor();
      if (need_input) (s.input < 0 ? d_x : d[s.input]).add(std::get<0>(found));
      if (s.residual >= 0) d[s.residual].add(std::get<6>(found));
      if (need_scale) d_scale.narrow(1, begin, weight.size(0)).copy_(std::get<2>(found));
      if (need_shift) d_shift.narrow(1, begin, weight.size(0)).copy_(std::get<5>(found));
    }
    return {d_x.value, d_scale, d_shift, Tensor(), Tensor()};
  }
};

std::vector<Tensor> below(const Tensor& x, const Tensor& scale, const Tensor& shift, at::TensorList weights,
                          Sizes numbers) {
  return run(x, weights.vec(), scale, shift, steps_of(numbers, weights.size()), false, false).first;
}

std::vector<Tensor> differentiable(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                   at::TensorList weights, Sizes numbers) {
  return Network::apply(x, scale, shift, weights.vec(), numbers.vec());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(awnet, m) {
  m.def("network_native(Tensor x, Tensor scale, Tensor shift, Tensor[] weights, int[] numbers) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(awnet, CPU, m) { m.impl("network_native", &below); }

TORCH_LIBRARY_IMPL(awnet, Autograd, m) { m.impl("network_native", &differentiable); }

}  // namespace awnet
