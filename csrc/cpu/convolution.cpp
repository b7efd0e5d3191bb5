// The direct convolution of convolution.h: geometry, packing, threads.
//
// An image is packed with its padding, row by row, with the phases of the stride separate. Every tap of the
// filter then has one offset from the output to its input, so the convolution is a sum of shifted vectors
// times scalars. Output rows that are whole or half vectors are stored directly from registers, after the
// layer's affine map. Other outputs are computed at the packed image's width, and the values between the rows
// are dropped.
#include "convolution.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../ops.h"
#include "../tensors.h"
#include "passes.h"

namespace awnet::cpu {
namespace {

// With more channels the library's convolution is faster: docs/performance-notes.md.
constexpr int64_t kMostChannels = 256;
// A larger image does not stay in the L2 cache while all filters are applied to it.
constexpr int64_t kMostValues = 1 << 18;
// The Winograd combinations of a larger plane do not fit that cache; the direct sum is as fast or faster.
constexpr int64_t kMostCombined = 64 * 64;
// Values of a sample's packed image or packed gradient, which padding, dilation and stride can make
// arbitrarily large. The library handles larger ones.
constexpr int64_t kMostPacked = 2 * kMostValues;
// Below these sizes no product in a plan overflows.
constexpr int64_t kMostSize = 1 << 20, kMostTaps = 128, kMostStride = 8;
// Output vectors that a kernel computes at once.
constexpr int64_t kTile = 3;

const char* const kNotTaken =
    "the direct convolution does not take these images, weights and sizes (see `convolves`)";

int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }

const ConvolutionKernels& kernels() {
#if defined(__x86_64__)
  return avx512::convolution;
#else
  TORCH_CHECK(false, "the direct convolution needs AVX512");
#endif
}

// Memory of the calling thread, one block for images and one for filters, reused between calls so that it
// stays in the cache. Valid until the thread's next call with the same Keep.
enum class Keep { kImages, kFilters };
template <Keep>
float* thread_memory(int64_t values) {
  thread_local std::vector<float> memory;
  values += kLanes;
  if (static_cast<int64_t>(memory.size()) < values) memory = std::vector<float>(values);
  constexpr uintptr_t line = kLanes * sizeof(float);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + line - 1) / line * line);
}

// The positions of a plane's vectors in a packed plane with row stride `pitch` and first value at `start`;
// empty if the rows are neither whole vectors nor pairs of half vectors.
Vectors vectors_of(int64_t rows, int64_t width, int64_t pitch, int64_t start) {
  Vectors vectors{{}, kHalf};
  if (width % kLanes == 0) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; j += kLanes) vectors.at.push_back(start + i * pitch + j);
    }
  } else if (width == kHalf && rows % 2 == 0) {
    for (int64_t i = 0; i < rows; i += 2) vectors.at.push_back(start + i * pitch);
    vectors.second = pitch;
  }
  return vectors;
}

// One phase of the outputs, those at begin, begin + stride, ..., and its taps.
struct Phase {
  int64_t begin[2];             // row, column
  std::vector<int64_t> offset;  // of a tap's input from the output, in the packed image
  std::vector<int64_t> tap;     // its index in the filter
  int64_t weights;              // where its packed weights begin
};

// The layout of WinogradInput, in values, and the filter's taps row by row.
struct Winograd {
  int64_t bands, bands_of_group, width;  // width: of the outputs' rows
  int64_t pitch, lanes, point, group;    // of a row, a channel, a point, all points of a group
  int64_t taps[9];

  int64_t values() const { return bands / bands_of_group * group; }  // of a sample
};

struct Plan {
  int64_t inputs, outputs;    // channels
  int64_t pixels;             // of an input plane
  int64_t size[2];            // of a phase of the packed image
  int64_t plane;              // values of a packed channel
  Vectors at;                 // the inputs of an output plane's vectors
  bool dense;                 // whether these vectors are the plane's values and nothing else
  int64_t pitch;              // of the rows of a phase of outputs
  int64_t blocks;             // of kConvolveRows outputs
  int64_t together = 1;       // samples that are packed at once
  std::vector<Phase> phases;  // of the outputs
  float* weights;             // packed; valid until this thread's next plan
  std::optional<Winograd> winograd;

  Plan(int64_t inputs, int64_t outputs) : inputs(inputs), outputs(outputs) {
    blocks = ceil_div(outputs, kConvolveRows);
  }

