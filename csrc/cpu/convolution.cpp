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
#include <array>
#include <cstring>
#include <vector>

#include "../tensors.h"
#include "passes.h"

namespace awnet::cpu {
namespace {

// With more channels the library's convolution is faster: docs/performance-notes.md.
constexpr int64_t kMaxChannels = 256;
// A larger image does not stay in the L2 cache while all filters are applied to it.
constexpr int64_t kMaxValues = 1 << 18;
// The transformed input of a larger plane does not fit that cache; the direct sum is as fast or faster.
constexpr int64_t kMaxWinograd = 64 * 64;
// Values of a sample's packed image or packed gradient, which padding, dilation and stride can make
// arbitrarily large. The library handles larger ones.
constexpr int64_t kMaxPacked = 2 * kMaxValues;
// Below these sizes no product in a plan overflows.
constexpr int64_t kMaxSize = 1 << 20, kMaxTaps = 128, kMaxStride = 8;
// Output vectors that a kernel computes at once.
constexpr int64_t kTile = 3;

const char* const kNotSupported =
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
// stays in the cache. Valid until the thread's next call with the same Buffer.
enum class Buffer { kImages, kFilters };
template <Buffer>
float* thread_buffer(int64_t values) {
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
      for (int64_t j = 0; j < width; j += kLanes) vectors.offsets.push_back(start + i * pitch + j);
    }
  } else if (width == kHalf && rows % 2 == 0) {
    for (int64_t i = 0; i < rows; i += 2) vectors.offsets.push_back(start + i * pitch);
    vectors.second = pitch;
  }
  return vectors;
}

// The taps of one phase of the outputs, those at begin, begin + stride, ...
struct Phase {
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
  Conv conv;
  int64_t inputs, outputs;          // channels
  int64_t in_size[2], out_size[2];  // of the convolution's planes
  int64_t pixels;                   // of an input plane
  int64_t size[2];                  // of a phase of the packed image
  int64_t plane;                    // values of a packed channel
  Vectors input;                    // of an input plane in the packed image; empty if it is packed row by row
  Vectors vectors;                  // the inputs of an output plane's vectors
  bool dense;                       // whether these vectors are the plane's values and nothing else
  int64_t pitch;                    // of the rows of a phase of outputs
  int64_t blocks;                   // of kConvolveRows outputs
  int64_t together = 1;             // samples that are packed at once
  std::vector<Phase> phases;        // of the outputs
  float* weights;                   // packed; valid until this thread's next plan
  std::optional<Winograd> winograd;

  Plan(int64_t inputs, int64_t outputs, const Conv& conv)
      : conv(conv), inputs(inputs), outputs(outputs), blocks(ceil_div(outputs, kConvolveRows)) {}

  // The strides are those of the filters of an output and an input.
  void pack_weights(const Tensor& weight, int64_t output_stride, int64_t input_stride) {
    const float* const filters = weight.const_data_ptr<float>();
    if (winograd) {
      float* to = weights = thread_buffer<Buffer::kFilters>(outputs * inputs * 3 * kPoints);
      const int64_t point = inputs * 3 * kConvolveRows;
      for (int64_t first = 0; first < outputs; first += kConvolveRows, to += (kPoints - 1) * point) {
        for (int64_t i = 0; i < inputs; ++i, to += 3 * kConvolveRows) {
          kernels().winograd_filter_transform(to, point, filters + first * output_stride + i * input_stride,
                                              output_stride, winograd->taps);
        }
      }
      return;
    }
    int64_t count = 0;
    for (Phase& phase : phases) {
      phase.weights = count;
      count += outputs * inputs * static_cast<int64_t>(phase.tap.size());
    }
    float* to = weights = thread_buffer<Buffer::kFilters>(count);
    for (const Phase& phase : phases) {
      for (int64_t first = 0; first < outputs; first += kConvolveRows) {
        const int64_t rows = std::min<int64_t>(outputs - first, kConvolveRows);
        for (int64_t i = 0; i < inputs; ++i) {
          const float* const from = filters + first * output_stride + i * input_stride;
          for (const int64_t tap : phase.tap) {
            for (int64_t r = 0; r < rows; ++r) *to++ = from[r * output_stride + tap];
          }
        }
      }
    }
  }

