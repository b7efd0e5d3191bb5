// A frozen network on tiles: forward and backward, with all activations in cells from the images to the
// means.
//
// The forward saves one bit per element of each layer with a ReLU, and u in bfloat16 where the gradients of
// scale and shift are required. All other activations share memory, which is reused from layer to layer.
#include "network.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>

#include "../../tensors.h"
#include "amx.h"
#include "geometry.h"

namespace awnet::cpu::amx {
namespace {

using at::Tensor;

// Plans the use of memory that layers share, in cells of one group.
class Allocator {
 public:
  int64_t allocate(int64_t size) {
    int64_t at = 0;
    auto next = blocks_.begin();
    for (; next != blocks_.end() && next->first < at + size; ++next) at = next->first + next->second;
    blocks_.emplace_hint(next, at, size);
    peak_ = std::max(peak_, at + size);
    return at;
  }
  void release(int64_t offset) { blocks_.erase(offset); }
  int64_t peak() const { return peak_; }

 private:
  std::map<int64_t, int64_t> blocks_;  // offset: size
  int64_t peak_ = 0;
};

constexpr int64_t kNone = -1;

struct Layer {
  Step step;
  Geometry geometry;
  int64_t inputs, outputs;        // channels
  int64_t in_blocks, out_blocks;  // of kChannels
  int64_t in_pixels, out_pixels;
  std::shared_ptr<const Pairs> forward, backward;
  int64_t y;             // offset of its output
  int64_t table;         // its first block among those of all layers
  int64_t relu_mask, u;  // its first saved cell among those of all layers; kNone if it is not saved

  int64_t cells() const { return out_blocks * out_pixels; }
};

// One convolution or `finish` of a backward pass. Offsets are of cells, kNone if there are none.
struct BackwardStep {
  bool convolves;
  int64_t source;  // the layer whose d_u, at `d_u`, is convolved
  int64_t d_u;
  // what is done with the sum: the fields of Propagate
  int64_t target;  // a layer; kNone for the images
  int64_t before, total, to_d_u, to_residual;
  bool add_to_residual, has_d_mean;
};

struct BackwardPlan {
  std::vector<BackwardStep> steps;
  int64_t memory, d_x;  // cells of a group, the offset of the images' gradient
};

struct Plan {
  std::vector<Layer> layers;
  int64_t batch, groups, channels, in_pixels, in_blocks;
  std::array<int64_t, 2> size;
  int64_t x;  // offset of the images
  int64_t memory_cells, tables, relu_masks = 0, us = 0;

