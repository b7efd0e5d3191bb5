// The convolutions of single layers on tiles, for training: from and to channels_last images.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "../../tensors.h"
#include "amx.h"
#include "geometry.h"

namespace awnet::cpu::amx {
namespace {

constexpr int64_t kMinImages = 16;  // fewer leave rows of every tile empty
// Above, and for the forward of 1x1 filters, the library's convolution was faster by the cost of the change
// of layout: docs/performance-notes.md.
constexpr int64_t kMaxPixels = 64;
constexpr int64_t kPixelsAtOnce = 64;  // of a weight gradient: their cells stay in the second cache

const Bits* bits(const Tensor& x) { return static_cast<const Bits*>(x.const_data_ptr()); }
Bits* mutable_bits(const Tensor& x) { return static_cast<Bits*>(x.mutable_data_ptr()); }

std::optional<Geometry> geometry_of(const Tensor& images, const Tensor& weight, const Conv& conv) {
  return Geometry::of({images.size(2), images.size(3)}, {weight.size(2), weight.size(3)}, conv);
}

Geometry checked_geometry(const Tensor& images, const Tensor& weight, const Conv& conv) {
  const auto g = geometry_of(images, weight, conv);
  TORCH_CHECK(g, "the filter is larger than the padded image, or a size is too large for tiles");
  return *g;
}

Tensor cells(int64_t count) { return pooled_memory(count * kCell * static_cast<int64_t>(sizeof(Bits))); }

// The sizes of channels_last images.
struct Images {
  int64_t batch, channels, pixels, blocks;

  explicit Images(const Tensor& x)
      : batch(x.size(0)), channels(x.size(1)), pixels(x.size(2) * x.size(3)), blocks(channels / kChannels) {}

  // the first value of a block of channels
  int64_t row(int64_t image, int64_t pixel, int64_t block) const {
    return (image * pixels + pixel) * channels + block * kChannels;
  }
  // the first value of a cell
  int64_t cell(int64_t group, int64_t block, int64_t pixel) const {
    return ((group * blocks + block) * pixels + pixel) * kCell;
  }
};

// channels_last images as [group][block][pixel] cells
Tensor to_cells(const Tensor& x) {
  const Images images(x);
  const int64_t groups = ceil_div(images.batch, kImages);
  const Tensor packed = cells(groups * images.blocks * images.pixels);
  const Bits* const from = bits(x);
  Bits* const to = mutable_bits(packed);
  at::parallel_for(0, groups * images.pixels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / images.pixels, pixel = i % images.pixels;
      for (int64_t image = 0; image < kImages; ++image) {
        const int64_t b = group * kImages + image;
        for (int64_t block = 0; block < images.blocks; ++block) {
          Bits* const row = to + images.cell(group, block, pixel) + image * kChannels;
          if (b < images.batch) {
            std::memcpy(row, from + images.row(b, pixel, block), kChannels * sizeof(Bits));
          } else {
            std::memset(row, 0, kChannels * sizeof(Bits));
          }
        }
      }
    }
  });
  return packed;
}

void from_cells(const Tensor& x, const Tensor& packed) {
  const Images images(x);
  const Bits* const from = bits(packed);
  Bits* const to = mutable_bits(x);
  at::parallel_for(0, images.batch * images.pixels, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / images.pixels, pixel = i % images.pixels;
      for (int64_t block = 0; block < images.blocks; ++block) {
        std::memcpy(to + images.row(image, pixel, block),
                    from + images.cell(image / kImages, block, pixel) + image % kImages * kChannels,
                    kChannels * sizeof(Bits));
      }
    }
  });
}