  // The Winograd layout, for 3x3 filters with stride 1 and outputs of whole bands.
  std::optional<Winograd> winograd_layout(int64_t rows, int64_t columns) const {
    if (!dense || phases.size() != 1 || phases[0].tap.size() != 9) return std::nullopt;
    if (rows % kBand != 0 || outputs % kConvolveRows != 0 || inputs < kConvolveRows) return std::nullopt;
    if (rows * columns > kMaxWinograd) return std::nullopt;
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
    vectors = vectors_of(rows, columns, size[1], 0);
    dense = !vectors.offsets.empty();
    pitch = dense ? columns : size[1];
    winograd = winograd_layout(rows, columns);
    if (winograd) {
      const Winograd& w = *winograd;
      const int64_t each = rows * columns / (kBand * kLanes), across = ceil_div(columns, kLanes);
      if (each % kTile != 0) {
        const int64_t room = kMaxValues / w.values();
        together = std::clamp<int64_t>(std::min(room, ceil_div(batch, at::get_num_threads())), 1, kTile);
      }
      vectors = {{}, w.bands_of_group == 2 ? w.pitch : kHalf};
      for (int64_t v = 0; v < together * each; ++v) {
        vectors.offsets.push_back(v / across * w.group + v % across * kLanes);
      }
    } else if (!dense) {
      for (int64_t i = 0; i < (rows - 1) * pitch + columns; i += kLanes) vectors.offsets.push_back(i);
    }
  }

  // A thread's memory starts with the packed image, or with one packed channel and its transform.
  int64_t padded() const {  // the last vectors read beyond
    return (winograd ? ceil_div(plane, kLanes) * kLanes : inputs * plane) + kLanes;
  }
  int64_t packed() const { return padded() + (winograd ? together * winograd->values() : 0); }

  // Where to pack a channel of a sample; `transform` follows.
  float* channel_of(float* memory, int64_t channel) const {
    return winograd ? memory : memory + channel * plane;
  }
  void transform(float* memory, int64_t sample, int64_t channel) const {
    if (!winograd) return;
    const Winograd& w = *winograd;
    for (int64_t b = 0; b < w.bands; ++b) {
      float* const to = memory + padded() + sample * w.values() + b / w.bands_of_group * w.group +
                        channel * w.lanes + b % w.bands_of_group * w.pitch;
      kernels().winograd_input_transform(to, w.point, memory + b * kBand * size[1], size[1], size[1]);
    }
  }

  int64_t channel_values() const { return static_cast<int64_t>(vectors.offsets.size()) * kLanes; }
  int64_t phase_values() const { return kConvolveRows * channel_values(); }
  int64_t scratch() const { return static_cast<int64_t>(phases.size()) * phase_values(); }

  // A phase of block `block` of the outputs of a packed image.
  void run(const ConvolveOutput& to, const float* image, int64_t block, const Phase& phase,
           int64_t samples = 1) const {
    const int64_t first = block * kConvolveRows, rows = std::min<int64_t>(kConvolveRows, outputs - first);
    const int64_t taps = static_cast<int64_t>(phase.tap.size());
    const int64_t count = static_cast<int64_t>(vectors.offsets.size());
    if (winograd) {
      const Winograd& w = *winograd;
      const int64_t each = count / together;
      kernels().winograd(to,
                         {image + padded(), w.point, inputs, w.lanes, vectors.offsets.data(), vectors.second,
                          samples * each, each, w.width, weights + first * inputs * 3 * kPoints});
      return;
    }
    const float* filters = weights + phase.weights + first * inputs * taps;
    kernels().convolve[rows - 1](to, {image, plane, inputs, vectors.offsets.data(), vectors.second, count,
                                      phase.offset.data(), taps, filters});
  }