  Plan(at::IntArrayRef images, const std::vector<std::vector<int64_t>>& shapes,
       const std::vector<Step>& steps, const std::vector<bool>& keep_u, bool keep_mask) {
    batch = images[0];
    channels = images[1];
    size = {images[2], images[3]};
    groups = ceil_div(batch, kImages);
    in_pixels = size[0] * size[1];
    in_blocks = ceil_div(channels, kChannels);
    std::map<Geometry, std::array<std::shared_ptr<const Pairs>, 2>> pairs_of;
    Allocator memory;
    x = memory.allocate(in_blocks * in_pixels);
    tables = 0;
    std::vector<size_t> last(steps.size());
    size_t last_of_x = 0;
    for (size_t i = 0; i < steps.size(); ++i) {
      (steps[i].input < 0 ? last_of_x : last[steps[i].input]) = i;
      if (steps[i].residual >= 0) last[steps[i].residual] = i;
    }
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step& s = steps[i];
      const auto& shape = shapes[i];
      Layer layer;
      layer.step = s;
      layer.inputs = s.input < 0 ? channels : layers[s.input].outputs;
      layer.outputs = shape[0];
      TORCH_CHECK(s.groups == 1, "layer ", i, " has ", s.groups, " groups, which tiles do not run");
      TORCH_CHECK(shape[1] == layer.inputs, "layer ", i, " takes ", shape[1], " channels, got ",
                  layer.inputs);
      TORCH_CHECK(s.activation == awnet::kNone || s.activation == kRelu, "layer ", i,
                  " has another activation than the ReLU, which tiles do not support");
      Geometry& g = layer.geometry;
      g.in = s.input < 0 ? size : layers[s.input].geometry.out;
      g.kernel = {shape[2], shape[3]};
      g.stride = s.stride;
      g.padding = s.padding;
      g.dilation = s.dilation;
      TORCH_CHECK(g.set_out(), "layer ", i,
                  ": the filter is larger than the padded image, or a size is too large for tiles");
      layer.in_blocks = ceil_div(layer.inputs, kChannels);
      layer.out_blocks = ceil_div(layer.outputs, kChannels);
      layer.in_pixels = g.in[0] * g.in[1];
      layer.out_pixels = g.out[0] * g.out[1];
      if (s.residual >= 0) {
        const Layer& other = layers[s.residual];
        TORCH_CHECK(other.outputs == layer.outputs && other.geometry.out == g.out, "layer ", i,
                    " adds a residual of another shape");
      }
      auto& pairs = pairs_of[g];
      if (!pairs[0]) {
        pairs[0] = std::make_shared<const Pairs>(g.forward());
        pairs[1] = std::make_shared<const Pairs>(g.backward());
      }
      layer.forward = pairs[0];
      layer.backward = pairs[1];
      layer.table = tables;
      tables += layer.out_blocks;
      layer.relu_mask =
          keep_mask && s.activation == kRelu ? std::exchange(relu_masks, relu_masks + layer.cells()) : kNone;
      layer.u = keep_u[i] ? std::exchange(us, us + layer.cells()) : kNone;
      layer.y = memory.allocate(layer.cells());
      layers.push_back(layer);
      if (s.input >= 0 && last[s.input] == i) memory.release(layers[s.input].y);
      if (s.residual >= 0 && s.residual != s.input && last[s.residual] == i)
        memory.release(layers[s.residual].y);
      if (s.input < 0 && last_of_x == i) memory.release(x);
      const bool unused =
          std::none_of(steps.begin() + static_cast<int64_t>(i) + 1, steps.end(), [&](const Step& other) {
            const auto layer_number = static_cast<int64_t>(i);
            return other.input == layer_number || other.residual == layer_number;
          });
      if (unused) memory.release(layer.y);
    }
    memory_cells = memory.peak();
  }

  // For layers of whose means there is a gradient, `has_d_mean`.
  BackwardPlan backward(const std::vector<bool>& has_d_mean, bool need_x) const {
    const size_t count = layers.size();
    Allocator memory;
    BackwardPlan plan;
    std::vector<int64_t> d(count, kNone), d_u(count, kNone);
    int64_t d_x = kNone;
    // the gradient of layer j's output is complete in this step
    const auto complete = [&](BackwardStep& step, int64_t j) {
      step.target = j;
      step.before = d[j];
      step.has_d_mean = has_d_mean[j];
      step.to_d_u = d_u[j] = memory.allocate(layers[j].cells());
      const int64_t residual = layers[j].step.residual;
      if (residual < 0) return;
      step.add_to_residual = d[residual] != kNone;
      if (!step.add_to_residual) d[residual] = memory.allocate(layers[residual].cells());
      step.to_residual = d[residual];
    };
    const auto start = [&](bool convolves, size_t source) {
      return BackwardStep{
          convolves, static_cast<int64_t>(source), kNone, kNone, kNone, kNone, kNone, kNone, false, false};
    };
    for (size_t i = count; i-- > 0;) {
      const int64_t j = layers[i].step.input;
      if (d_u[i] == kNone) {
        if (d[i] == kNone && !has_d_mean[i]) continue;
        BackwardStep step = start(false, i);
        complete(step, static_cast<int64_t>(i));
        plan.steps.push_back(step);
        if (d[i] != kNone) memory.release(d[i]);
      }
      if (j >= 0 || need_x) {
        BackwardStep step = start(true, i);
        step.d_u = d_u[i];
        const bool last = j >= 0 && std::none_of(layers.begin(), layers.begin() + static_cast<int64_t>(i),
                                                 [&](const Layer& other) {
                                                   return other.step.input == j || other.step.residual == j;
                                                 });
        if (last) {
          complete(step, j);
          if (step.before != kNone) memory.release(step.before);
        } else {
          int64_t& total = j < 0 ? d_x : d[j];
          step.target = j;
          step.before = total;
          if (total == kNone) total = memory.allocate(layers[i].in_blocks * layers[i].in_pixels);
          step.total = total;
        }
        plan.steps.push_back(step);
      }
      memory.release(d_u[i]);
    }
    plan.memory = memory.peak();
    plan.d_x = d_x;
    return plan;
  }