// `pairs` of a convolution of `x` by packed filters, into new channels_last images of `shape`
Tensor convolve(const Kernels& kernels, const Tensor& x, const Bits* weights, const Pairs& pairs, Sizes shape,
                int64_t positions) {
  const Tensor y = new_tensor(shape, x.options().memory_format(at::MemoryFormat::ChannelsLast));
  const Images in(x), out(y);
  const int64_t groups = ceil_div(out.batch, kImages);
  const Tensor input = to_cells(x), output = cells(groups * out.blocks * out.pixels);
  const Bits* const from = bits(input);
  Bits* const to = mutable_bits(output);
  at::parallel_for(0, groups * out.blocks, 1, [&](int64_t begin, int64_t end) {
    kernels.configure();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / groups, group = i % groups;  // groups share a block's filters
      Propagate sum = {};
      sum.total = to + out.cell(group, block, 0);
      kernels.propagate({from + in.cell(group, 0, 0), in.blocks, in.pixels, pairs.taps.data(),
                         pairs.begin.data(), pairs.pixels(), 0, pairs.count(),
                         weights + block * in.blocks * positions * 2 * kCell, positions, false},
                        sum);
    }
    kernels.release();
  });
  from_cells(y, output);
  return y;
}

// channels_last images as [group of 32][block][pixel] pairs of cells, in the order that `order` gives 32
// images by 32 channels
template <class Order>
Tensor by_image(const Tensor& x, Order order) {
  const Images images(x);
  const int64_t groups = ceil_div(images.batch, kChannels);
  const Tensor packed = cells(groups * images.blocks * images.pixels * 2);
  const Bits* const from = bits(x);
  Bits* const to = mutable_bits(packed);
  static const Bits kNoImage[kChannels] = {};
  at::parallel_for(0, groups * images.pixels, 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / images.pixels, pixel = i % images.pixels;
      for (int64_t block = 0; block < images.blocks; ++block) {
        const Bits* rows[kChannels];
        for (int64_t image = 0; image < kChannels; ++image) {
          const int64_t b = group * kChannels + image;
          rows[image] = b < images.batch ? from + images.row(b, pixel, block) : kNoImage;
        }
        order(to + 2 * images.cell(group, block, pixel), rows);
      }
    }
  });
  return packed;
}

// The pairs of pixels (of the gradient, of the input) whose products a filter position sums, in chunks of the
// gradient's pixels.
struct PixelPairs {
  std::vector<std::array<int32_t, 2>> pixels;
  std::vector<std::vector<int64_t>> begin;  // [position][chunk], and the end

  explicit PixelPairs(const Geometry& g) {
    const int64_t outs = g.out[0] * g.out[1];
    const Pairs taps = g.forward();
    std::vector<std::vector<std::array<int32_t, 2>>> by_position(g.positions());
    for (int64_t pair = 0; pair < taps.count(); ++pair) {
      for (int32_t t = taps.begin[pair]; t < taps.begin[pair + 1]; ++t) {
        const Tap& tap = taps.taps[t];
        if (tap.first >= 0) by_position[tap.position].push_back({taps.outputs[pair][0], tap.first});
        if (tap.second >= 0) by_position[tap.position].push_back({taps.outputs[pair][1], tap.second});
      }
    }
    for (const auto& of_position : by_position) {
      begin.emplace_back();
      size_t i = 0;
      for (int64_t chunk = 0; chunk * kPixelsAtOnce < outs; ++chunk) {
        while (i < of_position.size() && of_position[i][0] < chunk * kPixelsAtOnce) ++i;
        begin.back().push_back(static_cast<int64_t>(pixels.size() + i));
      }
      pixels.insert(pixels.end(), of_position.begin(), of_position.end());
      begin.back().push_back(static_cast<int64_t>(pixels.size()));
    }
  }
};

