// The [B, C] algebra of the layer for one sample and channel, shared by the CPU and the CUDA code.
//
// docs/equations.md derives it, awnet/ops/coefficients.py is the same in torch. k is the branch: 0
// adversarial, 1 clean.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define AWNET_HD __host__ __device__ __forceinline__
#else
#define AWNET_HD inline
#endif

namespace awnet {

// The layer's activation, by its position in ACTIVATIONS of awnet/ops/args.py.
enum Activation : int32_t { kNone = 0, kRelu = 1, kSilu = 2, kGelu = 3, kLeakyRelu = 4 };

struct Affine {
  float scale, shift;
};

// One branch's batch norm for one channel.
struct Branch {
  float weight, bias, mean, inv_std;

  AWNET_HD float gain() const { return weight * inv_std; }
  AWNET_HD float offset() const { return bias - mean * weight * inv_std; }
};

AWNET_HD float inverse_std(float var, float eps) { return 1.0f / sqrtf(var + eps); }

// Eval mode: scale = filter_scale sum_k w_k gain_k, shift = sum_k w_k offset_k with w = (1 - p, p).
AWNET_HD Affine eval_coefficients(float filter_scale, float p, Branch adversarial, Branch clean) {
  const float q = 1.0f - p;
  return {filter_scale * (q * adversarial.gain() + p * clean.gain()),
          q * adversarial.offset() + p * clean.offset()};
}

struct EvalGradients {
  float filter_scale;  // of the filter scale
  float p;             // this channel's share of the gradient of p
  float weight[2];     // this sample's share of the gradients of the two rows
  float bias[2];
};

// From g1 = sum g and gc = sum g (u - center). The sums are moved to each branch's mean, so that no large
// ones cancel.
AWNET_HD EvalGradients eval_gradients(float g1, float gc, float center, float filter_scale, float p,
                                      Branch adversarial, Branch clean) {
  const float q = 1.0f - p;
  const float centered[2] = {filter_scale * gc + (filter_scale * center - adversarial.mean) * g1,
                             filter_scale * gc + (filter_scale * center - clean.mean) * g1};
  EvalGradients d;
  d.filter_scale = (gc + center * g1) * (q * adversarial.gain() + p * clean.gain());
  d.p = (clean.gain() * centered[1] + clean.bias * g1) -
        (adversarial.gain() * centered[0] + adversarial.bias * g1);
  d.weight[0] = q * centered[0] * adversarial.inv_std;
  d.weight[1] = p * centered[1] * clean.inv_std;
  d.bias[0] = q * g1;
  d.bias[1] = p * g1;
  return d;
}

// Train mode: one sample's share of its branch's centered sum of squares, by Chan's update.
AWNET_HD float sample_m2(float mean, float m2, float hw, float filter_scale, float branch_mean) {
  const float d = filter_scale * mean - branch_mean;
  return filter_scale * filter_scale * m2 + hw * d * d;
}

AWNET_HD Affine train_coefficients(float filter_scale, Branch branch) {
  return {filter_scale * branch.gain(), branch.offset()};
}

// sum_hw g * normalized, from gc = sum g (u - mean).
AWNET_HD float grad_dot_normalized(float g1, float gc, float mean, float filter_scale, Branch branch) {
  return (filter_scale * gc + (filter_scale * mean - branch.mean) * g1) * branch.inv_std;
}

struct TrainGradients {
  float filter_scale;
  float by_grad, by_input, constant;  // d_u = by_grad g + by_input (u - mean) + constant
};

// through_mean = sum weight g1 / N and through_var = sum weight grad_dot_normalized inv_std / N, over all
// samples that share the statistics.
AWNET_HD TrainGradients train_gradients(float g1, float gc, float mean, float m2, float hw,
                                        float filter_scale, Branch branch, float through_mean,
                                        float through_var) {
  const float d = filter_scale * mean - branch.mean;
  const float scaled = filter_scale * branch.inv_std;
  TrainGradients r;
  r.by_grad = branch.weight * scaled;
  r.by_input = -scaled * through_var * filter_scale;
  r.constant = -scaled * (through_mean + through_var * d);
  r.filter_scale = branch.inv_std * (branch.weight * gc - through_var * filter_scale * m2 +
                                     mean * (branch.weight * g1 - hw * (through_mean + through_var * d)));
  return r;
}

}  // namespace awnet
