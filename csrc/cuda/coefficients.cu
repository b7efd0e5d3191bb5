// The [B, C] mathematics: ../arithmetic.h for every sample and channel, and sums over the batch in a fixed
// order.
#include "device.h"
#include "layout.h"

namespace awnet::cuda {
namespace {

// Sums over the batch: a block has kAcross channels side by side and kDown samples below each other.
constexpr int kAcross = 8, kDown = 64;
constexpr dim3 kColumns(kAcross, kDown);

// Over threadIdx.y, for each threadIdx.x and each of N values; all threads get it.
template <int N>
__device__ __forceinline__ void sum_over_samples(float (&value)[N]) {
  constexpr int kWarps = kAcross * kDown / kWarp;
  __shared__ float of_warp[N][kWarps][kAcross];
  const int warp = (threadIdx.y * kAcross + threadIdx.x) / kWarp;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int step = kWarp / 2; step >= kAcross; step /= 2) {
      value[n] += __shfl_xor_sync(0xffffffffu, value[n], step);
    }
    if (threadIdx.y % (kWarp / kAcross) == 0) of_warp[n][warp][threadIdx.x] = value[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    value[n] = 0.0f;
    for (int w = 0; w < kWarps; ++w) value[n] += of_warp[n][w][threadIdx.x];
  }
  __syncthreads();
}

__device__ __forceinline__ Branch branch_of(const Norm& norm, int64_t channels, int k, int64_t c) {
  const int64_t row = norm.rows == 2 ? k * channels : 0, group = norm.groups == 2 ? k * channels : 0;
  return {norm.weight[row + c], norm.bias == nullptr ? 0.0f : norm.bias[row + c], norm.mean[group + c],
          inverse_std(norm.var[group + c], norm.eps)};
}

__device__ __forceinline__ bool has_two(const Norm& norm) { return norm.rows == 2 || norm.groups == 2; }

__device__ __forceinline__ float omega_at(const float* omega, int64_t i) {
  return omega == nullptr ? 1.0f : omega[i];
}

__device__ __forceinline__ int kind_of(const bool* is_clean, int64_t sample) {
  return is_clean != nullptr && is_clean[sample] ? 1 : 0;
}

__global__ void __launch_bounds__(kThreads)
    testing_coefficients_kernel(Norm norm, int64_t batch, int64_t channels, const float* omega,
                                const float* p_clean, float* scale, float* shift) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= batch * channels) return;
  const int64_t b = i / channels, c = i % channels;
  const bool two = has_two(norm);
  const Affine a =
      testing_coefficients(omega_at(omega, i), two ? p_clean[b] : 0.0f, branch_of(norm, channels, 0, c),
                           branch_of(norm, channels, two ? 1 : 0, c));
  scale[i] = a.scale;
  shift[i] = a.shift;
}

// A block for each sample: d_omega and d_p.
__global__ void __launch_bounds__(kThreads)
    testing_gradients_of_samples(Norm norm, int64_t channels, const float* g1, const float* gc,
                                 const float* centre, const float* omega, const float* p_clean,
                                 float* d_omega, float* d_p) {
  const int64_t b = blockIdx.x;
  const bool two = has_two(norm);
  const float p = two ? p_clean[b] : 0.0f;
  float share = 0.0f;
  for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
    const int64_t i = b * channels + c;
    const TestingGradients d =
        testing_gradients(g1[i], gc[i], centre[i], omega_at(omega, i), p, branch_of(norm, channels, 0, c),
                          branch_of(norm, channels, two ? 1 : 0, c));
    if (d_omega != nullptr) d_omega[i] = d.omega;
    share += d.p;
  }
  share = block_sum(share);
  if (threadIdx.x == 0 && d_p != nullptr) d_p[b] = share;
}

