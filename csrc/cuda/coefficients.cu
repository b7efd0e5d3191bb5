// The [B, C] algebra: ../arithmetic.h for every sample and channel, and sums over the batch in a fixed order.
#include "device.h"
#include "layout.h"

namespace awnet::cuda {
namespace {

// Sums over the batch: a block has kAcross channels along x and kDown samples along y.
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

// The size of the tables, and the norm.
struct Tables {
  NormPointers norm;
  int64_t batch, channels;

  __device__ __forceinline__ bool two_branches() const {
    return norm.affine_rows == 2 || norm.stat_rows == 2;
  }
  // branch: 0 adversarial, 1 clean
  __device__ __forceinline__ Branch branch(int branch, int64_t c) const {
    const int64_t affine = norm.affine_rows == 2 ? branch * channels : 0,
                  stat = norm.stat_rows == 2 ? branch * channels : 0;
    return {norm.weight[affine + c], norm.bias == nullptr ? 0.0f : norm.bias[affine + c], norm.mean[stat + c],
            inverse_std(norm.var[stat + c], norm.eps)};
  }
  __device__ __forceinline__ void branches(int64_t c, Branch (&of)[2]) const {
    if (c >= channels) return;
    of[0] = branch(0, c);
    of[1] = two_branches() ? branch(1, c) : of[0];
  }
};

__device__ __forceinline__ float filter_scale_at(const MixPointers& mix, int64_t i) {
  return mix.filter_scale == nullptr ? 1.0f : mix.filter_scale[i];
}

__device__ __forceinline__ int branch_of(const MixPointers& mix, int64_t sample) {
  return mix.is_clean != nullptr && mix.is_clean[sample] ? 1 : 0;
}

__global__ void __launch_bounds__(kThreads)
    eval_coefficients_kernel(Tables tables, MixPointers mix, float* scale, float* shift) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= tables.batch * tables.channels) return;
  const int64_t b = i / tables.channels, c = i % tables.channels;
  const bool two = tables.two_branches();
  const Affine a = eval_coefficients(filter_scale_at(mix, i), two ? mix.p_clean[b] : 0.0f,
                                     tables.branch(0, c), tables.branch(two ? 1 : 0, c));
  scale[i] = a.scale;
  shift[i] = a.shift;
}

__device__ __forceinline__ EvalGradients eval_gradients_at(const SumsPointers& sums, const MixPointers& mix,
                                                           int64_t i, float p, Branch adversarial,
                                                           Branch clean) {
  return eval_gradients(sums.g1[i], sums.gc[i], sums.center[i], filter_scale_at(mix, i), p, adversarial,
                        clean);
}

// A block for each sample: the gradients of filter_scale and p_clean.
__global__ void __launch_bounds__(kThreads)
    eval_gradients_of_samples(Tables tables, SumsPointers sums, MixPointers mix, EvalGradientsPointers to) {
  const int64_t b = blockIdx.x;
  const bool two = tables.two_branches();
  const float p = two ? mix.p_clean[b] : 0.0f;
  float share = 0.0f;
  for (int64_t c = threadIdx.x; c < tables.channels; c += kThreads) {
    const int64_t i = b * tables.channels + c;
    const EvalGradients d =
        eval_gradients_at(sums, mix, i, p, tables.branch(0, c), tables.branch(two ? 1 : 0, c));
    if (to.filter_scale != nullptr) to.filter_scale[i] = d.filter_scale;
    share += d.p;
  }
  share = block_sum(share);
  if (threadIdx.x == 0 && to.p_clean != nullptr) to.p_clean[b] = share;
}

// A block for kAcross channels: the gradients of weight and bias.
__global__ void __launch_bounds__(kAcross* kDown)
    eval_gradients_of_tables(Tables tables, SumsPointers sums, MixPointers mix, EvalGradientsPointers to) {
  const int64_t c = int64_t{blockIdx.x} * kAcross + threadIdx.x, channels = tables.channels;
  const bool two = tables.two_branches();
  float sum[4] = {};  // d_weight of both rows, d_bias of both
  if (c < channels) {
    Branch branch[2];
    tables.branches(c, branch);
    for (int64_t b = threadIdx.y; b < tables.batch; b += kDown) {
      const EvalGradients d =
          eval_gradients_at(sums, mix, b * channels + c, two ? mix.p_clean[b] : 0.0f, branch[0], branch[1]);
      sum[0] += d.weight[0];
      sum[1] += d.weight[1];
      sum[2] += d.bias[0];
      sum[3] += d.bias[1];
    }
  }
  sum_over_samples(sum);
  if (threadIdx.y != 0 || c >= channels) return;
  if (tables.norm.affine_rows == 2) {
    to.weight[c] = sum[0];
    to.weight[channels + c] = sum[1];
    to.bias[c] = sum[2];
    to.bias[channels + c] = sum[3];
  } else {
    to.weight[c] = sum[0] + (two ? sum[1] : 0.0f);
    to.bias[c] = sum[2] + (two ? sum[3] : 0.0f);
  }
}