  // Whether each thread runs whole groups through the network, which needs no barrier between layers and
  // little memory. Else all threads share each layer.
  bool by_group() const {
    const int64_t threads = at::get_num_threads();
    return threads == 1 || groups % threads == 0 || groups >= 4 * threads;
  }
  int64_t chunks(int64_t blocks) const {  // of the pixels of a layer that threads share
    return by_group() ? 1 : std::clamp<int64_t>(ceil_div(4 * at::get_num_threads(), groups * blocks), 1, 8);
  }
};

// [B, C] float32 as [group][block][16][32], times `factor`.
void pack_table(float* to, const Tensor& table, double factor = 1) {
  const int64_t batch = table.size(0), channels = table.size(1), blocks = ceil_div(channels, kChannels);
  const Tensor dense = table.to(at::kFloat).contiguous();
  const float* const from = dense.const_data_ptr<float>();
  const auto by = static_cast<float>(factor);
  std::fill_n(to, ceil_div(batch, kImages) * blocks * kCell, 0.0f);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      to[((b / kImages * blocks + c / kChannels) * kImages + b % kImages) * kChannels + c % kChannels] =
          from[b * channels + c] * by;
    }
  }
}

// The inverse, for the sum over `chunks` such tables.
void unpack_table(const Tensor& table, const float* from, int64_t chunks) {
  const int64_t batch = table.size(0), channels = table.size(1), blocks = ceil_div(channels, kChannels);
  const int64_t size = ceil_div(batch, kImages) * blocks * kCell;
  float* to = table.data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at =
          ((b / kImages * blocks + c / kChannels) * kImages + b % kImages) * kChannels + c % kChannels;
      float sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += from[chunk * size + at];
      *to++ = sum;
    }
  }
}

// A range of groups that one thread runs, or all groups, which all threads run.
struct Run {
  const Plan& plan;
  const Kernels& kernels;
  int64_t first, groups;
  bool shared;
  Tensor memory;
  Bits* cells;

  Run(const Plan& plan, const Kernels& kernels, int64_t first, int64_t groups, bool shared,
      int64_t cells_of_group)
      : plan(plan), kernels(kernels), first(first), groups(groups), shared(shared) {
    memory = pooled_memory(cells_of_group * groups * kCell * static_cast<int64_t>(sizeof(Bits)));
    cells = reinterpret_cast<Bits*>(memory.mutable_data_ptr());
  }

  // body(group of this run, block, chunk)
  template <class Body>
  void each(int64_t blocks, int64_t chunks, Body body) const {
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i / (blocks * chunks), i / chunks % blocks, i % chunks);
    };
    if (!shared) return some(0, groups * blocks * chunks);
    at::parallel_for(0, groups * blocks * chunks, 1, [&](int64_t begin, int64_t end) {
      kernels.configure();
      some(begin, end);
      kernels.release();
    });
  }

  Bits* at(int64_t offset, int64_t cells_of_group, int64_t group) const {
    return cells + (offset * groups + group * cells_of_group) * kCell;
  }
};

// run(first group, groups, shared) over all groups
template <class Body>
void for_groups(const Plan& plan, const Kernels& kernels, Body body) {
  if (!plan.by_group()) return body(0, plan.groups, true);
  at::parallel_for(0, plan.groups, 1, [&](int64_t begin, int64_t end) {
    kernels.configure();
    for (int64_t group = begin; group < end; ++group) body(group, 1, false);
    kernels.release();
  });
}