// A block for kAcross channels: d_weight and d_bias.
__global__ void __launch_bounds__(kAcross* kDown)
    testing_gradients_of_tables(Norm norm, int64_t batch, int64_t channels, const float* g1, const float* gc,
                                const float* centre, const float* omega, const float* p_clean,
                                float* d_weight, float* d_bias) {
  const int64_t c = int64_t{blockIdx.x} * kAcross + threadIdx.x;
  const bool two = has_two(norm);
  float sum[4] = {};  // d_weight of both rows, d_bias of both
  if (c < channels) {
    const Branch adversarial = branch_of(norm, channels, 0, c),
                 clean = branch_of(norm, channels, two ? 1 : 0, c);
    for (int64_t b = threadIdx.y; b < batch; b += kDown) {
      const int64_t i = b * channels + c;
      const TestingGradients d = testing_gradients(g1[i], gc[i], centre[i], omega_at(omega, i),
                                                   two ? p_clean[b] : 0.0f, adversarial, clean);
      sum[0] += d.weight[0];
      sum[1] += d.weight[1];
      sum[2] += d.bias[0];
      sum[3] += d.bias[1];
    }
  }
  sum_over_samples(sum);
  if (threadIdx.y != 0 || c >= channels) return;
  if (norm.rows == 2) {
    d_weight[c] = sum[0];
    d_weight[channels + c] = sum[1];
    d_bias[c] = sum[2];
    d_bias[channels + c] = sum[3];
  } else {
    d_weight[c] = sum[0] + (two ? sum[1] : 0.0f);
    d_bias[c] = sum[2] + (two ? sum[3] : 0.0f);
  }
}

__global__ void __launch_bounds__(kAcross* kDown)
    batch_statistics_kernel(int64_t batch, int64_t channels, float hw, int groups, const float* mean,
                            const float* m2, const float* omega, const bool* is_clean, float* batch_mean,
                            float* batch_var, float* n) {
  const int64_t c = int64_t{blockIdx.x} * kAcross + threadIdx.x;
  const bool inside = c < channels;
  float sum[4] = {};  // omega m of both groups, samples of both
  for (int64_t b = threadIdx.y; b < batch; b += kDown) {
    const int k = groups == 2 ? kind_of(is_clean, b) : 0;
    const int64_t i = b * channels + c;
    const float value = inside ? omega_at(omega, i) * mean[i] : 0.0f;
    // by choice, not by a factor 0: one branch's NaN is not the other's
    sum[0] += k == 0 ? value : 0.0f;
    sum[1] += k == 1 ? value : 0.0f;
    sum[2] += k == 0 ? 1.0f : 0.0f;
    sum[3] += k == 1 ? 1.0f : 0.0f;
  }
  sum_over_samples(sum);
  const float samples[2] = {sum[2], sum[3]};
  const float mu[2] = {sum[0] / fmaxf(samples[0], 1.0f), sum[1] / fmaxf(samples[1], 1.0f)};
  float squares[2] = {};
  for (int64_t b = threadIdx.y; b < batch && inside; b += kDown) {
    const int k = groups == 2 ? kind_of(is_clean, b) : 0;
    const int64_t i = b * channels + c;
    const float own = spread(mean[i], m2[i], hw, omega_at(omega, i), k == 0 ? mu[0] : mu[1]);
    squares[0] += k == 0 ? own : 0.0f;
    squares[1] += k == 1 ? own : 0.0f;
  }
  sum_over_samples(squares);
  if (threadIdx.y != 0 || !inside) return;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k == groups) break;
    batch_mean[k * channels + c] = mu[k];
    batch_var[k * channels + c] = squares[k] / (fmaxf(samples[k], 1.0f) * hw);
    if (c == 0) n[k] = samples[k] * hw;
  }
}

__global__ void __launch_bounds__(kThreads)
    training_coefficients_kernel(Norm norm, int64_t batch, int64_t channels, const float* omega,
                                 const bool* is_clean, float* scale, float* shift) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= batch * channels) return;
  const Branch own = branch_of(norm, channels, kind_of(is_clean, i / channels), i % channels);
  const Affine a = training_coefficients(omega_at(omega, i), own);
  scale[i] = a.scale;
  shift[i] = a.shift;
}

// A block for kAcross channels: d_weight and d_bias, and for each row of the statistics the sums over all
// samples that share it, times their weights. All threads get the latter.
struct Through {
  float mean[2], var[2];
};