__global__ void __launch_bounds__(kAcross* kDown)
    batch_statistics_kernel(int64_t batch, int64_t channels, int stat_rows, StatsPointers stats,
                            MixPointers mix, float* batch_mean, float* batch_var, float* n) {
  const int64_t c = int64_t{blockIdx.x} * kAcross + threadIdx.x;
  const bool inside = c < channels;
  const float hw = static_cast<float>(stats.hw);
  float sum[4] = {};  // filter_scale * mean of both rows, samples of both
  for (int64_t b = threadIdx.y; b < batch; b += kDown) {
    const int row = stat_rows == 2 ? branch_of(mix, b) : 0;
    const int64_t i = b * channels + c;
    const float value = inside ? filter_scale_at(mix, i) * stats.mean[i] : 0.0f;
    // selected, not multiplied by 0: a NaN in one branch must not reach the other
    sum[0] += row == 0 ? value : 0.0f;
    sum[1] += row == 1 ? value : 0.0f;
    sum[2] += row == 0 ? 1.0f : 0.0f;
    sum[3] += row == 1 ? 1.0f : 0.0f;
  }
  sum_over_samples(sum);
  const float samples[2] = {sum[2], sum[3]};
  const float mu[2] = {sum[0] / fmaxf(samples[0], 1.0f), sum[1] / fmaxf(samples[1], 1.0f)};
  float squares[2] = {};
  for (int64_t b = threadIdx.y; b < batch && inside; b += kDown) {
    const int row = stat_rows == 2 ? branch_of(mix, b) : 0;
    const int64_t i = b * channels + c;
    const float square =
        sample_m2(stats.mean[i], stats.m2[i], hw, filter_scale_at(mix, i), row == 0 ? mu[0] : mu[1]);
    squares[0] += row == 0 ? square : 0.0f;
    squares[1] += row == 1 ? square : 0.0f;
  }
  sum_over_samples(squares);
  if (threadIdx.y != 0 || !inside) return;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if (row == stat_rows) break;
    batch_mean[row * channels + c] = mu[row];
    batch_var[row * channels + c] = squares[row] / (fmaxf(samples[row], 1.0f) * hw);
    if (c == 0) n[row] = samples[row] * hw;
  }
}

__global__ void __launch_bounds__(kThreads)
    train_coefficients_kernel(Tables tables, MixPointers mix, float* scale, float* shift) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= tables.batch * tables.channels) return;
  const Branch branch = tables.branch(branch_of(mix, i / tables.channels), i % tables.channels);
  const Affine a = train_coefficients(filter_scale_at(mix, i), branch);
  scale[i] = a.scale;
  shift[i] = a.shift;
}

// For each row of the statistics, the sums over all samples that share it, times their weights.
struct Through {
  float mean[2], var[2];
};

// A block for kAcross channels. All threads get the result; the first of a channel writes the gradients of
// weight and bias.
__device__ __forceinline__ Through train_sums_of(const Tables& tables, const SumsPointers& sums,
                                                 const MixPointers& mix, int64_t c, const Branch (&branch)[2],
                                                 float* d_weight, float* d_bias) {
  const int64_t channels = tables.channels;
  float sum[4] = {};  // of both branches: g1, g . normalized
  if (c < channels) {
    for (int64_t b = threadIdx.y; b < tables.batch; b += kDown) {
      const int k = branch_of(mix, b);
      const int64_t i = b * channels + c;
      const float a = grad_dot_normalized(sums.g1[i], sums.gc[i], sums.center[i], filter_scale_at(mix, i),
                                          k == 0 ? branch[0] : branch[1]);
      sum[0] += k == 0 ? sums.g1[i] : 0.0f;
      sum[1] += k == 1 ? sums.g1[i] : 0.0f;
      sum[2] += k == 0 ? a : 0.0f;
      sum[3] += k == 1 ? a : 0.0f;
    }
  }
  sum_over_samples(sum);
  if (threadIdx.y == 0 && c < channels) {
    if (tables.norm.affine_rows == 2) {
      d_bias[c] = sum[0];
      d_bias[channels + c] = sum[1];
      d_weight[c] = sum[2];
      d_weight[channels + c] = sum[3];
    } else {
      d_bias[c] = sum[0] + sum[1];
      d_weight[c] = sum[2] + sum[3];
    }
  }
  Through through;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    through.mean[k] = branch[k].weight * sum[k];
    through.var[k] = branch[k].weight * sum[2 + k];
  }
  if (tables.norm.stat_rows == 1) {
    through.mean[0] = through.mean[1] = through.mean[0] + through.mean[1];
    through.var[0] = through.var[1] = through.var[0] + through.var[1];
  }
  return through;
}

__global__ void __launch_bounds__(kAcross* kDown)
    train_sums_kernel(Tables tables, SumsPointers sums, MixPointers mix, float* d_weight, float* d_bias,
                      float* through) {
  const int64_t c = int64_t{blockIdx.x} * kAcross + threadIdx.x, channels = tables.channels;
  const int stat_rows = tables.norm.stat_rows;
  Branch branch[2] = {};
  tables.branches(c, branch);
  const Through of = train_sums_of(tables, sums, mix, c, branch, d_weight, d_bias);
  if (threadIdx.y != 0 || c >= channels) return;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if (row == stat_rows) break;
    through[row * channels + c] = of.mean[row];
    through[(stat_rows + row) * channels + c] = of.var[row];
  }
}

