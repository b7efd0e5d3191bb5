// Which pixels a convolution reads for which.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

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

struct Geometry {
  std::array<int64_t, 2> in, out, kernel, stride, padding, dilation;

  bool operator<(const Geometry& other) const { return all() < other.all(); }
  std::array<std::array<int64_t, 2>, 6> all() const { return {in, out, kernel, stride, padding, dilation}; }
  // Computes `out`. False where the filter is larger than the padded image, or a size is so large that the
  // number of a pixel would not fit into 32 bits.
  bool set_out() {
    constexpr int64_t kMost = int64_t{1} << 20;
    for (int d = 0; d < 2; ++d) {
      if (std::max({in[d], kernel[d], stride[d], padding[d], dilation[d]}) > kMost) return false;
      const int64_t left = in[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1;
      if (left < 0 || padding[d] < 0 || stride[d] < 1 || dilation[d] < 1) return false;
      out[d] = left / stride[d] + 1;
    }
    return std::max(in[0] * in[1], out[0] * out[1]) <= INT32_MAX;
  }
  int32_t positions() const { return static_cast<int32_t>(kernel[0] * kernel[1]); }

  Pairs forward() const {
    std::vector<int32_t> order(out[0] * out[1]);
    std::iota(order.begin(), order.end(), 0);
    return Pairs(order, positions(), [this](int32_t pixel, int32_t position) {
      int64_t at[2];
      for (int d = 0; d < 2; ++d) {
        const int64_t index = d == 0 ? pixel / out[1] : pixel % out[1];
        const int64_t tap = d == 0 ? position / kernel[1] : position % kernel[1];
        at[d] = index * stride[d] - padding[d] + tap * dilation[d];
        if (at[d] < 0 || at[d] >= in[d]) return int32_t{-1};
      }
      return static_cast<int32_t>(at[0] * in[1] + at[1]);
    });
  }

  // The pixels of one phase of the stride have the same taps, so they are paired.
  Pairs backward() const {
    std::vector<int32_t> order;
    for (int64_t top = 0; top < std::min(stride[0], in[0]); ++top) {
      for (int64_t left = 0; left < std::min(stride[1], in[1]); ++left) {
        for (int64_t y = top; y < in[0]; y += stride[0]) {
          for (int64_t x = left; x < in[1]; x += stride[1]) {
            order.push_back(static_cast<int32_t>(y * in[1] + x));
          }
        }
      }
    }
    return Pairs(order, positions(), [this](int32_t pixel, int32_t position) {
      int64_t at[2];
      for (int d = 0; d < 2; ++d) {
        const int64_t index = d == 0 ? pixel / in[1] : pixel % in[1];
        const int64_t tap = d == 0 ? position / kernel[1] : position % kernel[1];
        const int64_t reached = index + padding[d] - tap * dilation[d];
        if (reached < 0 || reached % stride[d] != 0 || reached / stride[d] >= out[d]) return int32_t{-1};
        at[d] = reached / stride[d];
      }
      return static_cast<int32_t>(at[0] * out[1] + at[1]);
    });
  }
};

}  // namespace awnet::cpu::amx