__device__ __forceinline__ Through training_sums_of(const Norm& norm, int64_t batch, int64_t channels,
                                                    int64_t c, const Branch (&branch)[2], const float* g1,
                                                    const float* gc, const float* mean, const float* omega,
                                                    const bool* is_clean, float* d_weight, float* d_bias) {
  float sum[4] = {};  // of both kinds: g1, g . normalised
  if (c < channels) {
    for (int64_t b = threadIdx.y; b < batch; b += kDown) {
      const int k = kind_of(is_clean, b);
      const int64_t i = b * channels + c;
      const float a = along(g1[i], gc[i], mean[i], omega_at(omega, i), k == 0 ? branch[0] : branch[1]);
      sum[0] += k == 0 ? g1[i] : 0.0f;
      sum[1] += k == 1 ? g1[i] : 0.0f;
      sum[2] += k == 0 ? a : 0.0f;
      sum[3] += k == 1 ? a : 0.0f;
    }
  }
  sum_over_samples(sum);
  if (threadIdx.y == 0 && c < channels) {
    if (norm.rows == 2) {
      d_bias[c] = sum[0];
      d_bias[channels + c] = sum[1];
      d_weight[c] = sum[2];
      d_weight[channels + c] = sum[3];
    } else {
      d_bias[c] = sum[0] + sum[1];
      d_weight[c] = sum[2] + sum[3];
    }
  }
  Through of;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    of.mean[k] = branch[k].weight * sum[k];
    of.var[k] = branch[k].weight * sum[2 + k];
  }
  if (norm.groups == 1) {
    of.mean[0] = of.mean[1] = of.mean[0] + of.mean[1];
    of.var[0] = of.var[1] = of.var[0] + of.var[1];
  }
  return of;
}

__device__ __forceinline__ void branches_of(const Norm& norm, int64_t channels, int64_t c,
                                            Branch (&branch)[2]) {
  if (c >= channels) return;
  branch[0] = branch_of(norm, channels, 0, c);
  branch[1] = has_two(norm) ? branch_of(norm, channels, 1, c) : branch[0];
}

__global__ void __launch_bounds__(kAcross* kDown)
    training_sums_kernel(Norm norm, int64_t batch, int64_t channels, const float* g1, const float* gc,
                         const float* mean, const float* omega, const bool* is_clean, float* d_weight,
                         float* d_bias, float* through) {
  const int64_t c = int64_t{blockIdx.x} * kAcross + threadIdx.x;
  Branch branch[2] = {};
  branches_of(norm, channels, c, branch);
  const Through of =
      training_sums_of(norm, batch, channels, c, branch, g1, gc, mean, omega, is_clean, d_weight, d_bias);
  if (threadIdx.y != 0 || c >= channels) return;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k == norm.groups) break;
    through[k * channels + c] = of.mean[k];
    through[(norm.groups + k) * channels + c] = of.var[k];
  }
}

__global__ void __launch_bounds__(kAcross* kDown)
    training_gradients_kernel(Norm norm, int64_t batch, int64_t channels, float hw, const float* g1,
                              const float* gc, const float* mean, const float* m2, const float* omega,
                              const float* n, const bool* is_clean, const float* through, float* d_omega,
                              float* d_weight, float* d_bias, float* by_grad, float* by_input,
                              float* constant) {
  const int64_t c = int64_t{blockIdx.x} * kAcross + threadIdx.x;
  Branch branch[2] = {};
  branches_of(norm, channels, c, branch);
  Through of;
  if (through == nullptr) {
    of = training_sums_of(norm, batch, channels, c, branch, g1, gc, mean, omega, is_clean, d_weight, d_bias);
  }
  if (c >= channels) return;
  if (through != nullptr) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int64_t group = norm.groups == 2 ? k : 0;
      of.mean[k] = through[group * channels + c];
      of.var[k] = through[(norm.groups + group) * channels + c];
    }
  }
  for (int64_t b = threadIdx.y; b < batch; b += kDown) {
    const int k = kind_of(is_clean, b);
    const int64_t i = b * channels + c;
    const Branch own = k == 0 ? branch[0] : branch[1];
    const float count = fmaxf(n[norm.groups == 2 ? k : 0], 1.0f);
    const TrainingGradients d = training_gradients(g1[i], gc[i], mean[i], m2[i], hw, omega_at(omega, i), own,
                                                   (k == 0 ? of.mean[0] : of.mean[1]) / count,
                                                   (k == 0 ? of.var[0] : of.var[1]) * own.inv_std / count);
    if (d_omega != nullptr) d_omega[i] = d.omega;
    by_grad[i] = d.by_grad;
    by_input[i] = d.by_input;
    constant[i] = d.constant;
  }
}

}  // namespace