void copy_images(const Run& run, const Tensor& x) {
  const Plan& plan = run.plan;
  const auto* const from = static_cast<const Bits*>(x.const_data_ptr());
  const at::IntArrayRef step = x.strides();
  run.each(plan.in_blocks, 1, [&](int64_t group, int64_t block, int64_t) {
    Bits* to = run.at(plan.x, plan.in_blocks * plan.in_pixels, group) + block * plan.in_pixels * kCell;
    std::fill_n(to, plan.in_pixels * kCell, 0);
    const int64_t begin = (run.first + group) * kImages, count = std::min(kImages, plan.batch - begin);
    const int64_t channel = block * kChannels, channels = std::min(kChannels, plan.channels - channel);
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t c = 0; c < channels; ++c) {
        const Bits* const plane = from + (begin + b) * step[0] + (channel + c) * step[1];
        for (int64_t p = 0; p < plan.in_pixels; ++p) {
          to[p * kCell + b * kChannels + c] = plane[p / plan.size[1] * step[2] + p % plan.size[1] * step[3]];
        }
      }
    }
  });
}

void copy_image_gradients(const Run& run, const Tensor& d_x, int64_t offset) {
  const Plan& plan = run.plan;
  auto* const to = static_cast<Bits*>(d_x.mutable_data_ptr());
  const at::IntArrayRef step = d_x.strides();
  run.each(plan.in_blocks, 1, [&](int64_t group, int64_t block, int64_t) {
    const Bits* from =
        run.at(offset, plan.in_blocks * plan.in_pixels, group) + block * plan.in_pixels * kCell;
    const int64_t begin = (run.first + group) * kImages, count = std::min(kImages, plan.batch - begin);
    const int64_t channel = block * kChannels, channels = std::min(kChannels, plan.channels - channel);
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t c = 0; c < channels; ++c) {
        Bits* const plane = to + (begin + b) * step[0] + (channel + c) * step[1];
        for (int64_t p = 0; p < plan.in_pixels; ++p) {
          plane[p / plan.size[1] * step[2] + p % plan.size[1] * step[3]] =
              from[p * kCell + b * kChannels + c];
        }
      }
    }
  });
}

float wide(Bits bits) { return c10::detail::f32_from_bits(bits); }

void average(const Run& run, const Layer& layer, const Tensor& mean) {
  auto* const to = mean.data_ptr<at::BFloat16>();
  run.each(layer.out_blocks, 1, [&](int64_t group, int64_t block, int64_t) {
    const Bits* from = run.at(layer.y, layer.cells(), group) + block * layer.out_pixels * kCell;
    std::vector<float> sums(kCell);
    for (int64_t p = 0; p < layer.out_pixels; ++p, from += kCell) {
      for (int64_t i = 0; i < kCell; ++i) sums[i] += wide(from[i]);
    }
    const int64_t begin = (run.first + group) * kImages, count = std::min(kImages, run.plan.batch - begin);
    const int64_t channel = block * kChannels, channels = std::min(kChannels, layer.outputs - channel);
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t c = 0; c < channels; ++c) {
        to[(begin + b) * layer.outputs + channel + c] =
            sums[b * kChannels + c] / static_cast<float>(layer.out_pixels);
      }
    }
  });
}

// What the forward saves for the backward, one after the other in one piece of memory.
struct Saved {
  Tensor memory;
  uint32_t* relu_mask;
  float* scale;
  Bits* u;

