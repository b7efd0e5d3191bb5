// The CUDA kernels as plain C functions: raw device pointers, sizes and a stream, so that the .cu files need
// nothing of torch and binding.cpp nothing of CUDA.
//
// Every function launches on `stream` (a cudaStream_t) of the current device, waits for nothing, and returns
// nullptr or why the launch failed. Images hold values of `Images::dtype`; tables [B, C], [rows, C] and [B]
// are float and contiguous. Null stands for an argument that is absent. awnet/ops/backends/eager.py and
// awnet/ops/coefficients.py say what each one computes.
#pragma once

#include <cstdint>

namespace awnet::cuda {

extern "C" {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// All images of one call: the same shape, dtype and layout.
struct Images {
  int32_t dtype;
  int32_t channels_last;  // rows of channels; otherwise planes of pixels
  int32_t aligned;        // every pointer of the call is a multiple of 16 bytes
  int64_t batch, channels, pixels;
};

// One batch norm: weight and bias [affine_rows, C], mean and var [stat_rows, C]. There are 1 or 2 rows of
// each, row 0 adversarial.
struct NormPointers {
  const float *weight, *bias, *mean, *var;
  int32_t affine_rows, stat_rows;
  float eps;
};

// What the coefficients take per sample: filter_scale [B, C], p_clean [B], is_clean [B].
struct MixPointers {
  const float *filter_scale, *p_clean;
  const bool* is_clean;
};

// Of u over a sample's hw pixels, [B, C]: the mean and the centered sum of squares.
struct StatsPointers {
  const float *mean, *m2;
  int64_t hw;
};

// g1 = sum g and gc = sum g (u - center), [B, C].
struct SumsPointers {
  const float *g1, *gc, *center;
};

// d_u = by_grad g + by_input (u - center) + constant, [B, C]; all but by_grad may be null.
struct PropagationPointers {
  const float *center, *by_grad, *by_input, *constant;
};

// What the activation leaves for its backward: of a ReLU y or relu_mask, of another one its slope.
struct SavedActivationPointers {
  const void* y;
  const uint8_t* relu_mask;
  const void* slope;
};

// The backward of eval mode; what is not given or not requested is null. u, g1, gc and workspace come with
// the sums, u and shift where the mask is computed from u. Without center gc is about 0. tickets: zeros, [B,
// C].
struct EvalBackwardPointers {
  const void *grad, *other_grad, *u;
  SavedActivationPointers saved;
  const float *d_mean, *scale, *shift;
  void *d_u, *d_residual;
  float *g1, *gc, *center, *workspace;
  int32_t* tickets;
};

// Outputs; those that are not required are null, d_weight and d_bias together.
struct EvalGradientsPointers {
  float *filter_scale, *p_clean, *weight, *bias;
};
struct TrainGradientsPointers {
  float *filter_scale, *weight, *bias, *by_grad, *by_input, *constant;
};

// The size in floats of the `workspace` of statistics, reduce and eval_backward, whose contents do not
// matter; 0 for most shapes.
int64_t awnet_cuda_workspace(const Images* images);

// --- passes

const char* awnet_cuda_statistics(const Images* images, const void* u, float* mean, float* m2,
                                  float* workspace, void* stream);
// activation: an Activation of arithmetic.h. mask: of a ReLU bytes, 1 where y is not <= 0, else 0; of another
// activation its slope, an image. The backward takes SavedActivationPointers, all null without an activation.
const char* awnet_cuda_apply(const Images* images, void* y, void* mask, const void* u, const void* residual,
                             const float* scale, const float* shift, int32_t activation, void* stream);
const char* awnet_cuda_reduce(const Images* images, const void* grad, const void* u,
                              const SavedActivationPointers* saved, const float* center, float* g1, float* gc,
                              float* workspace, void* stream);
const char* awnet_cuda_propagate(const Images* images, void* d_u, void* d_residual, const void* grad,
                                 const void* u, const SavedActivationPointers* saved,
                                 const PropagationPointers* propagation, void* stream);

const char* awnet_cuda_eval_backward(const Images* images, const EvalBackwardPointers* pointers,
                                     void* stream);

// --- the [B, C] algebra

const char* awnet_cuda_eval_coefficients(const NormPointers* norm, int64_t batch, int64_t channels,
                                         const MixPointers* mix, float* scale, float* shift, void* stream);
const char* awnet_cuda_eval_gradients(const NormPointers* norm, int64_t batch, int64_t channels,
                                      const SumsPointers* sums, const MixPointers* mix,
                                      const EvalGradientsPointers* grads, void* stream);
const char* awnet_cuda_batch_statistics(int64_t batch, int64_t channels, int32_t stat_rows,
                                        const StatsPointers* stats, const MixPointers* mix, float* batch_mean,
                                        float* batch_var, float* n, void* stream);
const char* awnet_cuda_train_coefficients(const NormPointers* norm, int64_t batch, int64_t channels,
                                          const MixPointers* mix, float* scale, float* shift, void* stream);
// The center of the sums is the mean of u; norm->mean and norm->var are the batch's, and norm->bias is not
// used. through: [2, stat_rows, channels].
const char* awnet_cuda_train_sums(const NormPointers* norm, int64_t batch, int64_t channels,
                                  const SumsPointers* sums, const MixPointers* mix, float* d_weight,
                                  float* d_bias, float* through, void* stream);
// through: null, or the sums over all ranks; then grads->weight and grads->bias are not written.
const char* awnet_cuda_train_gradients(const NormPointers* norm, int64_t batch, int64_t channels,
                                       const SumsPointers* sums, const StatsPointers* stats,
                                       const MixPointers* mix, const float* n, const float* through,
                                       const TrainGradientsPointers* grads, void* stream);

// Runs a small kernel on the current device and checks its result; waits for it.
const char* awnet_cuda_self_test();

}  // extern "C"

}  // namespace awnet::cuda
