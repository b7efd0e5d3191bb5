// The layers of a frozen network and how they are connected, as in awnet/ops/network.py; network.cpp.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "ops.h"

namespace awnet {

// A layer. Numbers are of the layer that a tensor comes from, -1 for the images.
struct Step {
  int64_t input, residual;  // a residual of -1 is none
  bool averaged;            // the mean over the output's pixels is an output of the network
  int64_t activation;
  Conv conv;
};

inline std::vector<Step> steps_of(Sizes numbers, size_t layers) {
  constexpr size_t fields = 11;
  TORCH_CHECK(numbers.size() == fields * layers, "expected ", fields, " numbers for each of ", layers,
              " layers, got ", numbers.size());
  std::vector<Step> steps;
  for (size_t i = 0; i < layers; ++i) {
    const int64_t* n = numbers.data() + fields * i;
    const auto layer = static_cast<int64_t>(i);
    TORCH_CHECK(n[0] >= -1 && n[0] < layer && n[1] >= -1 && n[1] < layer, "layer ", i,
                " may take the outputs of earlier layers only, not of ", n[0], " and ", n[1]);
    steps.push_back({n[0], n[1], n[2] != 0, n[3], {{n[4], n[5]}, {n[6], n[7]}, {n[8], n[9]}, n[10]}});
  }
  return steps;
}

struct NetworkNeeds {
  bool x;
  std::vector<bool> scales, shifts;
};

// Undefined where not required, and x also where no mean has a gradient.
struct NetworkGradients {
  Tensor x;
  std::vector<Tensor> scales, shifts;
};

// What the backward needs of a layer.
struct SavedLayer {
  Tensor weight, scale, u, mask;  // mask: of a ReLU, or the slope of another activation
  Tensor shift;                   // where the mask is computed from u, else empty
  std::vector<int64_t> shape;     // of its output
  bool channels_last;
};

struct NetworkOutputs {
  std::vector<Tensor> means;  // of the layers with `averaged`
  std::vector<SavedLayer> layers;
};

NetworkOutputs network_forward(const Tensor& x, TensorList scales, TensorList shifts, TensorList weights,
                               const std::vector<Step>& steps, bool keep_u, bool keep_mask);

// `d_means` has a gradient for each of the forward's means, or an undefined tensor.
NetworkGradients network_backward(const std::vector<Step>& steps, const std::vector<SavedLayer>& layers,
                                  Sizes images, TensorList d_means, const NetworkNeeds& needs);

// The eval-mode coefficients of all layers: those of one layer with all channels side by side, split.
struct CoefficientArgs {
  std::optional<Tensor> filter_scale;  // [B, D]; the columns from D on have none
  Tensor p_clean;                      // [B]
  Tensor tables;                       // [4, 2, T]: weight, bias, mean and variance
  std::vector<int64_t> widths;         // of the layers, T in all
  double eps;
};

// scale and shift [B, C] of each layer, in order
std::vector<Tensor> network_coefficients(const CoefficientArgs& args);

// The gradients of filter_scale and p_clean, from those of the outputs, which may be undefined.
std::pair<Tensor, Tensor> network_coefficients_backward(const CoefficientArgs& args, TensorList grads);

}  // namespace awnet