  static int64_t bytes(const Plan& plan) {
    return plan.groups * (plan.relu_masks * kCell / 8 + plan.tables * kCell * 4 + plan.us * kCell * 2);
  }
  Saved(const Plan& plan, Tensor bytes) : memory(std::move(bytes)) {
    auto* const base = static_cast<uint8_t*>(memory.mutable_data_ptr());
    relu_mask = reinterpret_cast<uint32_t*>(base);
    scale = reinterpret_cast<float*>(base + plan.groups * plan.relu_masks * kCell / 8);
    u = reinterpret_cast<Bits*>(scale + plan.groups * plan.tables * kCell);
  }
  // of a layer, its group and block
  uint32_t* relu_mask_of(const Plan& plan, const Layer& layer, int64_t group, int64_t block) const {
    if (layer.relu_mask == kNone) return nullptr;
    return relu_mask +
           (layer.relu_mask * plan.groups + group * layer.cells() + block * layer.out_pixels) * kImages;
  }
  Bits* u_of(const Plan& plan, const Layer& layer, int64_t group, int64_t block) const {
    if (layer.u == kNone) return nullptr;
    return u + (layer.u * plan.groups + group * layer.cells() + block * layer.out_pixels) * kCell;
  }
  float* scales_of(const Plan& plan, const Layer& layer) const {
    return scale + layer.table * plan.groups * kCell;
  }
};

Convolution convolution_of(const Pairs& pairs, const Bits* input, int64_t blocks, int64_t plane,
                           const Bits* weights, int64_t positions, int64_t block, int64_t channels,
                           int64_t chunk, int64_t chunks) {
  return {input,
          blocks,
          plane,
          pairs.taps.data(),
          pairs.begin.data(),
          pairs.pixels(),
          chunk * pairs.count() / chunks,
          (chunk + 1) * pairs.count() / chunks,
          weights + block * blocks * positions * 2 * kCell,
          positions,
          channels - block * kChannels <= kChannels / 2};
}

const Bits* forward_weights(const Tensor& packed) {
  return static_cast<const Bits*>(packed.const_data_ptr());
}
const Bits* backward_weights(const Tensor& packed) { return forward_weights(packed) + packed.size(1); }

std::vector<Tensor> run_forward(const Plan& plan, const Kernels& kernels, const Tensor& x,
                                at::TensorList shifts, at::TensorList packed, const Saved& saved) {
  std::vector<Tensor> means;
  std::vector<Tensor> mean_of(plan.layers.size());
  std::vector<float> shift(plan.groups * plan.tables * kCell);
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    const Layer& layer = plan.layers[i];
    pack_table(shift.data() + layer.table * plan.groups * kCell, shifts[i]);
    if (layer.step.averaged) {
      means.push_back(mean_of[i] =
                          new_tensor({plan.batch, layer.outputs}, x.options().memory_format(std::nullopt)));
    }
  }
  for_groups(plan, kernels, [&](int64_t first, int64_t groups, bool shared) {
    const Run run(plan, kernels, first, groups, shared, plan.memory_cells);
    copy_images(run, x);
    for (size_t i = 0; i < plan.layers.size(); ++i) {
      const Layer& layer = plan.layers[i];
      const Step& s = layer.step;
      const int64_t chunks = plan.chunks(layer.out_blocks);
      run.each(layer.out_blocks, chunks, [&](int64_t group, int64_t block, int64_t chunk) {
        const Bits* const input =
            run.at(s.input < 0 ? plan.x : plan.layers[s.input].y, layer.in_blocks * layer.in_pixels, group);
        const int64_t all = first + group, skip = block * layer.out_pixels * kCell;
        const int64_t table = (layer.table * plan.groups + all * layer.out_blocks + block) * kCell;
        const Apply to = {
            run.at(layer.y, layer.cells(), group) + skip,
            saved.u_of(plan, layer, all, block),
            saved.relu_mask_of(plan, layer, all, block),
            s.residual < 0 ? nullptr : run.at(plan.layers[s.residual].y, layer.cells(), group) + skip,
            saved.scale + table,
            shift.data() + table,
            s.activation == kRelu};
        kernels.apply(convolution_of(*layer.forward, input, layer.in_blocks, layer.in_pixels,
                                     forward_weights(packed[i]), layer.geometry.positions(), block,
                                     layer.outputs, chunk, chunks),
                      to);
      });
      if (s.averaged) average(run, layer, mean_of[i]);
    }
  });
  return means;
}