  // `at(output, input)`: the first value of that filter
  template <class At>
  void pack_weights(At at) {
    if (winograd) {
      float* to = weights = thread_memory<Keep::kFilters>(outputs * inputs * 3 * kPoints);
      const int64_t point = inputs * 3 * kConvolveRows, stride = at(1, 0) - at(0, 0);
      for (int64_t first = 0; first < outputs; first += kConvolveRows, to += (kPoints - 1) * point) {
        for (int64_t input = 0; input < inputs; ++input, to += 3 * kConvolveRows) {
          kernels().winograd_weights(to, point, at(first, input), stride, winograd->taps);
        }
      }
      return;
    }
    int64_t count = 0;
    for (Phase& phase : phases) {
      phase.weights = count;
      count += outputs * inputs * static_cast<int64_t>(phase.tap.size());
    }
    float* to = weights = thread_memory<Keep::kFilters>(count);
    for (const Phase& phase : phases) {
      for (int64_t first = 0; first < outputs; first += kConvolveRows) {
        const int64_t rows = std::min<int64_t>(outputs - first, kConvolveRows);
        for (int64_t input = 0; input < inputs; ++input) {
          const float* from[kConvolveRows];
          for (int64_t r = 0; r < rows; ++r) from[r] = at(first + r, input);
          for (const int64_t tap : phase.tap) {
            for (int64_t r = 0; r < rows; ++r) *to++ = from[r][tap];
          }
        }
      }
    }
  }

  // The Winograd layout, for 3x3 filters with stride 1 and outputs of whole bands.
  std::optional<Winograd> combinations(int64_t rows, int64_t columns) const {
    if (!dense || phases.size() != 1 || phases[0].tap.size() != 9) return std::nullopt;
    if (rows % kBand != 0 || outputs % kConvolveRows != 0 || inputs < kConvolveRows) return std::nullopt;
    if (rows * columns > kMostCombined) return std::nullopt;
    Winograd w;
    std::fill_n(w.taps, 9, -1);
    for (size_t t = 0; t < 9; ++t) {
      const int64_t row = phases[0].offset[t] / size[1], column = phases[0].offset[t] % size[1];
      if (row > 2 || column > 2) return std::nullopt;
      w.taps[3 * row + column] = phases[0].tap[t];
    }
    if (std::find(w.taps, w.taps + 9, -1) != w.taps + 9) return std::nullopt;
    w.bands = rows / kBand;
    w.bands_of_group = columns == kHalf ? 2 : 1;
    if (w.bands % w.bands_of_group != 0) return std::nullopt;
    w.width = columns;
    w.pitch = ceil_div(size[1], kLanes) * kLanes;
    w.lanes = w.bands_of_group * w.pitch;
    w.point = inputs * w.lanes;
    w.group = kPoints * w.point;
    return w;
  }

  void lay_out(int64_t in_phases, int64_t rows, int64_t columns, int64_t batch) {
    plane = in_phases * size[0] * size[1];
    at = vectors_of(rows, columns, size[1], 0);
    dense = !at.at.empty();
    pitch = dense ? columns : size[1];
    winograd = combinations(rows, columns);
    if (winograd) {
      const Winograd& w = *winograd;
      const int64_t each = rows * columns / (kBand * kLanes), across = ceil_div(columns, kLanes);
      if (each % kTile != 0) {
        const int64_t room = kMostValues / w.values();
        together = std::clamp<int64_t>(std::min(room, ceil_div(batch, at::get_num_threads())), 1, kTile);
      }
      at = {{}, w.bands_of_group == 2 ? w.pitch : kHalf};
      for (int64_t v = 0; v < together * each; ++v) {
        at.at.push_back(v / across * w.group + v % across * kLanes);
      }
    } else if (!dense) {
      for (int64_t i = 0; i < (rows - 1) * pitch + columns; i += kLanes) at.at.push_back(i);
    }
  }

  // A thread's memory starts with the packed image, or with one packed channel and its combinations.
  int64_t padded() const {  // the last vectors read beyond
    return (winograd ? ceil_div(plane, kLanes) * kLanes : inputs * plane) + kLanes;
  }
  int64_t packed() const { return padded() + (winograd ? together * winograd->values() : 0); }

  // Where to pack a channel of a sample; `combine` follows.
  float* channel_of(float* memory, int64_t channel) const {
    return winograd ? memory : memory + channel * plane;
  }
  void combine(float* memory, int64_t sample, int64_t channel) const {
    if (!winograd) return;
    const Winograd& w = *winograd;
    for (int64_t b = 0; b < w.bands; ++b) {
      float* const to = memory + padded() + sample * w.values() + b / w.bands_of_group * w.group +
                        channel * w.lanes + b % w.bands_of_group * w.pitch;
      kernels().winograd_rows(to, w.point, memory + b * kBand * size[1], size[1], size[1]);
    }
  }