  // All phases in order, each [channel][channel_values].
  void run(float* out, const float* image, int64_t block) const {
    for (const Phase& phase : phases) {
      run({.u = out, .plane = channel_values()}, image, block, phase);
      out += phase_values();
    }
  }
};

// Groups of samples and blocks of outputs over the threads. pack(sample, channel, block, to, spare) packs one
// channel; body(first and last sample, block, packed samples, spare) follows. A group may be shared by
// threads; each packs it for itself.
template <class Pack, class Body>
void for_blocks(const Plan& plan, int64_t batch, int64_t spare, Pack pack, Body body) {
  const int64_t groups = ceil_div(batch, plan.together);
  at::parallel_for(0, groups * plan.blocks, 1, [&](int64_t begin, int64_t end) {
    float* const memory = thread_buffer<Buffer::kImages>(plan.packed() + spare);
    std::memset(memory, 0, plan.padded() * sizeof(float));
    int64_t packed = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / plan.blocks, block = i % plan.blocks;
      const int64_t first = group * batch / groups, last = (group + 1) * batch / groups;
      for (int64_t sample = first; group != packed && sample < last; ++sample) {
        for (int64_t c = 0; c < plan.inputs; ++c) {
          pack(sample, c, block, plan.channel_of(memory, c), memory + plan.packed());
          plan.transform(memory, sample - first, c);
        }
      }
      packed = group;
      body(first, last, block, memory, memory + plan.packed());
    }
  });
}

bool valid(Sizes image, const Tensor& weight, const Conv& conv) {
  const auto within = [](Sizes sizes, int64_t min, int64_t max) {
    return std::min(sizes[0], sizes[1]) >= min && std::max(sizes[0], sizes[1]) <= max;
  };
  return within(conv.stride, 1, kMaxStride) && within(conv.padding, 0, kMaxSize) &&
         within(conv.dilation, 1, kMaxSize) && image.size() == 4 && weight.dim() == 4 && weight.numel() > 0 &&
         std::max(image[2], image[3]) <= kMaxSize && std::max(weight.size(2), weight.size(3)) <= kMaxTaps;
}

// The output's size along an axis, of sizes checked by `valid`; below 1 if the filter is too large.
int64_t output_size(int64_t input, int64_t kernel, const Conv& conv, int axis) {
  const int64_t room = input + 2 * conv.padding[axis] - conv.dilation[axis] * (kernel - 1) - 1;
  return room < 0 ? 0 : room / conv.stride[axis] + 1;
}

// Whether Forward's packed image is of a reasonable size.
bool packs(Sizes image, const Tensor& weight, const Conv& conv) {
  if (!valid(image, weight, conv)) return false;
  int64_t packed = weight.size(1);
  for (int d = 0; d < 2; ++d) {
    const int64_t kernel = weight.size(2 + d), out = output_size(image[2 + d], kernel, conv, d);
    const int64_t size = out + conv.dilation[d] * (kernel - 1) / conv.stride[d];
    if (out < 1 || size > kMaxPacked) return false;
    packed *= size * std::min(conv.stride[d], kernel);
    if (packed > kMaxPacked) return false;
  }
  return true;
}

// Whether Backward's is, which holds the gradient of the output, and the phases of the input's gradient.
bool packs_back(Sizes image, const Tensor& weight, const Conv& conv) {
  if (!valid(image, weight, conv)) return false;
  int64_t packed = weight.size(0), phases = 1;
  for (int d = 0; d < 2; ++d) {
    const int64_t far = conv.padding[d] + conv.dilation[d] * (weight.size(2 + d) - 1) + conv.stride[d];
    const int64_t phase = ceil_div(image[2 + d], conv.stride[d]),
                  size = phase + 2 * (far / conv.stride[d] + 1);
    if (output_size(image[2 + d], weight.size(2 + d), conv, d) < 1 || size > kMaxPacked) return false;
    packed *= size;
    phases *= phase * conv.stride[d];
    if (packed > kMaxPacked || phases > kMaxPacked) return false;
  }
  return true;
}