// g1 and g2 of a layer, [chunk][group][block][16][32] each
struct Sums {
  int64_t chunks = 0;
  std::vector<float> g1, g2;
};

void run_backward(const Plan& plan, const BackwardPlan& backward, const Kernels& kernels, const Saved& saved,
                  at::TensorList packed, const std::vector<std::vector<float>>& d_means,
                  std::vector<Sums>& sums, const Tensor& d_x) {
  for_groups(plan, kernels, [&](int64_t first, int64_t groups, bool shared) {
    const Run run(plan, kernels, first, groups, shared, backward.memory);
    for (const BackwardStep& step : backward.steps) {
      const Layer& source = plan.layers[step.source];
      const Layer* const target = step.target < 0 ? nullptr : &plan.layers[step.target];
      const int64_t blocks = target ? target->out_blocks : plan.in_blocks;
      const int64_t pixels = target ? target->out_pixels : plan.in_pixels;
      const int64_t chunks = plan.chunks(blocks);
      run.each(blocks, chunks, [&](int64_t group, int64_t block, int64_t chunk) {
        const int64_t all = first + group;
        const auto at = [&](int64_t offset) {
          return offset == kNone ? nullptr : run.at(offset, blocks * pixels, group) + block * pixels * kCell;
        };
        Propagate to = {};
        to.before = at(step.before);
        to.total = at(step.total);
        if (!to.total) {
          const int64_t table = (all * blocks + block) * kCell;
          to.d_mean = step.has_d_mean ? d_means[step.target].data() + table : nullptr;
          to.relu_mask = saved.relu_mask_of(plan, *target, all, block);
          to.scale = saved.scales_of(plan, *target) + table;
          to.d_u = at(step.to_d_u);
          to.d_residual = at(step.to_residual);
          to.add_to_residual = step.add_to_residual;
          Sums& of_target = sums[step.target];
          if (of_target.chunks > 0) {
            const int64_t offset = chunk * plan.groups * blocks * kCell + table;
            to.u = saved.u_of(plan, *target, all, block);
            to.g1 = of_target.g1.data() + offset;
            to.g2 = of_target.g2.data() + offset;
          }
        }
        if (!step.convolves) {
          return kernels.finish(to, chunk * pixels / chunks, (chunk + 1) * pixels / chunks);
        }
        kernels.propagate(
            convolution_of(*source.backward, run.at(step.d_u, source.cells(), group), source.out_blocks,
                           source.out_pixels, backward_weights(packed[step.source]),
                           source.geometry.positions(), block, source.inputs, chunk, chunks),
            to);
      });
    }
    if (d_x.defined()) copy_image_gradients(run, d_x, backward.d_x);
  });
}

void check(const Tensor& x, at::TensorList scales, at::TensorList shifts, at::TensorList packed,
           const std::vector<std::vector<int64_t>>& shapes) {
  const size_t count = shapes.size();
  TORCH_CHECK(count > 0 && x.dim() == 4 && x.numel() > 0 && x.scalar_type() == at::kBFloat16,
              "expected layers and bfloat16 images [B, C, H, W], got ", count, " layers and ",
              x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(scales.size() == count && shifts.size() == count && packed.size() == count,
              "expected a scale, a shift and packed filters for each of ", count, " layers, got ",
              scales.size(), ", ", shifts.size(), " and ", packed.size());
  for (size_t i = 0; i < count; ++i) {
    const std::array<int64_t, 2> table = {x.size(0), shapes[i][0]};
    TORCH_CHECK(scales[i].sizes() == at::IntArrayRef(table) && shifts[i].sizes() == at::IntArrayRef(table),
                "layer ", i, " needs a scale and a shift ", at::IntArrayRef(table), ", got ",
                scales[i].sizes(), " and ", shifts[i].sizes());
    const int64_t half = ceil_div(shapes[i][0], kChannels) * ceil_div(shapes[i][1], kChannels) *
                         shapes[i][2] * shapes[i][3] * 2 * kCell;
    TORCH_CHECK(packed[i].scalar_type() == at::kBFloat16 && packed[i].is_contiguous() &&
                    packed[i].dim() == 2 && packed[i].size(0) == 2 && packed[i].size(1) == half,
                "layer ", i, ": these are not its packed filters: ", packed[i].sizes());
  }
}

Saved saved_for(const Plan& plan, at::TensorList scales) {
  const Saved saved(plan, pooled_memory(Saved::bytes(plan)));
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    pack_table(saved.scales_of(plan, plan.layers[i]), scales[i]);
  }
  return saved;
}