extern "C" const char* awnet_cuda_testing_coefficients(const Norm* norm, int64_t batch, int64_t channels,
                                                       const float* omega, const float* p_clean, float* scale,
                                                       float* shift, void* stream) {
  return launch(testing_coefficients_kernel, divided_up(batch * channels, kThreads), 1, dim3(kThreads),
                stream, *norm, batch, channels, omega, p_clean, scale, shift);
}

extern "C" const char* awnet_cuda_testing_gradients(const Norm* norm, int64_t batch, int64_t channels,
                                                    const float* g1, const float* gc, const float* centre,
                                                    const float* omega, const float* p_clean, float* d_omega,
                                                    float* d_p, float* d_weight, float* d_bias,
                                                    void* stream) {
  if (d_omega != nullptr || d_p != nullptr) {
    const char* error = launch(testing_gradients_of_samples, batch, 1, dim3(kThreads), stream, *norm,
                               channels, g1, gc, centre, omega, p_clean, d_omega, d_p);
    if (error != nullptr) return error;
  }
  if (d_weight == nullptr) return nullptr;
  return launch(testing_gradients_of_tables, divided_up(channels, kAcross), 1, kColumns, stream, *norm, batch,
                channels, g1, gc, centre, omega, p_clean, d_weight, d_bias);
}

extern "C" const char* awnet_cuda_batch_statistics(int64_t batch, int64_t channels, int64_t hw,
                                                   int32_t groups, const float* mean, const float* m2,
                                                   const float* omega, const bool* is_clean,
                                                   float* batch_mean, float* batch_var, float* n,
                                                   void* stream) {
  return launch(batch_statistics_kernel, divided_up(channels, kAcross), 1, kColumns, stream, batch, channels,
                static_cast<float>(hw), groups, mean, m2, omega, is_clean, batch_mean, batch_var, n);
}

extern "C" const char* awnet_cuda_training_coefficients(const Norm* norm, int64_t batch, int64_t channels,
                                                        const float* omega, const bool* is_clean,
                                                        float* scale, float* shift, void* stream) {
  return launch(training_coefficients_kernel, divided_up(batch * channels, kThreads), 1, dim3(kThreads),
                stream, *norm, batch, channels, omega, is_clean, scale, shift);
}

extern "C" const char* awnet_cuda_training_sums(const Norm* norm, int64_t batch, int64_t channels,
                                                const float* g1, const float* gc, const float* mean,
                                                const float* omega, const bool* is_clean, float* d_weight,
                                                float* d_bias, float* through, void* stream) {
  return launch(training_sums_kernel, divided_up(channels, kAcross), 1, kColumns, stream, *norm, batch,
                channels, g1, gc, mean, omega, is_clean, d_weight, d_bias, through);
}

extern "C" const char* awnet_cuda_training_gradients(const Norm* norm, int64_t batch, int64_t channels,
                                                     int64_t hw, const float* g1, const float* gc,
                                                     const float* mean, const float* m2, const float* omega,
                                                     const float* n, const bool* is_clean,
                                                     const float* through, float* d_omega, float* d_weight,
                                                     float* d_bias, float* by_grad, float* by_input,
                                                     float* constant, void* stream) {
  return launch(training_gradients_kernel, divided_up(channels, kAcross), 1, kColumns, stream, *norm, batch,
                channels, static_cast<float>(hw), g1, gc, mean, m2, omega, n, is_clean, through, d_omega,
                d_weight, d_bias, by_grad, by_input, constant);
}

}  // namespace awnet::cuda