  int64_t channel_values() const { return static_cast<int64_t>(at.at.size()) * kLanes; }
  int64_t phase_values() const { return kConvolveRows * channel_values(); }
  int64_t scratch() const { return static_cast<int64_t>(phases.size()) * phase_values(); }

  // A phase of block `block` of the outputs of a packed image.
  void run(const ConvolveOutput& to, const float* image, int64_t block, const Phase& phase,
           int64_t samples = 1) const {
    const int64_t first = block * kConvolveRows, count = std::min<int64_t>(kConvolveRows, outputs - first);
    const int64_t taps = static_cast<int64_t>(phase.tap.size()), vectors = static_cast<int64_t>(at.at.size());
    if (winograd) {
      const Winograd& w = *winograd;
      const int64_t each = vectors / together;
      kernels().winograd(to, {image + padded(), w.point, inputs, w.lanes, at.at.data(), at.second,
                              samples * each, each, w.width, weights + first * inputs * 3 * kPoints});
      return;
    }
    const float* filters = weights + phase.weights + first * inputs * taps;
    kernels().convolve[count - 1](
        to, {image, plane, inputs, at.at.data(), at.second, vectors, phase.offset.data(), taps, filters});
  }

  // All phases in order, each [channel][channel_values].
  void run(float* out, const float* image, int64_t block) const {
    for (const Phase& phase : phases) {
      run({.u = out, .plane = channel_values()}, image, block, phase);
      out += phase_values();
    }
  }
};

// Groups of samples and blocks of outputs over the threads: body(first and last sample, block, whether the
// group is new to the thread, its buffer). A group may be shared by threads; each packs it for itself.
template <class Body>
void for_blocks(const Plan& plan, int64_t batch, int64_t values, Body body) {
  const int64_t groups = ceil_div(batch, plan.together);
  at::parallel_for(0, groups * plan.blocks, 1, [&](int64_t begin, int64_t end) {
    float* const memory = thread_memory<Keep::kImages>(values);
    std::memset(memory, 0, plan.padded() * sizeof(float));
    int64_t packed = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / plan.blocks;
      body(group * batch / groups, (group + 1) * batch / groups, i % plan.blocks, group != packed, memory);
      packed = group;
    }
  });
}

bool valid(const Window& window) {
  const auto all = [](Sizes sizes, int64_t least, int64_t most) {
    return sizes.size() == 2 && std::min(sizes[0], sizes[1]) >= least && std::max(sizes[0], sizes[1]) <= most;
  };
  return all(window.stride, 1, kMostStride) && all(window.padding, 0, kMostSize) &&
         all(window.dilation, 1, kMostSize);
}

bool valid(Sizes image, const at::Tensor& weight) {
  return image.size() == 4 && weight.dim() == 4 && weight.numel() > 0 &&
         std::max(image[2], image[3]) <= kMostSize && std::max(weight.size(2), weight.size(3)) <= kMostTaps;
}

// The output's size along an axis, of sizes checked by `valid`; below 1 if the filter is too large.
int64_t output_size(int64_t input, int64_t kernel, const Window& window, int axis) {
  const int64_t room = input + 2 * window.padding[axis] - window.dilation[axis] * (kernel - 1) - 1;
  return room < 0 ? 0 : room / window.stride[axis] + 1;
}

// Whether Forward's packed image is of a reasonable size.
bool packs(Sizes image, const at::Tensor& weight, const Window& window) {
  if (!valid(window) || !valid(image, weight)) return false;
  int64_t packed = weight.size(1);
  for (int d = 0; d < 2; ++d) {
    const int64_t kernel = weight.size(2 + d), out = output_size(image[2 + d], kernel, window, d);
    const int64_t size = out + window.dilation[d] * (kernel - 1) / window.stride[d];
    if (out < 1 || size > kMostPacked) return false;
    packed *= size * std::min(window.stride[d], kernel);
    if (packed > kMostPacked) return false;
  }
  return true;
}

// Whether Backward's is, which holds the gradient of the output, and the phases of the input's gradient.
bool packs_back(Sizes image, const at::Tensor& weight, const Window& window) {
  if (!valid(window) || !valid(image, weight)) return false;
  int64_t packed = weight.size(0), phases = 1;
  for (int d = 0; d < 2; ++d) {
    const int64_t far = window.padding[d] + window.dilation[d] * (weight.size(2 + d) - 1) + window.stride[d];
    const int64_t phase = ceil_div(image[2 + d], window.stride[d]),
                  size = phase + 2 * (far / window.stride[d] + 1);
    if (output_size(image[2 + d], weight.size(2 + d), window, d) < 1 || size > kMostPacked) return false;
    packed *= size;
    phases *= phase * window.stride[d];
    if (packed > kMostPacked || phases > kMostPacked) return false;
  }
  return true;
}

