// The input pixels that each output pixel of a convolution reads.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../../ops.h"
#include "tiles.h"

namespace awnet::cpu::amx {

// The taps of all outputs of a convolution, two outputs at a time.
struct Pairs {
  std::vector<Tap> taps;
  std::vector<int32_t> begin = {0};
  std::vector<std::array<int32_t, 2>> outputs;

  int64_t count() const { return static_cast<int64_t>(outputs.size()); }
  const int32_t (*pixels() const)[2] { return reinterpret_cast<const int32_t (*)[2]>(outputs.data()); }

  // `source(pixel, position)` is the pixel that an output reads there, or -1
  template <class Source>
  Pairs(const std::vector<int32_t>& order, int32_t positions, Source source) {
    for (size_t i = 0; i < order.size(); i += 2) {
      const int32_t first = order[i], second = i + 1 < order.size() ? order[i + 1] : -1;
      for (int32_t p = 0; p < positions; ++p) {
        const Tap tap = {source(first, p), second < 0 ? -1 : source(second, p), p};
        if (tap.first >= 0 || tap.second >= 0) taps.push_back(tap);
      }
      begin.push_back(static_cast<int32_t>(taps.size()));
      outputs.push_back({first, second});
    }
  }
};

using Size = std::array<int64_t, 2>;  // height and width

struct Geometry {
  Size in, kernel;
  Conv conv;
  Size out;

  // None where the filter is larger than the padded image, or a size is so large that the number of a pixel
  // would not fit into 32 bits.
  static std::optional<Geometry> of(Size in, Size kernel, const Conv& conv) {
    constexpr int64_t kMax = int64_t{1} << 20;
    Geometry g{in, kernel, conv, {}};
    for (int d = 0; d < 2; ++d) {
      const int64_t stride = conv.stride[d], padding = conv.padding[d], dilation = conv.dilation[d];
      if (std::max({in[d], kernel[d], stride, padding, dilation}) > kMax) return std::nullopt;
      const int64_t room = in[d] + 2 * padding - dilation * (kernel[d] - 1) - 1;
      if (room < 0 || padding < 0 || stride < 1 || dilation < 1) return std::nullopt;
      g.out[d] = room / stride + 1;
    }
    return std::max(in[0] * in[1], g.out[0] * g.out[1]) <= INT32_MAX ? std::optional(g) : std::nullopt;
  }

  auto sizes() const { return std::tie(in, kernel, conv.stride, conv.padding, conv.dilation); }
  bool operator<(const Geometry& other) const { return sizes() < other.sizes(); }
  int32_t positions() const { return static_cast<int32_t>(kernel[0] * kernel[1]); }

  Pairs forward() const {
    std::vector<int32_t> order(out[0] * out[1]);
    std::iota(order.begin(), order.end(), 0);
    return Pairs(order, positions(), [this](int32_t pixel, int32_t position) {
      const Size index = unravel(pixel, out), tap = unravel(position, kernel);
      Size source;
      for (int d = 0; d < 2; ++d) {
        source[d] = index[d] * conv.stride[d] - conv.padding[d] + tap[d] * conv.dilation[d];
        if (source[d] < 0 || source[d] >= in[d]) return int32_t{-1};
      }
      return ravel(source, in);
    });
  }

  // The pixels of one phase of the stride have the same taps, so they are paired.
  Pairs backward() const {
    std::vector<int32_t> order;
    for (int64_t top = 0; top < std::min(conv.stride[0], in[0]); ++top) {
      for (int64_t left = 0; left < std::min(conv.stride[1], in[1]); ++left) {
        for (int64_t y = top; y < in[0]; y += conv.stride[0]) {
          for (int64_t x = left; x < in[1]; x += conv.stride[1]) order.push_back(ravel({y, x}, in));
        }
      }
    }
    return Pairs(order, positions(), [this](int32_t pixel, int32_t position) {
      const Size index = unravel(pixel, in), tap = unravel(position, kernel);
      Size source;
      for (int d = 0; d < 2; ++d) {
        const int64_t distance = index[d] + conv.padding[d] - tap[d] * conv.dilation[d];
        source[d] = distance / conv.stride[d];
        if (distance < 0 || distance % conv.stride[d] != 0 || source[d] >= out[d]) return int32_t{-1};
      }
      return ravel(source, out);
    });
  }

 private:
  static Size unravel(int32_t index, Size size) { return {index / size[1], index % size[1]}; }
  static int32_t ravel(Size index, Size size) { return static_cast<int32_t>(index[0] * size[1] + index[1]); }
};

}  // namespace awnet::cpu::amx
