// How the layers of a frozen network join, as awnet/ops/network.py writes it down.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

namespace awnet {

// Numbers are of the layer that a tensor comes from, -1 for the images.
struct Step {
  int64_t input, residual;  // a residual of -1 is none
  bool averaged, relu;
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
};

inline std::vector<Step> steps_of(at::IntArrayRef numbers, size_t layers) {
  constexpr size_t fields = 11;
  TORCH_CHECK(numbers.size() == fields * layers, "expected ", fields, " numbers for each of ", layers,
              " layers, got ", numbers.size());
  std::vector<Step> steps;
  for (size_t i = 0; i < layers; ++i) {
    const int64_t* n = numbers.data() + fields * i;
    const auto own = static_cast<int64_t>(i);
    TORCH_CHECK(n[0] >= -1 && n[0] < own && n[1] >= -1 && n[1] < own, "layer ", i,
                " may take what earlier ones give, not ", n[0], " and ", n[1]);
    steps.push_back({n[0], n[1], n[2] != 0, n[3] != 0, {n[4], n[5]}, {n[6], n[7]}, {n[8], n[9]}, n[10]});
  }
  return steps;
}

}  // namespace awnet