struct Forward : Plan {
  int64_t in_size[2], out_size[2];
  struct Source {
    int64_t phase[2];
  };
  std::vector<Source> sources;  // phases of the input that a tap reads
  Vectors place;                // of the input in the packed image; empty if it is packed row by row
  Window window;

  Forward(const at::Tensor& input, const at::Tensor& weight, const Window& window)
      : Plan(weight.size(1), weight.size(0)), window(window) {
    const int64_t kernel[2] = {weight.size(2), weight.size(3)};
    TORCH_CHECK(input.size(1) == inputs, "expected ", inputs, " channels, got ", input.size(1));
    pixels = input.size(2) * input.size(3);
    for (int d = 0; d < 2; ++d) {
      const int64_t reach = window.dilation[d] * (kernel[d] - 1);
      in_size[d] = input.size(2 + d);
      const int64_t room = in_size[d] + 2 * window.padding[d] - reach - 1;
      TORCH_CHECK(room >= 0, "the filter is larger than the padded image");
      out_size[d] = room / window.stride[d] + 1;
      size[d] = out_size[d] + reach / window.stride[d];
    }
    Phase phase{{0, 0}, {}, {}, 0};
    for (int64_t i = 0; i < kernel[0]; ++i) {
      for (int64_t j = 0; j < kernel[1]; ++j) {
        const int64_t at[2] = {i * window.dilation[0], j * window.dilation[1]};
        const int64_t row = at[0] % window.stride[0], column = at[1] % window.stride[1];
        const auto same = [&](const Source& s) { return s.phase[0] == row && s.phase[1] == column; };
        const auto source = std::find_if(sources.begin(), sources.end(), same);
        const int64_t number = source - sources.begin();
        if (source == sources.end()) sources.push_back({{row, column}});
        phase.offset.push_back((number * size[0] + at[0] / window.stride[0]) * size[1] +
                               at[1] / window.stride[1]);
        phase.tap.push_back(i * kernel[1] + j);
      }
    }
    phases.push_back(phase);
    lay_out(static_cast<int64_t>(sources.size()), out_size[0], out_size[1], input.size(0));
    const float* from = weight.const_data_ptr<float>();
    const int64_t taps = kernel[0] * kernel[1];
    pack_weights(
        [=, this](int64_t output, int64_t input) { return from + (output * inputs + input) * taps; });
    if (window.stride[0] == 1 && window.stride[1] == 1) {
      place = vectors_of(in_size[0], in_size[1], size[1], window.padding[0] * size[1] + window.padding[1]);
    }
  }

  // One channel; the padding is zero already.
  void pack(float* to, const float* image) const {
    if (!place.at.empty()) {
      kernels().scatter(to, place, image);
      return;
    }
    for (const Source& source : sources) {
      const int64_t stride = window.stride[1];
      const int64_t first = ceil_div(window.padding[1] - source.phase[1], stride);
      const int64_t left = source.phase[1] + first * stride - window.padding[1];
      const int64_t count = std::min(size[1] - first, ceil_div(in_size[1] - left, stride));
      for (int64_t i = 0; i < size[0]; ++i, to += size[1]) {
        const int64_t row = source.phase[0] + i * window.stride[0] - window.padding[0];
        if (row < 0 || row >= in_size[0] || count <= 0) continue;
        const float* from = image + row * in_size[1] + left;
        if (stride == 1) {
          std::memcpy(to + first, from, count * sizeof(float));
        } else if (stride == 2) {
          kernels().every_second(to + first, from, count);
        } else {
          for (int64_t j = 0; j < count; ++j) to[first + j] = from[j * stride];
        }
      }
    }
  }

  // Copies a channel's outputs without the values between the rows.
  void unpack(float* to, const float* from) const {
    for (int64_t i = 0; i < out_size[0]; ++i) {
      std::memcpy(to + i * out_size[1], from + i * size[1], out_size[1] * sizeof(float));
    }
  }
};

