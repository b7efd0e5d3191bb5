// g1 = sum g and gc = sum g (u - center) over each plane, where g is the gradient of the activation's input.
#include "sums.h"

namespace awnet::cuda {
namespace {

template <class T, bool kSlope>
struct Operands {
  ActivationBackward<T, kSlope> activation;
  const T* u;
  const float* center;
  float *g1, *gc;

  template <int V>
  struct Inputs {
    typename ActivationBackward<T, kSlope>::template Inputs<V> activation;
    Vector<T, V> u;
  };

  template <int V>
  __device__ __forceinline__ Inputs<V> read(int64_t i) const {
    Inputs<V> in;
    in.activation = activation.template read<V>(i);
    in.u = load<V>(u + i);
    return in;
  }

  // Adds value j to the sums.
  template <int V>
  __device__ __forceinline__ void add(const Inputs<V>& in, int j, float center, float& sum,
                                      float& products) const {
    const float g = activation.at(in.activation, j);
    sum += g;
    products += g * (in.u[j] - center);
  }
};

template <class T, int V, bool kWide, bool kSlope>
__global__ void __launch_bounds__(kThreads) reduce_planes(Operands<T, kSlope> op, Planes planes) {
  const Slice s = slice_of<V, kWide>(planes);
  int64_t table = s.entry;  // of the center
  if constexpr (kWide) table = blockIdx.x / planes.parts;
  const float center = s.count > 0 ? op.center[table] : 0.0f;
  float sum = 0.0f, products = 0.0f;
  for (int32_t i = s.lane; i < s.count; i += s.width * kAhead) {
    typename Operands<T, kSlope>::template Inputs<V> in[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int32_t at = i + k * s.width;
      if (at < s.count) in[k] = op.template read<V>(s.first + int64_t{at} * V);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k * s.width < s.count) {
#pragma unroll
        for (int j = 0; j < V; ++j) op.add(in[k], j, center, sum, products);
      }
    }
  }
  sum = group_sum<kWide>(sum, s.width);
  products = group_sum<kWide>(products, s.width);
  if (s.lane == 0 && s.count > 0) {
    op.g1[s.entry] = sum;
    op.gc[s.entry] = products;
  }
}

template <class T, int V, bool kSlope>
__global__ void __launch_bounds__(kThreads) reduce_rows(Operands<T, kSlope> op, Rows rows) {
  const Column c = column_of<V>(rows);
  float center[V] = {}, sum[V] = {}, products[V] = {};
  if (c.end > 0) load_entries(op.center + c.table, center);
  const int32_t down = blockDim.y;
  for (int32_t pixel = c.begin; pixel < c.end; pixel += down * kAhead) {
    typename Operands<T, kSlope>::template Inputs<V> in[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (pixel + k * down < c.end) {
        in[k] = op.template read<V>(c.first + (pixel + k * down) * rows.channels);
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (pixel + k * down < c.end) {
#pragma unroll
        for (int j = 0; j < V; ++j) op.add(in[k], j, center[j], sum[j], products[j]);
      }
    }
  }
  column_sums(sum);
  column_sums(products);
  if (threadIdx.y == 0 && c.end > 0) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      op.g1[c.entry + j] = sum[j];
      op.gc[c.entry + j] = products[j];
    }
  }
}

// [B, parts, C] -> [B, C]. In double, so that the error does not grow with the number of parts.
__global__ void __launch_bounds__(kThreads)
    combine_sums(const float* sums, const float* product_sums, float* g1, float* gc, int64_t entries,
                 int64_t channels, int32_t parts) {
  const int64_t entry = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (entry >= entries) return;
  int64_t from = entry / channels * parts * channels + entry % channels;
  double sum = 0.0, products = 0.0;
  for (int32_t part = 0; part < parts; ++part, from += channels) {
    sum += sums[from];
    products += product_sums[from];
  }
  g1[entry] = static_cast<float>(sum);
  gc[entry] = static_cast<float>(products);
}

template <class T, int V, bool kSlope>
const char* launch_reduce(const Images& images, Operands<T, kSlope> op, float* workspace, void* stream) {
  const int64_t entries = images.batch * images.channels;
  const Planes planes = planes_of(images, kThreads, kWarp);
  const Rows rows = rows_of(images, kThreads, kWarp);
  const int32_t parts = images.channels_last ? rows.parts : planes.parts;
  float *const g1 = op.g1, *const gc = op.gc;
  if (parts > 1) {
    op.g1 = workspace;
    op.gc = workspace + entries * parts;
  }
  const char* error = images.channels_last
                          ? over_rows_parts(reduce_rows<T, V, kSlope>, images, rows, stream, op)
                          : over_planes_parts(reduce_planes<T, V, false, kSlope>,
                                              reduce_planes<T, V, true, kSlope>, planes, stream, op);
  if (error != nullptr || parts == 1) return error;
  return launch(combine_sums, ceil_div(entries, kThreads), 1, dim3(kThreads), stream, op.g1, op.gc, g1, gc,
                entries, images.channels, parts);
}

}  // namespace

extern "C" const char* awnet_cuda_reduce(const Images* images, const void* grad, const void* u,
                                         const SavedActivationPointers* saved, const float* center, float* g1,
                                         float* gc, float* workspace, void* stream) {
  if (const char* reason = refusal(*images)) return reason;
  if (images->pixels == 0) return "sums need at least one pixel";
  return for_dtype(*images, [&](auto tag) {
    using T = decltype(tag);
    const auto run = [&](auto by_slope, const void* values) {
      const Operands<T, decltype(by_slope)::value> op{
          {static_cast<const T*>(grad), static_cast<const T*>(values), saved->relu_mask},
          static_cast<const T*>(u),
          center,
          g1,
          gc};
      return vector_width(*images) > 1 ? launch_reduce<T, kFull<T>>(*images, op, workspace, stream)
                                       : launch_reduce<T, 1>(*images, op, workspace, stream);
    };
    return saved->slope != nullptr ? run(std::true_type{}, saved->slope) : run(std::false_type{}, saved->y);
  });
}

}  // namespace awnet::cuda
