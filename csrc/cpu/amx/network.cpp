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

// Plans the use of memory that layers share, in cells of one group.
class Allocator {
 public:
  int64_t allocate(int64_t size) {
    int64_t offset = 0;
    auto next = blocks_.begin();
    for (; next != blocks_.end() && next->first < offset + size; ++next) offset = next->first + next->second;
    blocks_.emplace_hint(next, offset, size);
    peak_ = std::max(peak_, offset + size);
    return offset;
  }
  void release(int64_t offset) { blocks_.erase(offset); }
  int64_t peak() const { return peak_; }

 private:
  std::map<int64_t, int64_t> blocks_;  // offset: size
  int64_t peak_ = 0;
};

constexpr int64_t kAbsent = -1;

// The images of one group in a layer's input or output.
struct Images {
  int64_t channels;
  Size size;

  int64_t blocks() const { return ceil_div(channels, kChannels); }
  int64_t pixels() const { return size[0] * size[1]; }
  int64_t cells() const { return blocks() * pixels(); }
};

struct Layer {
  Step step;
  Geometry geometry;
  Images in, out;
  std::shared_ptr<const Pairs> forward, backward;
  int64_t y;             // offset of its output
  int64_t table;         // its first block among those of all layers
  int64_t relu_mask, u;  // its first saved cell among those of all layers; kAbsent if it is not saved
  int64_t first_reader;  // the first layer that reads its output
};

// A chunk of a convolution's outputs in one block.
Convolution convolution_of(const Pairs& pairs, const Images& from, const Images& to, const Bits* input,
                           const Bits* weights, int64_t positions, int64_t block, int64_t chunk,
                           int64_t chunks) {
  return {input,
          from.blocks(),
          from.pixels(),
          pairs.taps.data(),
          pairs.begin.data(),
          pairs.pixels(),
          chunk * pairs.count() / chunks,
          (chunk + 1) * pairs.count() / chunks,
          weights + block * from.blocks() * positions * 2 * kCell,
          positions,
          to.channels - block * kChannels <= kChannels / 2};
}

// One convolution or `finish` of a backward pass. Offsets are of cells, kAbsent if there are none.
struct BackwardStep {
  bool convolves;
  size_t source;          // the layer whose d_u is convolved
  int64_t d_u = kAbsent;  // its offset
  // what is done with the sum: the fields of Propagate
  int64_t target = kAbsent;  // a layer; kAbsent for the images
  int64_t before = kAbsent, total = kAbsent, to_d_u = kAbsent, to_residual = kAbsent;
  bool add_to_residual = false, has_d_mean = false;
};

struct BackwardPlan {
  std::vector<BackwardStep> steps;
  int64_t memory, d_x = kAbsent;  // cells of a group, the offset of the images' gradient
};

struct Plan {
  std::vector<Layer> layers;
  int64_t batch, groups;
  Images images;
  int64_t x;  // offset of the images
  int64_t memory_cells, tables = 0, relu_masks = 0, us = 0;