// Writes u = conv(input, weight) and y to `to`, in dense planes; calls finish(plane) for each.
template <class Finish>
void convolve_each(const at::Tensor& input, const Forward& plan, const ConvolveOutput& to, Finish finish) {
  const int64_t batch = input.size(0);
  const float* images = input.const_data_ptr<float>();
  const auto from = [](auto* start, int64_t at) { return start ? start + at : nullptr; };
  const auto body = [&](int64_t b, int64_t end, int64_t block, bool fresh, float* memory) {
    float* const out = memory + plan.packed();
    for (int64_t sample = b; fresh && sample < end; ++sample) {
      for (int64_t c = 0; c < plan.inputs; ++c) {
        plan.pack(plan.channel_of(memory, c), images + (sample * plan.inputs + c) * plan.pixels);
        plan.combine(memory, sample - b, c);
      }
    }
    const int64_t first = b * plan.outputs + block * kConvolveRows, at = first * to.plane;
    if (plan.dense) {
      plan.run({from(to.u, at), from(to.y, at), from(to.relu_mask, at), from(to.residual, at),
                from(to.scale, first), from(to.shift, first), to.plane, to.relu, plan.outputs},
               memory, block, plan.phases[0], end - b);
    } else {
      plan.run(out, memory, block);
    }
    const int64_t count = std::min(kConvolveRows, plan.outputs - block * kConvolveRows);
    for (int64_t sample = b; sample < end; ++sample) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t c = sample * plan.outputs + block * kConvolveRows + i;
        if (!plan.dense) {
          const int64_t begin = c * to.plane;
          float* const u = from(to.u ? to.u : to.y, begin);
          plan.unpack(u, out + i * plan.channel_values());
          if (to.y) {
            float32_passes().apply_plane(to.y + begin, from(to.relu_mask, begin), u, from(to.residual, begin),
                                         to.plane, to.scale[c], to.shift[c], to.relu);
          }
        }
        finish(c);
      }
    }
  };
  for_blocks(plan, batch, plan.packed() + plan.scratch(), body);
}

std::vector<int64_t> output_shape(const at::Tensor& input, const Forward& plan) {
  return {input.size(0), plan.outputs, plan.out_size[0], plan.out_size[1]};
}

struct Backward : Plan {
  int64_t in_size[2], out_size[2], low[2];  // in: of the input's gradient, out: of the output's
  Vectors place;                            // of the output's gradient in the packed image; may be empty
  Window window;
  std::vector<bool> untouched;  // phases of rows that no tap reaches

  Backward(Sizes input_shape, const at::Tensor& grad, const at::Tensor& weight, const Window& window)
      : Plan(weight.size(0), weight.size(1)), window(window) {
    const int64_t kernel[2] = {weight.size(2), weight.size(3)};
    pixels = grad.size(2) * grad.size(3);
    int64_t high[2] = {0, 0};
    const auto distance = [&](int d, int64_t begin, int64_t k) {
      return begin + window.padding[d] - k * window.dilation[d];
    };
    for (int d = 0; d < 2; ++d) {
      in_size[d] = input_shape[2 + d];
      out_size[d] = grad.size(2 + d);
      low[d] = 0;
      for (int64_t begin = 0; begin < window.stride[d]; ++begin) {
        for (int64_t k = 0; k < kernel[d]; ++k) {
          const int64_t far = distance(d, begin, k);
          if (far % window.stride[d] != 0) continue;
          low[d] = std::min(low[d], far / window.stride[d]);
          high[d] = std::max(high[d], far / window.stride[d]);
        }
      }
      size[d] = ceil_div(in_size[d], window.stride[d]) + high[d] - low[d];
    }
    untouched.assign(window.stride[0], true);
    for (int64_t row = 0; row < window.stride[0]; ++row) {
      for (int64_t column = 0; column < window.stride[1]; ++column) {
        Phase phase{{row, column}, {}, {}, 0};
        for (int64_t i = 0; i < kernel[0]; ++i) {
          for (int64_t j = 0; j < kernel[1]; ++j) {
            const int64_t down = distance(0, row, i), right = distance(1, column, j);
            if (down % window.stride[0] != 0 || right % window.stride[1] != 0) continue;
            phase.offset.push_back((down / window.stride[0] - low[0]) * size[1] + right / window.stride[1] -
                                   low[1]);
            phase.tap.push_back(i * kernel[1] + j);
            untouched[row] = false;
          }
        }
        phases.push_back(phase);
      }
    }
    lay_out(1, ceil_div(in_size[0], window.stride[0]), ceil_div(in_size[1], window.stride[1]), grad.size(0));
    const float* from = weight.const_data_ptr<float>();
    const int64_t taps = kernel[0] * kernel[1];
    pack_weights(
        [=, this](int64_t output, int64_t input) { return from + (input * outputs + output) * taps; });
    if (out_size[0] <= size[0] + low[0] && out_size[1] <= size[1] + low[1]) {
      place = vectors_of(out_size[0], out_size[1], size[1], -low[0] * size[1] - low[1]);
    }
  }

