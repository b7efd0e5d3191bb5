// The CUDA kernels as plain C functions: raw device pointers, sizes and a stream, so that the .cu files need
// nothing of torch and binding.cpp nothing of CUDA.
//
// Every function launches on `stream` (a cudaStream_t) of the current device, waits for nothing, and returns
// nullptr or why the launch failed. Images hold values of `Images::dtype`; everything on [B, C], [rows, C]
// and [B] is float, contiguous. Null stands for an argument that a call does without. awnet/ops/backends/eager.py and
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

// One batch norm: affine tables of `rows` rows, statistics of `groups` rows, each 1 or 2, [rows, channels].
struct Norm {
  const float *weight, *bias, *mean, *var;
  int32_t rows, groups;
  float eps;
};

// How many floats statistics and reduce want as `workspace`, which may hold anything; 0 for most shapes.
int64_t awnet_cuda_workspace(const Images* images);

// --- passes

const char* awnet_cuda_statistics(const Images* images, const void* u, float* mean, float* m2,
                                  float* workspace, void* stream);
// mask, in bytes of 1 and 0: where the activation passed. The backward takes y or mask, or neither.
const char* awnet_cuda_apply(const Images* images, void* y, uint8_t* mask, const void* u,
                             const void* residual, const float* scale, const float* shift, int32_t relu,
                             void* stream);
const char* awnet_cuda_reduce(const Images* images, const void* grad, const void* u, const void* y,
                              const uint8_t* mask, const float* centre, float* g1, float* gc,
                              float* workspace, void* stream);
const char* awnet_cuda_propagate(const Images* images, void* d_u, void* d_residual, const void* grad,
                                 const void* u, const void* y, const uint8_t* mask, const float* centre,
                                 const float* by_grad, const float* by_input, const float* constant,
                                 void* stream);

// --- the [B, C] mathematics

const char* awnet_cuda_testing_coefficients(const Norm* norm, int64_t batch, int64_t channels,
                                            const float* omega, const float* p_clean, float* scale,
                                            float* shift, void* stream);
// d_omega, d_p, and d_weight with d_bias are null where nobody asks for them
const char* awnet_cuda_testing_gradients(const Norm* norm, int64_t batch, int64_t channels, const float* g1,
                                         const float* gc, const float* centre, const float* omega,
                                         const float* p_clean, float* d_omega, float* d_p, float* d_weight,
                                         float* d_bias, void* stream);
const char* awnet_cuda_batch_statistics(int64_t batch, int64_t channels, int64_t hw, int32_t groups,
                                        const float* mean, const float* m2, const float* omega,
                                        const bool* is_clean, float* batch_mean, float* batch_var, float* n,
                                        void* stream);
const char* awnet_cuda_training_coefficients(const Norm* norm, int64_t batch, int64_t channels,
                                             const float* omega, const bool* is_clean, float* scale,
                                             float* shift, void* stream);
// norm->mean and norm->var are the batch's, norm->bias is not used; through: [2, groups, channels]
const char* awnet_cuda_training_sums(const Norm* norm, int64_t batch, int64_t channels, const float* g1,
                                     const float* gc, const float* mean, const float* omega,
                                     const bool* is_clean, float* d_weight, float* d_bias, float* through,
                                     void* stream);
// through: null, or the sums of all ranks, and then d_weight and d_bias are not written; d_omega may be null
const char* awnet_cuda_training_gradients(const Norm* norm, int64_t batch, int64_t channels, int64_t hw,
                                          const float* g1, const float* gc, const float* mean,
                                          const float* m2, const float* omega, const float* n,
                                          const bool* is_clean, const float* through, float* d_omega,
                                          float* d_weight, float* d_bias, float* by_grad, float* by_input,
                                          float* constant, void* stream);

// Runs a small kernel on the current device and checks its result; waits for it.
const char* awnet_cuda_self_test();

}  // extern "C"

}  // namespace awnet::cuda