  explicit Plan(const NetworkArgs& args)
      : batch(args.images[0]),
        groups(ceil_div(batch, kImages)),
        images{args.images[1], {args.images[2], args.images[3]}} {
    const auto count = static_cast<int64_t>(args.steps.size());
    std::map<Geometry, std::array<std::shared_ptr<const Pairs>, 2>> pairs_of;
    Allocator memory;
    x = memory.allocate(images.cells());
    std::vector<int64_t> last_reader(count);  // the layer itself if there is no reader
    std::iota(last_reader.begin(), last_reader.end(), 0);
    int64_t last_reader_of_x = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Step& s = args.steps[i];
      (s.input < 0 ? last_reader_of_x : last_reader[s.input]) = i;
      if (s.residual >= 0) last_reader[s.residual] = i;
    }
    for (int64_t i = 0; i < count; ++i) {
      const Step& s = args.steps[i];
      const auto& shape = args.shapes[i];
      Layer layer;
      layer.step = s;
      layer.in = s.input < 0 ? images : layers[s.input].out;
      TORCH_CHECK(s.conv.groups == 1, "layer ", i, " has ", s.conv.groups, " groups, which tiles do not run");
      TORCH_CHECK(shape[1] == layer.in.channels, "layer ", i, " takes ", shape[1], " channels, got ",
                  layer.in.channels);
      TORCH_CHECK(s.activation == kNone || s.activation == kRelu, "layer ", i,
                  " has another activation than the ReLU, which tiles do not support");
      const auto geometry = Geometry::of(layer.in.size, {shape[2], shape[3]}, s.conv);
      TORCH_CHECK(geometry, "layer ", i,
                  ": the filter is larger than the padded image, or a size is too large for tiles");
      layer.geometry = *geometry;
      layer.out = {shape[0], geometry->out};
      for (const int64_t source : {s.input, s.residual}) {
        if (source >= 0) layers[source].first_reader = std::min(layers[source].first_reader, i);
      }
      if (s.residual >= 0) {
        const Images& other = layers[s.residual].out;
        TORCH_CHECK(other.channels == layer.out.channels && other.size == layer.out.size, "layer ", i,
                    " adds a residual of another shape");
      }
      auto& [forward, backward] = pairs_of[*geometry];
      if (!forward) {
        forward = std::make_shared<const Pairs>(geometry->forward());
        backward = std::make_shared<const Pairs>(geometry->backward());
      }
      layer.forward = forward;
      layer.backward = backward;
      layer.first_reader = count;
      layer.table = std::exchange(tables, tables + layer.out.blocks());
      const int64_t cells = layer.out.cells();
      layer.relu_mask =
          args.keep_mask && s.activation == kRelu ? std::exchange(relu_masks, relu_masks + cells) : kAbsent;
      layer.u = args.keep_u[i] ? std::exchange(us, us + cells) : kAbsent;
      layer.y = memory.allocate(cells);
      layers.push_back(layer);
      for (const int64_t source : {s.input, s.residual, i}) {
        if (source >= 0 && last_reader[source] == i) memory.release(layers[source].y);
      }
      if (last_reader_of_x == i) memory.release(x);
    }
    memory_cells = memory.peak();
  }

  // For layers of whose means there is a gradient, `has_d_mean`.
  BackwardPlan backward(const std::vector<bool>& has_d_mean, bool need_x) const {
    const size_t count = layers.size();
    Allocator memory;
    BackwardPlan plan;
    std::vector<int64_t> d(count, kAbsent), d_u(count, kAbsent);
    // the gradient of layer j's output is complete in this step
    const auto complete = [&](BackwardStep& step, int64_t j) {
      step.target = j;
      step.before = d[j];
      step.has_d_mean = has_d_mean[j];
      step.to_d_u = d_u[j] = memory.allocate(layers[j].out.cells());
      const int64_t residual = layers[j].step.residual;
      if (residual >= 0) {
        step.add_to_residual = d[residual] != kAbsent;
        if (!step.add_to_residual) d[residual] = memory.allocate(layers[residual].out.cells());
        step.to_residual = d[residual];
      }
      plan.steps.push_back(step);
      if (step.before != kAbsent) memory.release(step.before);
    };
    for (size_t i = count; i-- > 0;) {
      const Layer& layer = layers[i];
      const int64_t j = layer.step.input;
      if (d_u[i] == kAbsent) {
        if (d[i] == kAbsent && !has_d_mean[i]) continue;
        BackwardStep step{false, i};
        complete(step, static_cast<int64_t>(i));
      }
      BackwardStep step{true, i, d_u[i]};
      if (j >= 0 && layers[j].first_reader == static_cast<int64_t>(i)) {
        complete(step, j);
      } else if (j >= 0 || need_x) {
        int64_t& total = j < 0 ? plan.d_x : d[j];
        step.target = j;
        step.before = total;
        if (total == kAbsent) total = memory.allocate(layer.in.cells());
        step.total = total;
        plan.steps.push_back(step);
      }
      memory.release(d_u[i]);
    }
    plan.memory = memory.peak();
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

// body(index in the table [group][block][16][32], index in a [B, C] table)
template <class Body>
void for_entries(const Tensor& table, Body body) {
  const int64_t batch = table.size(0), channels = table.size(1), blocks = ceil_div(channels, kChannels);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      body(((b / kImages * blocks + c / kChannels) * kImages + b % kImages) * kChannels + c % kChannels,
           b * channels + c);
    }
  }
}

int64_t table_size(const Tensor& table) {
  return ceil_div(table.size(0), kImages) * ceil_div(table.size(1), kChannels) * kCell;
}

// [B, C] float32 as [group][block][16][32], times `factor`.
void pack_table(float* to, const Tensor& table, double factor = 1) {
  const Tensor dense = table.to(at::kFloat).contiguous();
  const float* const from = dense.const_data_ptr<float>();
  std::fill_n(to, table_size(table), 0.0f);
  for_entries(table,
              [&, by = static_cast<float>(factor)](int64_t packed, int64_t i) { to[packed] = from[i] * by; });
}