  // Whether the input's gradient is one phase of whole vectors.
  bool direct() const { return dense && phases.size() == 1; }

  void pack(float* to, const float* d_u) const {
    const int64_t last = std::min(out_size[0], size[0] + low[0]);
    const int64_t count = std::min(out_size[1], size[1] + low[1]);
    to -= low[0] * size[1] + low[1];
    for (int64_t i = 0; i < last; ++i) {
      std::memcpy(to + i * size[1], d_u + i * out_size[1], count * sizeof(float));
    }
  }

  // Interleaves the phases of a channel of the input's gradient; `add` accumulates.
  void unpack(float* to, const float* from, bool add) const {
    const int64_t step[2] = {window.stride[0], window.stride[1]};
    for (int64_t row = 0; row < in_size[0]; ++row, to += in_size[1]) {
      if (add && untouched[row % step[0]]) continue;
      const float* line = from + row % step[0] * step[1] * phase_values() + row / step[0] * pitch;
      if (step[1] == 1) {
        if (!add) std::memcpy(to, line, in_size[1] * sizeof(float));
        for (int64_t j = 0; add && j < in_size[1]; ++j) to[j] += line[j];
      } else if (step[1] == 2) {
        const int64_t pairs = in_size[1] / 2;
        kernels().interleave(to, line, line + phase_values(), pairs, add);
        if (in_size[1] % 2 != 0) to[2 * pairs] = line[pairs] + (add ? to[2 * pairs] : 0.0f);
      } else {
        for (int64_t j = 0; j < in_size[1]; ++j) {
          to[j] = line[j % step[1] * phase_values() + j / step[1]] + (add ? to[j] : 0.0f);
        }
      }
    }
  }
};

const float* plane_of(const std::optional<at::Tensor>& x, int64_t at) {
  return x ? x->const_data_ptr<float>() + at : nullptr;
}

// `images`: the convolution's input or output.
bool takes(const at::Tensor& images, const at::Tensor& weight, int64_t groups) {
  static const bool able = std::string(instruction_set()) == "avx512";
  if (!able || groups != 1 || images.dim() != 4 || weight.dim() != 4) return false;
  if (images.scalar_type() != at::kFloat || weight.scalar_type() != at::kFloat) return false;
  if (!images.is_contiguous() || weight.size(0) > kMostChannels || weight.size(1) > kMostChannels)
    return false;
  return images.size(0) == 0 || images.numel() / images.size(0) <= kMostValues;
}

at::Tensor table(const at::Tensor& x, const at::Tensor& images, const char* name) {
  const int64_t shape[2] = {images.size(0), images.size(1)};
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.sizes() == Sizes(shape), name, " must be float32 ",
              Sizes(shape), ", got ", x.scalar_type(), " ", x.sizes());
  return x.contiguous();
}

at::Tensor image(const at::Tensor& x, const at::Tensor& like, const char* name, bool mask = false) {
  TORCH_CHECK(
      (x.scalar_type() == at::kFloat || (mask && x.scalar_type() == at::kBool)) && x.sizes() == like.sizes(),
      name, " must be float32 ", like.sizes(), ", got ", x.scalar_type(), " ", x.sizes());
  return x.contiguous();
}

template <class Check>
std::optional<at::Tensor> checked(const std::optional<at::Tensor>& x, Check check) {
  return x ? std::optional<at::Tensor>(check(*x)) : std::nullopt;
}

}  // namespace

bool convolves(const at::Tensor& input, const at::Tensor& weight, const Window& window, int64_t groups) {
  return takes(input, weight, groups) && input.size(1) == weight.size(1) &&
         packs(input.sizes(), weight, window);
}