struct Forward : Plan {
  std::vector<std::array<int64_t, 2>> sources;  // phases of the input that a tap reads

  Forward(const Tensor& images, const Tensor& weight, const Conv& conv)
      : Plan(weight.size(1), weight.size(0), conv) {
    const int64_t kernel[2] = {weight.size(2), weight.size(3)};
    pixels = images.size(2) * images.size(3);
    for (int d = 0; d < 2; ++d) {
      in_size[d] = images.size(2 + d);
      out_size[d] = output_size(in_size[d], kernel[d], conv, d);
      size[d] = out_size[d] + conv.dilation[d] * (kernel[d] - 1) / conv.stride[d];
    }
    Phase phase{};
    for (int64_t i = 0; i < kernel[0]; ++i) {
      for (int64_t j = 0; j < kernel[1]; ++j) {
        const int64_t row = i * conv.dilation[0], column = j * conv.dilation[1];
        const std::array<int64_t, 2> source = {row % conv.stride[0], column % conv.stride[1]};
        const int64_t number = std::find(sources.begin(), sources.end(), source) - sources.begin();
        if (number == static_cast<int64_t>(sources.size())) sources.push_back(source);
        phase.offset.push_back((number * size[0] + row / conv.stride[0]) * size[1] + column / conv.stride[1]);
        phase.tap.push_back(i * kernel[1] + j);
      }
    }
    phases.push_back(phase);
    lay_out(static_cast<int64_t>(sources.size()), out_size[0], out_size[1], images.size(0));
    const int64_t taps = kernel[0] * kernel[1];
    pack_weights(weight, inputs * taps, taps);
    if (conv.stride[0] == 1 && conv.stride[1] == 1) {
      input = vectors_of(in_size[0], in_size[1], size[1], conv.padding[0] * size[1] + conv.padding[1]);
    }
  }