Tensor weight_gradient(const Kernels& kernels, const Tensor& grad, const Tensor& input, const Tensor& weight,
                       const Geometry& geometry) {
  const Images out_images(grad), in_images(input);
  const int64_t outs = out_images.blocks, ins = in_images.blocks;
  const int64_t groups = ceil_div(grad.size(0), kChannels), positions = geometry.positions();
  const Tensor of_grad = by_image(grad, kernels.transpose), of_input = by_image(input, kernels.pair_rows);
  const PixelPairs pairs(geometry);
  const Tensor d_weight = new_tensor_like(weight);
  auto* const to = d_weight.data_ptr<at::BFloat16>();
  const Sizes step = d_weight.strides();
  at::parallel_for(0, outs * ins, 1, [&](int64_t begin, int64_t end) {
    kernels.configure();
    std::vector<float> sums(positions * 2 * kCell);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t out = i / ins, in = i % ins;
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t group = 0; group < groups; ++group) {
        const Bits* const g = bits(of_grad) + 2 * out_images.cell(group, out, 0);
        const Bits* const x = bits(of_input) + 2 * in_images.cell(group, in, 0);
        for (size_t chunk = 0; chunk + 1 < pairs.begin[0].size(); ++chunk) {
          for (int64_t p = 0; p < positions; ++p) {
            const int64_t first = pairs.begin[p][chunk], count = pairs.begin[p][chunk + 1] - first;
            if (count == 0) continue;
            const auto* const pixels = reinterpret_cast<const int32_t (*)[2]>(pairs.pixels.data() + first);
            kernels.weight_gradient({g, x, pixels, count, sums.data() + p * 2 * kCell});
          }
        }
      }
      for (int64_t o = 0; o < kChannels; ++o) {
        for (int64_t p = 0; p < positions; ++p) {
          at::BFloat16* const row = to + (out * kChannels + o) * step[0] + in * kChannels * step[1] +
                                    p / geometry.kernel[1] * step[2] + p % geometry.kernel[1] * step[3];
          const float* const from = sums.data() + p * 2 * kCell + o * kChannels;
          for (int64_t c = 0; c < kChannels; ++c) row[c * step[1]] = from[c];
        }
      }
    }
    kernels.release();
  });
  return d_weight;
}

const char* const kNotSupported = "AMX tiles do not support this convolution";

bool supports(const Tensor& x, const Tensor& weight) {
  return x.is_cpu() && x.dim() == 4 && x.scalar_type() == at::kBFloat16 && x.size(0) >= kMinImages &&
         x.numel() > 0 && x.is_contiguous(at::MemoryFormat::ChannelsLast) &&
         weight.scalar_type() == at::kBFloat16 && weight.numel() > 0 && weight.size(0) % kChannels == 0 &&
         weight.size(1) % kChannels == 0 && kernels_for_layers() != nullptr;
}

}  // namespace

bool takes(Pass pass, const Tensor& input, const Tensor& weight, const Tensor& grad, const Conv& conv) {
  if (conv.groups != 1 || !supports(input, weight)) return false;
  if (pass != Pass::kForward && !supports(grad, weight)) return false;
  const auto g = geometry_of(input, weight, conv);
  if (!g || pass == Pass::kWeightGradient) return g.has_value();
  return g->out[0] * g->out[1] <= kMaxPixels && (pass == Pass::kInputGradient || g->positions() > 1);
}

Tensor convolution(const Tensor& input, const Tensor& weight, const Conv& conv) {
  TORCH_CHECK(supports(input, weight), kNotSupported);
  const Geometry g = checked_geometry(input, weight, conv);
  const Tensor packed = pack_weight(weight);
  return convolve(*kernels_for_layers(), input, bits(packed), g.forward(),
                  {input.size(0), weight.size(0), g.out[0], g.out[1]}, g.positions());
}

std::pair<Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                               const Conv& conv, bool need_input, bool need_weight) {
  if (!need_input && !need_weight) return {};
  TORCH_CHECK(supports(input, weight) && supports(grad, weight), kNotSupported);
  const Kernels& kernels = *kernels_for_layers();
  const Geometry g = checked_geometry(input, weight, conv);
  Tensor d_input, d_weight;
  if (need_input) {
    const Tensor packed = pack_weight(weight);
    d_input =
        convolve(kernels, grad, bits(packed) + packed.size(1), g.backward(), input.sizes(), g.positions());
  }
  if (need_weight) d_weight = weight_gradient(kernels, grad, input, weight, g);
  return {d_input, d_weight};
}

}  // namespace awnet::cpu::amx