bool convolves_back(Sizes input_shape, const at::Tensor& grad, const at::Tensor& weight, const Window& window,
                    int64_t groups) {
  if (!takes(grad, weight, groups) || !packs_back(input_shape, weight, window)) return false;
  bool fits =
      input_shape[0] == grad.size(0) && input_shape[1] == weight.size(1) && grad.size(1) == weight.size(0);
  for (int d = 0; d < 2; ++d) {
    fits = fits && grad.size(2 + d) == output_size(input_shape[2 + d], weight.size(2 + d), window, d);
  }
  return fits;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolve_apply(
    const at::Tensor& input, const at::Tensor& weight_in, const Window& window, const at::Tensor& scale_in,
    const at::Tensor& shift_in, const std::optional<at::Tensor>& residual_in, int64_t activation, bool keep_u,
    bool keep_mask) {
  TORCH_CHECK(convolves(input, weight_in, window, 1), kNotTaken);
  check_activation(activation, keep_mask);
  const bool smooth = activation > kRelu;
  const at::Tensor weight = weight_in.contiguous();
  const Forward plan(input, weight, window);
  const at::Tensor y = new_tensor(output_shape(input, plan), input.options());
  const at::Tensor u = keep_u ? new_tensor_like(y) : new_tensor({0}, input.options());
  const at::Tensor mask =
      new_tensor(keep_mask ? y.sizes() : Sizes({0}),
                 smooth && keep_mask ? input.options() : input.options().dtype(at::kBool));
  const at::Tensor scale = table(scale_in, y, "scale"), shift = table(shift_in, y, "shift");
  const auto residual = checked(residual_in, [&](const at::Tensor& x) { return image(x, y, "residual"); });
  const int64_t values = plan.out_size[0] * plan.out_size[1];
  if (smooth) {  // of a plane as soon as it is convolved; without keep_u in the place of u
    float *const y_p = y.data_ptr<float>(), *const u_p = keep_u ? u.data_ptr<float>() : y_p,
                 *const slope_p = keep_mask ? mask.data_ptr<float>() : nullptr;
    const float *const scale_p = scale.const_data_ptr<float>(), *const shift_p =
                                                                    shift.const_data_ptr<float>();
    convolve_each(input, plan, {.u = u_p, .plane = values}, [&](int64_t plane) {
      const int64_t at = plane * values;
      float32_passes().activate_plane(y_p + at, slope_p ? slope_p + at : nullptr, u_p + at,
                                      plane_of(residual, at), values, scale_p[plane], shift_p[plane],
                                      static_cast<Activation>(activation));
    });
    return {y, u, mask};
  }
  convolve_each(input, plan,
                {keep_u ? u.data_ptr<float>() : nullptr, y.data_ptr<float>(),
                 keep_mask ? static_cast<uint8_t*>(mask.data_ptr()) : nullptr, plane_of(residual, 0),
                 scale.const_data_ptr<float>(), shift.const_data_ptr<float>(), values, activation == kRelu},
                [](int64_t) {});
  return {y, u, mask};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolve_statistics(const at::Tensor& input,
                                                                   const at::Tensor& weight_in,
                                                                   const Window& window) {
  TORCH_CHECK(convolves(input, weight_in, window, 1), kNotTaken);
  const at::Tensor weight = weight_in.contiguous();
  const Forward plan(input, weight, window);
  const at::Tensor u = new_tensor(output_shape(input, plan), input.options());
  const int64_t values = plan.out_size[0] * plan.out_size[1];
  const std::vector<int64_t> table = {u.size(0), u.size(1)};
  const at::Tensor mean = new_tensor(table, input.options()), m2 = new_tensor(table, input.options());
  float *const u_p = u.data_ptr<float>(), *const mean_p = mean.data_ptr<float>(),
               *const m2_p = m2.data_ptr<float>();
  const ConvolveOutput to{.u = u_p, .plane = values};
  convolve_each(input, plan, to, [&](int64_t plane) {
    float32_passes().statistics_plane(u_p + plane * values, values, mean_p + plane, m2_p + plane);
  });
  return {u, mean, m2};
}

Back convolve_back(const BackArgs& args) {
  const at::Tensor& grad = args.grad;
  const Propagation& by = args.propagation;
  const bool sums = args.need_sums;
  TORCH_CHECK(convolves_back(args.input_shape, grad, args.weight, args.window, 1), kNotTaken);
  TORCH_CHECK(!(sums || by.by_input) || (args.u && args.centre), "sums and by_input need u and centre");
  TORCH_CHECK(by.by_input.has_value() == by.constant.has_value(), "by_input and constant come together");
  const at::Tensor weight = args.weight.contiguous(), by_grad = table(by.by_grad, grad, "by_grad");
  const Backward plan(args.input_shape, grad, weight, args.window);
  const auto image_of = [&](const std::optional<at::Tensor>& x, const char* name, bool mask = false) {
    return checked(x, [&](const at::Tensor& y) { return image(y, grad, name, mask); });
  };
  const auto table_of = [&](const std::optional<at::Tensor>& x, const char* name) {
    return checked(x, [&](const at::Tensor& y) { return table(y, grad, name); });
  };
  const auto u = image_of(args.u, "u"), relu_mask = image_of(args.relu_mask, "relu_mask", true),
             slope = image_of(args.slope, "slope"), centre = table_of(args.centre, "centre"),
             by_input = table_of(by.by_input, "by_input"), constant = table_of(by.constant, "constant");
  const at::Tensor none = new_tensor({0}, grad.options());
  const bool add = args.onto.has_value();
  TORCH_CHECK(!add || (args.onto->sizes() == args.input_shape && args.onto->is_contiguous()),
              "expected a contiguous gradient ", args.input_shape, " to add to");
  Back back{add ? *args.onto : new_tensor(args.input_shape, grad.options()),
            args.need_residual ? new_tensor_like(grad) : none, args.need_d_u ? new_tensor_like(grad) : none,
            sums ? new_tensor_like(by_grad) : none, sums ? new_tensor_like(by_grad) : none};
  const int64_t values = plan.pixels, out_values = plan.in_size[0] * plan.in_size[1];
  const auto pointer = [](const at::Tensor& x) { return x.numel() > 0 ? x.data_ptr<float>() : nullptr; };
  float *const d_input = back.d_input.data_ptr<float>(), *const d_residual = pointer(back.d_residual),
               *const d_u = pointer(back.d_u), *const g1 = pointer(back.g1), *const gc = pointer(back.gc);
  const float *const g_p = grad.const_data_ptr<float>(), *const by_grad_p = by_grad.const_data_ptr<float>();
  const bool by_mask = relu_mask && relu_mask->scalar_type() == at::kBool;
  const Gate<float> gate = {relu_mask && !by_mask ? relu_mask->const_data_ptr<float>() : nullptr,
                            by_mask ? static_cast<const uint8_t*>(relu_mask->const_data_ptr()) : nullptr,
                            plane_of(slope, 0)};
  const float *const u_p = plane_of(u, 0), *const centre_p = plane_of(centre, 0),
                     *const by_input_p = plane_of(by_input, 0), *const constant_p = plane_of(constant, 0);
  const Kernels<float>& passes = float32_passes();

  // Packs one channel of a sample, and writes the other outputs if this block is the `first`.
  const auto pack = [&](int64_t b, int64_t c, bool first, float* to, float* spare) {
    const int64_t plane = b * plan.inputs + c, at = plane * values;
    const PlaneGradient p{
        g_p + at,
        u_p ? u_p + at : nullptr,
        gate.from(at),
        {centre_p ? centre_p[plane] : 0.0f, by_grad_p[plane], by_input_p ? by_input_p[plane] : 0.0f,
         by_input_p ? constant_p[plane] : 0.0f},
        by_input.has_value(),
        first && d_u ? d_u + at : nullptr,
        first && d_residual ? d_residual + at : nullptr,
        first && sums ? g1 + plane : nullptr,
        first && sums ? gc + plane : nullptr,
    };
    if (!plan.place.at.empty() && !gate.slope) {
      kernels().propagate(to, plan.place, p);
      return;
    }
    if (p.g1) passes.reduce_plane(p.grad, p.u, p.gate, values, p.coeffs.centre, p.g1, p.gc);
    float* const d = p.d_u ? p.d_u : spare;
    passes.propagate_plane(d, p.d_residual, p.grad, p.through ? p.u : nullptr, p.gate, values, p.coeffs);
    plan.pack(to, d);
  };
  const int64_t packed = plan.packed(), scratch = plan.scratch();
  const auto body = [&](int64_t b, int64_t end, int64_t block, bool fresh, float* memory) {
    float* const out = memory + packed;
    for (int64_t sample = b; fresh && sample < end; ++sample) {
      for (int64_t c = 0; c < plan.inputs; ++c) {
        // one thread writes the other outputs
        pack(sample, c, block == 0, plan.channel_of(memory, c), out + scratch);
        plan.combine(memory, sample - b, c);
      }
    }
    const int64_t first = b * plan.outputs + block * kConvolveRows;
    if (plan.direct()) {
      plan.run({.u = d_input + first * out_values, .plane = out_values, .sample = plan.outputs, .add = add},
               memory, block, plan.phases[0], end - b);
      return;
    }
    plan.run(out, memory, block);
    const int64_t last = std::min(first + kConvolveRows, (b + 1) * plan.outputs);
    for (int64_t c = first; c < last; ++c) {
      plan.unpack(d_input + c * out_values, out + (c - first) * plan.channel_values(), add);
    }
  };
  for_blocks(plan, grad.size(0), packed + scratch + values, body);
  return back;
}

}  // namespace awnet::cpu