  // One channel; the padding is zero already.
  void pack(float* to, const float* image) const {
    if (!input.offsets.empty()) return kernels().scatter(to, input, image);
    for (const auto& source : sources) {
      const int64_t stride = conv.stride[1];
      const int64_t first = ceil_div(conv.padding[1] - source[1], stride);
      const int64_t left = source[1] + first * stride - conv.padding[1];
      const int64_t count = std::min(size[1] - first, ceil_div(in_size[1] - left, stride));
      for (int64_t i = 0; i < size[0]; ++i, to += size[1]) {
        const int64_t row = source[0] + i * conv.stride[0] - conv.padding[0];
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

// u = conv(input, weight), and of each plane y or the statistics. Without u and with y, u is not kept.
void convolve(const Tensor& images, const Forward& plan, float* u, const ApplyArgs<float>* apply,
              const StatisticsArgs<float>* statistics) {
  const float* const from = images.const_data_ptr<float>();
  const int64_t values = plan.out_size[0] * plan.out_size[1];
  const bool fused = apply && plan.dense && apply->activation <= kRelu;
  float* const all_u = u || fused || !apply ? u : apply->y;
  const auto pack = [&](int64_t sample, int64_t c, int64_t, float* to, float*) {
    plan.pack(to, from + (sample * plan.inputs + c) * plan.pixels);
  };
  const auto body = [&](int64_t begin, int64_t end, int64_t block, const float* packed, float* out) {
    const int64_t first = begin * plan.outputs + block * kConvolveRows;
    if (plan.dense) {
      ConvolveOutput to{.u = offset_by(all_u, first * values), .plane = values, .sample = plan.outputs};
      if (fused) {
        const ApplyArgs<float> args = apply->from(first * values, first);
        to.y = args.y;
        to.relu_mask = args.relu_mask;
        to.residual = args.residual;
        to.scale = args.scale;
        to.shift = args.shift;
        to.relu = args.activation == kRelu;
      }
      plan.run(to, packed, block, plan.phases[0], end - begin);
    } else {
      plan.run(out, packed, block);
    }
    const int64_t rows = std::min(kConvolveRows, plan.outputs - block * kConvolveRows);
    for (int64_t sample = begin; !fused && sample < end; ++sample) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t c = sample * plan.outputs + block * kConvolveRows + i;
        if (!plan.dense) plan.unpack(all_u + c * values, out + i * plan.channel_values());
        if (apply) float32_kernels().apply(*apply, {values, 1, c, c + 1});
        if (statistics) float32_kernels().statistics(*statistics, {values, 1, c, c + 1});
      }
    }
  };
  for_blocks(plan, images.size(0), plan.scratch(), pack, body);
}

struct Backward : Plan {
  int64_t low[2];
  std::vector<bool> untouched;  // phases of rows that no tap reaches

  Backward(Sizes input_shape, const Tensor& grad, const Tensor& weight, const Conv& conv)
      : Plan(weight.size(0), weight.size(1), conv) {
    const int64_t kernel[2] = {weight.size(2), weight.size(3)};
    pixels = grad.size(2) * grad.size(3);
    int64_t high[2] = {0, 0};
    const auto distance = [&](int d, int64_t begin, int64_t k) {
      return begin + conv.padding[d] - k * conv.dilation[d];
    };
    for (int d = 0; d < 2; ++d) {
      in_size[d] = input_shape[2 + d];
      out_size[d] = grad.size(2 + d);
      low[d] = 0;
      for (int64_t begin = 0; begin < conv.stride[d]; ++begin) {
        for (int64_t k = 0; k < kernel[d]; ++k) {
          const int64_t far = distance(d, begin, k);
          if (far % conv.stride[d] != 0) continue;
          low[d] = std::min(low[d], far / conv.stride[d]);
          high[d] = std::max(high[d], far / conv.stride[d]);
        }
      }
      size[d] = ceil_div(in_size[d], conv.stride[d]) + high[d] - low[d];
    }
    untouched.assign(conv.stride[0], true);
    for (int64_t row = 0; row < conv.stride[0]; ++row) {
      for (int64_t column = 0; column < conv.stride[1]; ++column) {
        Phase phase{};
        for (int64_t i = 0; i < kernel[0]; ++i) {
          for (int64_t j = 0; j < kernel[1]; ++j) {
            const int64_t down = distance(0, row, i), right = distance(1, column, j);
            if (down % conv.stride[0] != 0 || right % conv.stride[1] != 0) continue;
            phase.offset.push_back((down / conv.stride[0] - low[0]) * size[1] + right / conv.stride[1] -
                                   low[1]);
            phase.tap.push_back(i * kernel[1] + j);
            untouched[row] = false;
          }
        }
        phases.push_back(phase);
      }
    }
    lay_out(1, ceil_div(in_size[0], conv.stride[0]), ceil_div(in_size[1], conv.stride[1]), grad.size(0));
    const int64_t taps = kernel[0] * kernel[1];
    pack_weights(weight, taps, outputs * taps);
    if (out_size[0] <= size[0] + low[0] && out_size[1] <= size[1] + low[1]) {
      input = vectors_of(out_size[0], out_size[1], size[1], -low[0] * size[1] - low[1]);
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
    const int64_t step[2] = {conv.stride[0], conv.stride[1]};
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

// `images`: the convolution's input or output.
bool supports(const Tensor& images, const Tensor& weight, const Conv& conv) {
  static const bool has_avx512 = std::string(instruction_set()) == "avx512";
  if (!has_avx512 || conv.groups != 1 || images.dim() != 4 || weight.dim() != 4) return false;
  if (images.scalar_type() != at::kFloat || weight.scalar_type() != at::kFloat) return false;
  if (!images.is_contiguous() || std::max(weight.size(0), weight.size(1)) > kMaxChannels) return false;
  return images.size(0) == 0 || images.numel() / images.size(0) <= kMaxValues;
}

// Checks of optional tensors, which are undefined where absent.
Tensor checked(const MaybeTensor& x, Sizes shape, const char* name, bool or_mask = false) {
  if (!x) return Tensor();
  TORCH_CHECK(
      (x->scalar_type() == at::kFloat || (or_mask && x->scalar_type() == at::kBool)) && x->sizes() == shape,
      name, " must be float32 ", shape, ", got ", x->scalar_type(), " ", x->sizes());
  return x->contiguous();
}

template <class T = float>
T* data(const Tensor& x) {
  return x.defined() && x.numel() > 0 ? static_cast<T*>(x.data_ptr()) : nullptr;
}

}  // namespace

bool convolves(const Tensor& input, const Tensor& weight, const Conv& conv) {
  return supports(input, weight, conv) && input.size(1) == weight.size(1) &&
         packs(input.sizes(), weight, conv);
}

bool convolves_backward(Sizes input_shape, const Tensor& grad, const Tensor& weight, const Conv& conv) {
  if (!supports(grad, weight, conv) || !packs_back(input_shape, weight, conv)) return false;
  bool fits =
      input_shape[0] == grad.size(0) && input_shape[1] == weight.size(1) && grad.size(1) == weight.size(0);
  for (int d = 0; d < 2; ++d) {
    fits = fits && grad.size(2 + d) == output_size(input_shape[2 + d], weight.size(2 + d), conv, d);
  }
  return fits;
}

std::tuple<Tensor, Tensor, Tensor> convolve_apply(const AffineArgs& args, Keep keep) {
  const Tensor& input = args.input;
  TORCH_CHECK(convolves(input, *args.weight, args.conv), kNotSupported);
  check_activation(args.activation, keep.mask);
  const Tensor weight = args.weight->contiguous();
  const Forward plan(input, weight, args.conv);
  const Tensor y =
      new_tensor({input.size(0), plan.outputs, plan.out_size[0], plan.out_size[1]}, input.options());
  const Tensor u = new_tensor(keep.u ? y.sizes() : Sizes({0}), input.options());
  const bool has_slope = keep.mask && args.activation > kRelu;
  const Tensor mask = new_tensor(keep.mask ? y.sizes() : Sizes({0}),
                                 input.options().dtype(has_slope ? at::kFloat : at::kBool));
  const Sizes table = y.sizes().slice(0, 2);
  const Tensor scale = checked(args.scale, table, "scale"), shift = checked(args.shift, table, "shift"),
               residual = checked(args.residual, y.sizes(), "residual");
  const ApplyArgs<float> apply{data(y),
                               data(keep.u ? u : y),
                               data(residual),
                               data(scale),
                               data(shift),
                               static_cast<Activation>(args.activation),
                               has_slope ? nullptr : data<uint8_t>(mask),
                               has_slope ? data(mask) : nullptr};
  convolve(input, plan, data(u), &apply, nullptr);
  return {y, u, mask};
}

std::tuple<Tensor, Tensor, Tensor> convolve_statistics(const Tensor& input, const Tensor& weight_in,
                                                       const Conv& conv) {
  TORCH_CHECK(convolves(input, weight_in, conv), kNotSupported);
  const Tensor weight = weight_in.contiguous();
  const Forward plan(input, weight, conv);
  const Tensor u =
      new_tensor({input.size(0), plan.outputs, plan.out_size[0], plan.out_size[1]}, input.options());
  const Tensor mean = new_tensor(u.sizes().slice(0, 2), input.options()), m2 = new_tensor_like(mean);
  const StatisticsArgs<float> statistics{data(u), data(mean), data(m2)};
  convolve(input, plan, data(u), nullptr, &statistics);
  return {u, mean, m2};
}

std::tuple<Tensor, Tensor, Tensor, Reduced> convolve_backward(const AffineBackwardArgs& args) {
  const Tensor& grad = args.grad;
  const Propagation& by = args.propagation;
  const bool sums = args.need_sums, add = args.add_to.has_value();
  TORCH_CHECK(convolves_backward(args.input_shape, grad, *args.weight, args.conv), kNotSupported);
  TORCH_CHECK(!(sums || by.by_input) || (args.u && args.center), "sums and by_input need u and center");
  TORCH_CHECK(by.by_input.has_value() == by.constant.has_value(), "by_input and constant come together");
  TORCH_CHECK(!add || (args.add_to->sizes() == Sizes(args.input_shape) && args.add_to->is_contiguous()),
              "expected a contiguous gradient ", Sizes(args.input_shape), " to add to");
  const Tensor weight = args.weight->contiguous();
  const Backward plan(args.input_shape, grad, weight, args.conv);
  const Sizes image = grad.sizes(), table = image.slice(0, 2);
  const Tensor u = checked(args.u, image, "u"), relu_mask = checked(args.relu_mask, image, "relu_mask", true),
               slope = checked(args.slope, image, "slope"), center = checked(args.center, table, "center"),
               by_grad = checked(by.by_grad, table, "by_grad"),
               by_input = checked(by.by_input, table, "by_input"),
               constant = checked(by.constant, table, "constant");
  const auto new_if = [&](bool needed, Sizes shape) {
    return new_tensor(needed ? shape : Sizes({0}), grad.options());
  };
  const Tensor d_input = add ? *args.add_to : new_if(true, args.input_shape),
               d_residual = new_if(args.need_residual, image), d_u = new_if(args.need_weight, image),
               g1 = new_if(sums, table), gc = new_if(sums, table);
  const bool is_mask = relu_mask.defined() && relu_mask.scalar_type() == at::kBool;
  const BackwardArgs<float> first_block{
      data(grad),
      data(u),
      {is_mask ? nullptr : data(relu_mask), is_mask ? data<uint8_t>(relu_mask) : nullptr, data(slope)},
      data(center),
      data(by_grad),
      data(by_input),
      data(constant),
      data(d_u),
      data(d_residual),
      data(g1),
      data(gc)};
  BackwardArgs<float> other_blocks = first_block;  // the first block's thread writes the other outputs
  other_blocks.d_u = other_blocks.d_residual = other_blocks.g1 = other_blocks.gc = nullptr;
  const Kernels<float>& passes = float32_kernels();
  const int64_t values = plan.pixels, scratch = plan.scratch();
  const int64_t in_values = plan.in_size[0] * plan.in_size[1];
  float* const to = data(d_input);

  const auto pack = [&](int64_t sample, int64_t c, int64_t block, float* packed, float* spare) {
    const int64_t plane = sample * plan.inputs + c;
    BackwardArgs<float> p = (block == 0 ? first_block : other_blocks).from(plane * values, plane);
    if (!plan.input.offsets.empty() && !p.activation.slope) return kernels().propagate(packed, plan.input, p);
    const Extent extent{values, 1, 0, 1};
    if (p.g1) passes.reduce(p, extent);
    if (!p.d_u) p.d_u = spare + scratch;
    passes.propagate(p, extent);
    plan.pack(packed, p.d_u);
  };
  const auto body = [&](int64_t begin, int64_t end, int64_t block, const float* packed, float* out) {
    const int64_t first = begin * plan.outputs + block * kConvolveRows;
    if (plan.direct()) {
      plan.run({.u = to + first * in_values, .plane = in_values, .sample = plan.outputs, .add = add}, packed,
               block, plan.phases[0], end - begin);
      return;
    }
    plan.run(out, packed, block);
    const int64_t last = std::min(first + kConvolveRows, (begin + 1) * plan.outputs);
    for (int64_t c = first; c < last; ++c) {
      plan.unpack(to + c * in_values, out + (c - first) * plan.channel_values(), add);
    }
  };
  for_blocks(plan, grad.size(0), scratch + values, pack, body);
  return {d_input, d_residual, d_u, Reduced{g1, gc, center}};
}

}  // namespace awnet::cpu