// The inverse, for the sum over `chunks` such tables.
void unpack_table(const Tensor& table, const float* from, int64_t chunks) {
  const int64_t size = table_size(table);
  float* const to = table.data_ptr<float>();
  for_entries(table, [&](int64_t packed, int64_t i) {
    float sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += from[chunk * size + packed];
    to[i] = sum;
  });
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

  // The cells of a block of images at `offset`.
  Bits* at(int64_t offset, const Images& images, int64_t group, int64_t block = 0) const {
    return cells + (offset * groups + group * images.cells() + block * images.pixels()) * kCell;
  }

  // body(place in a cell, image, channel) for the images of a group and the channels of a block
  template <class Body>
  void each_value(const Images& images, int64_t group, int64_t block, Body body) const {
    const int64_t image = (first + group) * kImages, channel = block * kChannels;
    for (int64_t b = 0; b < std::min(kImages, plan.batch - image); ++b) {
      for (int64_t c = 0; c < std::min(kChannels, images.channels - channel); ++c) {
        body(b * kChannels + c, image + b, channel + c);
      }
    }
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

// copy(value in the cells at `offset`, value of the images) for all values; `strides` are those of the
// images. Where the images are const, the cells are written: those of no image or channel become 0.
template <class Pointer, class Copy>
void copy_images(const Run& run, int64_t offset, Pointer data, Sizes strides, Copy copy) {
  const Images& images = run.plan.images;
  run.each(images.blocks(), 1, [&](int64_t group, int64_t block, int64_t) {
    Bits* const cells = run.at(offset, images, group, block);
    if constexpr (std::is_const_v<std::remove_pointer_t<Pointer>>) {
      std::fill_n(cells, images.pixels() * kCell, 0);
    }
    run.each_value(images, group, block, [&](int64_t place, int64_t image, int64_t channel) {
      const Pointer plane = data + image * strides[0] + channel * strides[1];
      for (int64_t p = 0; p < images.pixels(); ++p) {
        copy(cells[p * kCell + place],
             plane[p / images.size[1] * strides[2] + p % images.size[1] * strides[3]]);
      }
    });
  });
}

void average(const Run& run, const Layer& layer, const Tensor& mean) {
  auto* const to = mean.data_ptr<at::BFloat16>();
  const Images& images = layer.out;
  run.each(images.blocks(), 1, [&](int64_t group, int64_t block, int64_t) {
    const Bits* from = run.at(layer.y, images, group, block);
    std::vector<float> sums(kCell);
    for (int64_t p = 0; p < images.pixels(); ++p, from += kCell) {
      for (int64_t i = 0; i < kCell; ++i) sums[i] += c10::detail::f32_from_bits(from[i]);
    }
    run.each_value(images, group, block, [&](int64_t place, int64_t image, int64_t channel) {
      to[image * images.channels + channel] = sums[place] / static_cast<float>(images.pixels());
    });
  });
}

// What the forward saves for the backward, one after the other in one piece of memory.
struct Saved {
  const Plan& plan;
  Tensor memory;
  uint32_t* relu_mask;
  float* scale;
  Bits* u;

  static int64_t bytes(const Plan& plan) {
    return plan.groups * (plan.relu_masks * kCell / 8 + plan.tables * kCell * 4 + plan.us * kCell * 2);
  }
  Saved(const Plan& plan, Tensor bytes) : plan(plan), memory(std::move(bytes)) {
    auto* const base = static_cast<uint8_t*>(memory.mutable_data_ptr());
    relu_mask = reinterpret_cast<uint32_t*>(base);
    scale = reinterpret_cast<float*>(base + plan.groups * plan.relu_masks * kCell / 8);
    u = reinterpret_cast<Bits*>(scale + plan.groups * plan.tables * kCell);
  }
  // of a layer, its group and block
  uint32_t* relu_mask_of(const Layer& layer, int64_t group, int64_t block) const {
    if (layer.relu_mask == kAbsent) return nullptr;
    return relu_mask + cell(layer.relu_mask, layer, group, block) * kImages;
  }
  Bits* u_of(const Layer& layer, int64_t group, int64_t block) const {
    return layer.u == kAbsent ? nullptr : u + cell(layer.u, layer, group, block) * kCell;
  }
  float* scales_of(const Layer& layer) const { return scale + layer.table * plan.groups * kCell; }

 private:
  int64_t cell(int64_t first, const Layer& layer, int64_t group, int64_t block) const {
    return first * plan.groups + group * layer.out.cells() + block * layer.out.pixels();
  }
};

std::vector<Tensor> run_forward(const Plan& plan, const Kernels& kernels, const Tensor& x, TensorList shifts,
                                TensorList packed, const Saved& saved) {
  std::vector<Tensor> means;
  std::vector<Tensor> mean_of(plan.layers.size());
  std::vector<float> shift(plan.groups * plan.tables * kCell);
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    const Layer& layer = plan.layers[i];
    pack_table(shift.data() + layer.table * plan.groups * kCell, shifts[i]);
    if (layer.step.averaged) {
      means.push_back(
          mean_of[i] = new_tensor({plan.batch, layer.out.channels}, x.options().memory_format(std::nullopt)));
    }
  }
  for_groups(plan, kernels, [&](int64_t first, int64_t groups, bool shared) {
    const Run run(plan, kernels, first, groups, shared, plan.memory_cells);
    copy_images(run, plan.x, static_cast<const Bits*>(x.const_data_ptr()), x.strides(),
                [](Bits& cell, Bits value) { cell = value; });
    for (size_t i = 0; i < plan.layers.size(); ++i) {
      const Layer& layer = plan.layers[i];
      const Step& s = layer.step;
      const Images& out = layer.out;
      const int64_t chunks = plan.chunks(out.blocks());
      const auto* const weights = static_cast<const Bits*>(packed[i].const_data_ptr());
      run.each(out.blocks(), chunks, [&](int64_t group, int64_t block, int64_t chunk) {
        const int64_t all = first + group;
        const int64_t table = (layer.table * plan.groups + all * out.blocks() + block) * kCell;
        const Bits* const input = run.at(s.input < 0 ? plan.x : plan.layers[s.input].y, layer.in, group);
        const Apply to = {run.at(layer.y, out, group, block),
                          saved.u_of(layer, all, block),
                          saved.relu_mask_of(layer, all, block),
                          s.residual < 0 ? nullptr : run.at(plan.layers[s.residual].y, out, group, block),
                          saved.scale + table,
                          shift.data() + table,
                          s.activation == kRelu};
        kernels.apply(convolution_of(*layer.forward, layer.in, out, input, weights,
                                     layer.geometry.positions(), block, chunk, chunks),
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

void run_backward(const BackwardPlan& backward, const Kernels& kernels, const Saved& saved, TensorList packed,
                  const std::vector<std::vector<float>>& d_means, std::vector<Sums>& sums,
                  const Tensor& d_x) {
  const Plan& plan = saved.plan;
  for_groups(plan, kernels, [&](int64_t first, int64_t groups, bool shared) {
    const Run run(plan, kernels, first, groups, shared, backward.memory);
    for (const BackwardStep& step : backward.steps) {
      const Layer& source = plan.layers[step.source];
      const Layer* const target = step.target < 0 ? nullptr : &plan.layers[step.target];
      const Images& images = target ? target->out : plan.images;
      const int64_t blocks = images.blocks(), pixels = images.pixels(), chunks = plan.chunks(blocks);
      const Tensor& filters = packed[step.source];
      const auto* const weights = static_cast<const Bits*>(filters.const_data_ptr()) + filters.size(1);
      run.each(blocks, chunks, [&](int64_t group, int64_t block, int64_t chunk) {
        const int64_t all = first + group;
        const auto at = [&](int64_t offset) {
          return offset == kAbsent ? nullptr : run.at(offset, images, group, block);
        };
        Propagate to = {};
        to.before = at(step.before);
        to.total = at(step.total);
        if (!to.total) {
          const int64_t table = (all * blocks + block) * kCell;
          to.d_mean = step.has_d_mean ? d_means[step.target].data() + table : nullptr;
          to.relu_mask = saved.relu_mask_of(*target, all, block);
          to.scale = saved.scales_of(*target) + table;
          to.d_u = at(step.to_d_u);
          to.d_residual = at(step.to_residual);
          to.add_to_residual = step.add_to_residual;
          Sums& of_target = sums[step.target];
          if (of_target.chunks > 0) {
            const int64_t offset = chunk * plan.groups * blocks * kCell + table;
            to.u = saved.u_of(*target, all, block);
            to.g1 = of_target.g1.data() + offset;
            to.g2 = of_target.g2.data() + offset;
          }
        }
        if (!step.convolves) {
          return kernels.finish(to, chunk * pixels / chunks, (chunk + 1) * pixels / chunks);
        }
        kernels.propagate(
            convolution_of(*source.backward, source.out, source.in, run.at(step.d_u, source.out, group),
                           weights, source.geometry.positions(), block, chunk, chunks),
            to);
      });
    }
    if (d_x.defined()) {
      copy_images(run, backward.d_x, static_cast<Bits*>(d_x.mutable_data_ptr()), d_x.strides(),
                  [](Bits cell, Bits& value) { value = cell; });
    }
  });
}

}  // namespace

NetworkArgs network_args(const Tensor& x, TensorList scales, TensorList shifts, TensorList weights,
                         TensorList packed, Sizes numbers, bool emulate) {
  const size_t count = weights.size();
  TORCH_CHECK(count > 0 && x.dim() == 4 && x.numel() > 0 && x.scalar_type() == at::kBFloat16,
              "expected layers and bfloat16 images [B, C, H, W], got ", count, " layers and ",
              x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(scales.size() == count && shifts.size() == count && packed.size() == count,
              "expected a scale, a shift and packed filters for each of ", count, " layers, got ",
              scales.size(), ", ", shifts.size(), " and ", packed.size());
  NetworkArgs args{x.sizes().vec(), x.suggest_memory_format(), steps_of(numbers, count)};
  for (size_t i = 0; i < count; ++i) {
    const Sizes shape = weights[i].sizes();
    TORCH_CHECK(shape.size() == 4 && weights[i].numel() > 0, "expected filters [C_out, C_in, kh, kw], got ",
                shape);
    const std::array<int64_t, 2> table = {x.size(0), shape[0]};
    TORCH_CHECK(scales[i].sizes() == Sizes(table) && shifts[i].sizes() == Sizes(table), "layer ", i,
                " needs a scale and a shift ", Sizes(table), ", got ", scales[i].sizes(), " and ",
                shifts[i].sizes());
    const int64_t half =
        ceil_div(shape[0], kChannels) * ceil_div(shape[1], kChannels) * shape[2] * shape[3] * 2 * kCell;
    TORCH_CHECK(packed[i].scalar_type() == at::kBFloat16 && packed[i].is_contiguous() &&
                    packed[i].dim() == 2 && packed[i].size(0) == 2 && packed[i].size(1) == half,
                "layer ", i, ": these are not its packed filters: ", packed[i].sizes());
    args.shapes.push_back(shape.vec());
  }
  args.keep_u.resize(count);
  args.emulate = emulate;
  return args;
}

Outputs network_forward(const NetworkArgs& args, const Tensor& x, TensorList scales, TensorList shifts,
                        TensorList packed) {
  const Plan plan(args);
  const Saved saved(plan, pooled_memory(Saved::bytes(plan)));
  for (size_t i = 0; i < plan.layers.size(); ++i) pack_table(saved.scales_of(plan.layers[i]), scales[i]);
  return {run_forward(plan, kernels(args.emulate), x, shifts, packed, saved), saved.memory};
}

NetworkGradients network_backward(const NetworkArgs& args, TensorList packed, const Tensor& memory,
                                  TensorList d_means, const NetworkNeeds& needs) {
  const Plan plan(args);
  const size_t count = plan.layers.size();
  std::vector<bool> has_d_mean(count);
  std::vector<std::vector<float>> packed_d_means(count);
  std::vector<Sums> sums(count);
  size_t next = 0;
  for (size_t i = 0; i < count; ++i) {
    const Layer& layer = plan.layers[i];
    const int64_t size = plan.groups * layer.out.blocks() * kCell;
    if (layer.step.averaged) {
      const Tensor& d_mean = d_means[next++];
      has_d_mean[i] = d_mean.defined();
      if (has_d_mean[i]) {
        packed_d_means[i].resize(size);
        pack_table(packed_d_means[i].data(), d_mean, 1.0 / static_cast<double>(layer.out.pixels()));
      }
    }
    if (args.keep_u[i] && (needs.scales[i] || needs.shifts[i])) {
      sums[i].chunks = plan.chunks(layer.out.blocks());
      sums[i].g1.resize(size * sums[i].chunks);
      sums[i].g2.resize(size * sums[i].chunks);
    }
  }
  const BackwardPlan backward = plan.backward(has_d_mean, needs.x);
  const auto options = packed[0].options();
  NetworkGradients grads{Tensor(), std::vector<Tensor>(count), std::vector<Tensor>(count)};
  if (needs.x && backward.d_x != kAbsent)
    grads.x = new_tensor(args.images, options.memory_format(args.format));
  run_backward(backward, kernels(args.emulate), Saved(plan, memory), packed, packed_d_means, sums, grads.x);
  for (size_t i = 0; i < count; ++i) {
    if (sums[i].chunks == 0) continue;
    const std::array<int64_t, 2> shape = {plan.batch, plan.layers[i].out.channels};
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