Plan plan_of(const NetworkArgs& args) {
  return Plan(args.images, args.shapes, args.steps, args.keep_u, args.keep_mask);
}

}  // namespace

std::vector<std::vector<int64_t>> shapes_of(at::TensorList weights) {
  std::vector<std::vector<int64_t>> shapes;
  for (const Tensor& weight : weights) {
    TORCH_CHECK(weight.dim() == 4 && weight.numel() > 0, "expected filters [C_out, C_in, kh, kw], got ",
                weight.sizes());
    shapes.push_back(weight.sizes().vec());
  }
  return shapes;
}

Outputs network_forward(const NetworkArgs& args, const Tensor& x, at::TensorList scales,
                        at::TensorList shifts, at::TensorList packed) {
  check(x, scales, shifts, packed, args.shapes);
  const Plan plan = plan_of(args);
  const Saved saved = saved_for(plan, scales);
  return {run_forward(plan, kernels(args.emulate), x, shifts, packed, saved), saved.memory};
}

NetworkGradients network_backward(const NetworkArgs& args, at::TensorList packed, const Tensor& memory,
                                  at::TensorList d_means, const NetworkNeeds& needs,
                                  at::MemoryFormat format) {
  const Plan plan = plan_of(args);
  const size_t count = plan.layers.size();
  std::vector<bool> has_d_mean(count);
  std::vector<std::vector<float>> packed_d_means(count);
  std::vector<Sums> sums(count);
  size_t next = 0;
  for (size_t i = 0; i < count; ++i) {
    const Layer& layer = plan.layers[i];
    const int64_t size = plan.groups * layer.out_blocks * kCell;
    if (layer.step.averaged) {
      const Tensor& d_mean = d_means[next++];
      has_d_mean[i] = d_mean.defined();
      if (has_d_mean[i]) {
        packed_d_means[i].resize(size);
        pack_table(packed_d_means[i].data(), d_mean, 1.0 / static_cast<double>(layer.out_pixels));
      }
    }
    if (args.keep_u[i] && (needs.scales[i] || needs.shifts[i])) {
      sums[i].chunks = plan.chunks(layer.out_blocks);
      sums[i].g1.resize(size * sums[i].chunks);
      sums[i].g2.resize(size * sums[i].chunks);
    }
  }
  const BackwardPlan backward = plan.backward(has_d_mean, needs.x);
  const auto options = packed[0].options();
  NetworkGradients grads{Tensor(), std::vector<Tensor>(count), std::vector<Tensor>(count)};
  if (needs.x && backward.d_x != kNone) grads.x = new_tensor(args.images, options.memory_format(format));
  run_backward(plan, backward, kernels(args.emulate), Saved(plan, memory), packed, packed_d_means, sums,
               grads.x);
  for (size_t i = 0; i < count; ++i) {
    if (sums[i].chunks == 0) continue;
    const std::array<int64_t, 2> shape = {plan.batch, plan.layers[i].outputs};
    const auto table_of = [&](const std::vector<float>& from) {
      const Tensor table = new_tensor(shape, options.dtype(at::kFloat));
      unpack_table(table, from.data(), sums[i].chunks);
      return table;
    };
    if (needs.scales[i]) grads.scales[i] = table_of(sums[i].g2);
    if (needs.shifts[i]) grads.shifts[i] = table_of(sums[i].g1);
  }
  return grads;
}

}  // namespace awnet::cpu::amx