__global__ void __launch_bounds__(kAcross* kDown)
    train_gradients_kernel(Tables tables, SumsPointers sums, StatsPointers stats, MixPointers mix,
                           const float* n, const float* through, TrainGradientsPointers to) {
  const int64_t c = int64_t{blockIdx.x} * kAcross + threadIdx.x, channels = tables.channels;
  const bool two_rows = tables.norm.stat_rows == 2;
  Branch branch[2] = {};
  tables.branches(c, branch);
  Through of;
  if (through == nullptr) of = train_sums_of(tables, sums, mix, c, branch, to.weight, to.bias);
  if (c >= channels) return;
  if (through != nullptr) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int64_t row = two_rows ? k : 0;
      of.mean[k] = through[row * channels + c];
      of.var[k] = through[(tables.norm.stat_rows + row) * channels + c];
    }
  }
  const float hw = static_cast<float>(stats.hw);
  for (int64_t b = threadIdx.y; b < tables.batch; b += kDown) {
    const int k = branch_of(mix, b);
    const int64_t i = b * channels + c;
    const Branch selected = k == 0 ? branch[0] : branch[1];
    const float count = fmaxf(n[two_rows ? k : 0], 1.0f);
    const TrainGradients d =
        train_gradients(sums.g1[i], sums.gc[i], stats.mean[i], stats.m2[i], hw, filter_scale_at(mix, i),
                        selected, (k == 0 ? of.mean[0] : of.mean[1]) / count,
                        (k == 0 ? of.var[0] : of.var[1]) * selected.inv_std / count);
    if (to.filter_scale != nullptr) to.filter_scale[i] = d.filter_scale;
    to.by_grad[i] = d.by_grad;
    to.by_input[i] = d.by_input;
    to.constant[i] = d.constant;
  }
}

}  // namespace

extern "C" const char* awnet_cuda_eval_coefficients(const NormPointers* norm, int64_t batch, int64_t channels,
                                                    const MixPointers* mix, float* scale, float* shift,
                                                    void* stream) {
  return launch(eval_coefficients_kernel, ceil_div(batch * channels, kThreads), 1, dim3(kThreads), stream,
                Tables{*norm, batch, channels}, *mix, scale, shift);
}

extern "C" const char* awnet_cuda_eval_gradients(const NormPointers* norm, int64_t batch, int64_t channels,
                                                 const SumsPointers* sums, const MixPointers* mix,
                                                 const EvalGradientsPointers* grads, void* stream) {
  const Tables tables{*norm, batch, channels};
  if (grads->filter_scale != nullptr || grads->p_clean != nullptr) {
    const char* error =
        launch(eval_gradients_of_samples, batch, 1, dim3(kThreads), stream, tables, *sums, *mix, *grads);
    if (error != nullptr) return error;
  }
  if (grads->weight == nullptr) return nullptr;
  return launch(eval_gradients_of_tables, ceil_div(channels, kAcross), 1, kColumns, stream, tables, *sums,
                *mix, *grads);
}

extern "C" const char* awnet_cuda_batch_statistics(int64_t batch, int64_t channels, int32_t stat_rows,
                                                   const StatsPointers* stats, const MixPointers* mix,
                                                   float* batch_mean, float* batch_var, float* n,
                                                   void* stream) {
  return launch(batch_statistics_kernel, ceil_div(channels, kAcross), 1, kColumns, stream, batch, channels,
                stat_rows, *stats, *mix, batch_mean, batch_var, n);
}

extern "C" const char* awnet_cuda_train_coefficients(const NormPointers* norm, int64_t batch,
                                                     int64_t channels, const MixPointers* mix, float* scale,
                                                     float* shift, void* stream) {
  return launch(train_coefficients_kernel, ceil_div(batch * channels, kThreads), 1, dim3(kThreads), stream,
                Tables{*norm, batch, channels}, *mix, scale, shift);
}

extern "C" const char* awnet_cuda_train_sums(const NormPointers* norm, int64_t batch, int64_t channels,
                                             const SumsPointers* sums, const MixPointers* mix,
                                             float* d_weight, float* d_bias, float* through, void* stream) {
  return launch(train_sums_kernel, ceil_div(channels, kAcross), 1, kColumns, stream,
                Tables{*norm, batch, channels}, *sums, *mix, d_weight, d_bias, through);
}

extern "C" const char* awnet_cuda_train_gradients(const NormPointers* norm, int64_t batch, int64_t channels,
                                                  const SumsPointers* sums, const StatsPointers* stats,
                                                  const MixPointers* mix, const float* n,
                                                  const float* through, const TrainGradientsPointers* grads,
                                                  void* stream) {
  return launch(train_gradients_kernel, ceil_div(channels, kAcross), 1, kColumns, stream,
                Tables{*norm, batch, channels}, *sums, *stats, *mix, n, through, *grads);
}

}  // namespace awnet::cuda
