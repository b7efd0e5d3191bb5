// Each plane's mean and centered sum of squares: two passes over values held in registers, then two over the
// parts of a large image. Never E[x^2] - mean^2.
#include "sums.h"

namespace awnet::cuda {
namespace {

template <class T, int V, bool kWide>
__global__ void __launch_bounds__(kThreads)
    statistics_planes(const T* u, float* mean, float* m2, Planes planes) {
  const Slice s = slice_of<V, kWide>(planes);
  Vector<T, V> values[kDepth];
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    const int32_t i = s.lane + k * s.width;
    if (i < s.count) values[k] = load<V>(u + s.first + int64_t{i} * V);
  }
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    if (s.lane + k * s.width < s.count) {
#pragma unroll
      for (int j = 0; j < V; ++j) sum += values[k][j];
    }
  }
  const float center = group_sum<kWide>(sum, s.width) / (static_cast<float>(s.count) * V);
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    if (s.lane + k * s.width < s.count) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float d = values[k][j] - center;
        squares += d * d;
      }
    }
  }
  squares = group_sum<kWide>(squares, s.width);
  if (s.lane == 0 && s.count > 0) {
    mean[s.entry] = center;
    m2[s.entry] = squares;
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) statistics_rows(const T* u, float* mean, float* m2, Rows rows) {
  const Column c = column_of<V>(rows);
  const int32_t down = blockDim.y;
  Vector<T, V> values[kDepth];
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    const int32_t pixel = c.begin + k * down;
    if (pixel < c.end) values[k] = load<V>(u + c.first + pixel * rows.channels);
  }
  float sum[V] = {};
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    if (c.begin + k * down < c.end) {
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += values[k][j];
    }
  }
  column_sums(sum);
  float center[V], squares[V] = {};
#pragma unroll
  for (int j = 0; j < V; ++j) center[j] = sum[j] / static_cast<float>(c.pixels);
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    if (c.begin + k * down < c.end) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float d = values[k][j] - center[j];
        squares[j] += d * d;
      }
    }
  }
  column_sums(squares);
  if (threadIdx.y == 0 && c.end > 0) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      mean[c.entry + j] = center[j];
      m2[c.entry + j] = squares[j];
    }
  }
}

// The parts of one call: every part has `length` values but the last.
struct Parts {
  int64_t entries, channels;
  int32_t parts;
  int64_t length, pixels;

  __device__ __forceinline__ double count(int32_t part) const {
    const int64_t rest = pixels - part * length;
    return static_cast<double>(rest < length ? rest : length);
  }
};

// [B, parts, C] -> [B, C]: the mean of the parts' means, then their sums of squares about it. In double, so
// that the error does not grow with the number of parts.
__global__ void __launch_bounds__(kThreads)
    combine_statistics(const float* means, const float* squares, float* mean, float* m2, Parts p) {
  const int64_t entry = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (entry >= p.entries) return;
  const int64_t first = entry / p.channels * p.parts * p.channels + entry % p.channels;
  double total = 0.0;
  for (int32_t part = 0; part < p.parts; ++part) total += p.count(part) * means[first + part * p.channels];
  const double center = total / static_cast<double>(p.pixels);
  double sum = 0.0;
  for (int32_t part = 0; part < p.parts; ++part) {
    const int64_t from = first + part * p.channels;
    const double d = means[from] - center;
    sum += squares[from] + p.count(part) * d * d;
  }
  mean[entry] = static_cast<float>(center);
  m2[entry] = static_cast<float>(sum);
}

template <class T, int V>
const char* launch_statistics(const Images& images, const T* u, float* mean, float* m2, float* workspace,
                              void* stream) {
  const int64_t entries = images.batch * images.channels;
  const Planes planes = planes_of(images, kThreads, kWarp);
  const Rows rows = rows_of(images, kThreads, kWarp);
  const int32_t parts = images.channels_last ? rows.parts : planes.parts;
  const int64_t length = images.channels_last ? rows.length : int64_t{planes.length} * V;
  float* const means = parts > 1 ? workspace : mean;
  float* const squares = parts > 1 ? workspace + entries * parts : m2;
  const char* error = images.channels_last
                          ? over_rows_parts(statistics_rows<T, V>, images, rows, stream, u, means, squares)
                          : over_planes_parts(statistics_planes<T, V, false>, statistics_planes<T, V, true>,
                                              planes, stream, u, means, squares);
  if (error != nullptr || parts == 1) return error;
  return launch(combine_statistics, ceil_div(entries, kThreads), 1, dim3(kThreads), stream, means, squares,
                mean, m2, Parts{entries, images.channels, parts, length, images.pixels});
}

}  // namespace

extern "C" int64_t awnet_cuda_workspace(const Images* images) {
  if (images->pixels == 0 || refusal(*images) != nullptr) return 0;
  const int64_t parts = parts_of(*images);
  return parts > 1 ? 2 * parts * images->batch * images->channels : 0;
}

extern "C" const char* awnet_cuda_statistics(const Images* images, const void* u, float* mean, float* m2,
                                             float* workspace, void* stream) {
  if (const char* reason = refusal(*images)) return reason;
  if (images->pixels == 0) return "statistics need at least one pixel";
  return for_dtype(*images, [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(u);
    return vector_width(*images) > 1
               ? launch_statistics<T, kFull<T>>(*images, from, mean, m2, workspace, stream)
               : launch_statistics<T, 1>(*images, from, mean, m2, workspace, stream);
  });
}

}  // namespace awnet::cuda
