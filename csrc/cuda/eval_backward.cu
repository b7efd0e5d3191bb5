// The backward pass of eval mode in one kernel: d_u = g * scale, d_residual = g and the sums of g and
// g (u - center) over each plane. g is the sum of up to two gradients of y and of that of y's mean, where the
// ReLU is active, or times the slope of another activation. Where a sample is cut into parts, the block with
// the last ticket combines them in order.
#include "sums.h"

namespace awnet::cuda {
namespace {

// What belongs to V planes.
template <int V>
struct Coefficients {
  float scale[V], shift[V], d_mean[V], center[V];
};

// EvalBackwardPointers with one image for the saved activation: y, or where kSlope the slope.
struct EvalOperands {
  const void *grad, *other_grad, *u, *y;
  const uint8_t* relu_mask;
  const float *d_mean, *scale, *shift;
  void *d_u, *d_residual;
  float *g1, *gc, *center, *workspace;
  int32_t* tickets;
};

template <class T, bool kSlope>
struct EvalBackward {
  EvalOperands p;
  float pixels;

  template <int V>
  struct Inputs {
    Vector<T, V> grad, other, u, y;
    Vector<uint8_t, V> relu_mask;
  };

  template <int V>
  __device__ __forceinline__ Inputs<V> read(int64_t i) const {
    Inputs<V> in;
    in.grad = load<V>(static_cast<const T*>(p.grad) + i);
    if (p.other_grad != nullptr) in.other = load<V>(static_cast<const T*>(p.other_grad) + i);
    if (p.u != nullptr) in.u = load<V>(static_cast<const T*>(p.u) + i);
    if (kSlope || p.y != nullptr) in.y = load<V>(static_cast<const T*>(p.y) + i);
    if (!kSlope && p.relu_mask != nullptr) in.relu_mask = load<V>(p.relu_mask + i);
    return in;
  }

  // Of the planes from `entry` on, whose first pixels are the V values from `first` on.
  template <int V>
  __device__ __forceinline__ Coefficients<V> coefficients(int64_t entry, int64_t first) const {
    Coefficients<V> c = {};
    load_entries(p.scale + entry, c.scale);
    if (p.shift != nullptr) load_entries(p.shift + entry, c.shift);
    if (p.d_mean != nullptr) load_entries(p.d_mean + entry, c.d_mean);
#pragma unroll
    for (int j = 0; j < V; ++j) c.d_mean[j] /= pixels;
    if (p.g1 != nullptr) {
      // any center is exact; one near the channel's mean keeps the digits, and a pixel of u is near it
      const Vector<T, V> u = load<V>(static_cast<const T*>(p.u) + first);
#pragma unroll
      for (int j = 0; j < V; ++j) c.center[j] = u[j];
    }
    return c;
  }

  // Stores the gradients of V values and adds them to the sums. kShared: all belong to one plane.
  template <int V, bool kShared, int N>
  __device__ __forceinline__ void write(int64_t i, const Inputs<V>& in, const Coefficients<N>& c,
                                        float (&sum)[N], float (&products)[N]) const {
    float d_u[V], act_grad[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int k = kShared ? 0 : j;
      float g = in.grad[j];
      if (p.other_grad != nullptr) g += in.other[j];
      g += c.d_mean[k];
      if constexpr (kSlope) {
        g *= in.y[j];
      } else if (p.y != nullptr) {
        g = relu_backward(g, in.y[j]);
      } else if (p.relu_mask != nullptr) {
        g = relu_backward(g, in.relu_mask[j]);
      } else if (p.shift != nullptr) {  // y as apply stored it
        g = relu_backward(g, static_cast<float>(rounded<T>(fmaf(in.u[j], c.scale[k], c.shift[k]))));
      }
      act_grad[j] = g;
      d_u[j] = g * c.scale[k];
      if (p.g1 != nullptr) {
        sum[k] += g;
        products[k] += g * (in.u[j] - c.center[k]);
      }
    }
    store(static_cast<T*>(p.d_u) + i, d_u);
    if (p.d_residual != nullptr) store(static_cast<T*>(p.d_residual) + i, act_grad);
  }

  __device__ __forceinline__ void finish(int64_t entry, float sum, float products, float center) const {
    p.g1[entry] = sum;
    p.gc[entry] = p.center != nullptr ? products : fmaf(center, sum, products);
    if (p.center != nullptr) p.center[entry] = center;
  }

  // In double, so that the error does not grow with the number of parts; part i is at from + i * stride.
  __device__ __forceinline__ void combine(int64_t entry, int64_t from, int64_t stride, int32_t parts,
                                          float center, const float* product_sums) const {
    double sum = 0.0, products = 0.0;
    for (int32_t part = 0; part < parts; ++part, from += stride) {
      sum += __ldcg(p.workspace + from);  // bypasses the L1 cache, which may hold old values
      products += __ldcg(product_sums + from);
    }
    finish(entry, static_cast<float>(sum), static_cast<float>(products), center);
  }
};

// Whether this block is the last of `parts` to come here; all its threads have stored their parts.
__device__ __forceinline__ bool last_of(int32_t* tickets, int32_t parts) {
  __shared__ int32_t ticket;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) ticket = atomicAdd(tickets, 1);
  __syncthreads();
  __threadfence();
  return ticket == parts - 1;
}

template <class T, int V, bool kWide, bool kSlope>
__global__ void __launch_bounds__(kThreads, 3)
    eval_backward_planes(EvalBackward<T, kSlope> op, Planes planes) {
  const Slice s = slice_of<V, kWide>(planes);
  int64_t entry = s.entry;
  if constexpr (kWide) entry = blockIdx.x / planes.parts;
  const int64_t table = s.count > 0 ? entry : 0;  // a group without work reads a plane's too
  const auto c = op.template coefficients<1>(table, table * planes.vectors * V);
  float sum[1] = {}, products[1] = {};
  for (int32_t i = s.lane; i < s.count; i += s.width * kAhead) {
    typename EvalBackward<T, kSlope>::template Inputs<V> in[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int32_t at = i + k * s.width;
      if (at < s.count) in[k] = op.template read<V>(s.first + int64_t{at} * V);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int32_t at = i + k * s.width;
      if (at < s.count) op.template write<V, true>(s.first + int64_t{at} * V, in[k], c, sum, products);
    }
  }
  if (op.p.g1 == nullptr) return;
  sum[0] = group_sum<kWide>(sum[0], s.width);
  products[0] = group_sum<kWide>(products[0], s.width);
  if (planes.parts == 1) {
    if (s.lane == 0 && s.count > 0) op.finish(entry, sum[0], products[0], c.center[0]);
    return;
  }
  if constexpr (kWide) {
    float* const product_sums = op.p.workspace + planes.entries * planes.parts;
    if (s.lane == 0) {
      op.p.workspace[s.entry] = sum[0];
      product_sums[s.entry] = products[0];
    }
    if (!last_of(op.p.tickets + entry, planes.parts)) return;
    const int64_t from = entry / planes.channels * planes.parts * planes.channels + entry % planes.channels;
    if (s.lane == 0) op.combine(entry, from, planes.channels, planes.parts, c.center[0], product_sums);
  }
}

template <class T, int V, bool kSlope>
__global__ void __launch_bounds__(kThreads)
    eval_backward_rows(EvalBackward<T, kSlope> op, int64_t entries, Rows rows) {
  const Column column = column_of<V>(rows);
  Coefficients<V> c = {};
  const int64_t sample = blockIdx.x / rows.parts;
  if (column.end > 0) c = op.template coefficients<V>(column.table, column.first);
  float sum[V] = {}, products[V] = {};
  const int32_t down = blockDim.y;
  for (int32_t pixel = column.begin; pixel < column.end; pixel += down * kAhead) {
    typename EvalBackward<T, kSlope>::template Inputs<V> in[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (pixel + k * down < column.end) {
        in[k] = op.template read<V>(column.first + int64_t{pixel + k * down} * rows.channels);
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (pixel + k * down < column.end) {
        const int64_t i = column.first + int64_t{pixel + k * down} * rows.channels;
        op.template write<V, false>(i, in[k], c, sum, products);
      }
    }
  }
  if (op.p.g1 == nullptr) return;
  column_sums(sum);
  column_sums(products);
  const bool writes = threadIdx.y == 0 && column.end > 0;
  if (rows.parts == 1) {
    if (!writes) return;
#pragma unroll
    for (int j = 0; j < V; ++j) op.finish(column.entry + j, sum[j], products[j], c.center[j]);
    return;
  }
  float* const product_sums = op.p.workspace + entries * rows.parts;
  if (writes) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      op.p.workspace[column.entry + j] = sum[j];
      product_sums[column.entry + j] = products[j];
    }
  }
  if (!last_of(op.p.tickets + sample * gridDim.y + blockIdx.y, rows.parts) || !writes) return;
  const int64_t from = sample * rows.parts * rows.channels + column.table - sample * rows.channels;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    op.combine(column.table + j, from + j, rows.channels, rows.parts, c.center[j], product_sums);
  }
}

template <class T, int V, bool kSlope>
const char* launch_eval_backward(const Images& images, const EvalBackward<T, kSlope>& op, void* stream) {
  const Planes planes = planes_of(images, kThreads, kWarp);
  if (images.channels_last) {
    return over_rows_parts(eval_backward_rows<T, V, kSlope>, images, rows_of(images, kThreads, kWarp), stream,
                           op, images.batch * images.channels);
  }
  return over_planes_parts(eval_backward_planes<T, V, false, kSlope>,
                           eval_backward_planes<T, V, true, kSlope>, planes, stream, op);
}

}  // namespace

extern "C" const char* awnet_cuda_eval_backward(const Images* images, const EvalBackwardPointers* pointers,
                                                void* stream) {
  if (const char* reason = refusal(*images)) return reason;
  if (images->pixels == 0) return "sums need at least one pixel";
  return for_dtype(*images, [&](auto tag) {
    using T = decltype(tag);
    const auto run = [&](auto by_slope, const void* values) {
      const EvalBackwardPointers& p = *pointers;
      const EvalBackward<T, decltype(by_slope)::value> op{
          {p.grad, p.other_grad, p.u, values, p.saved.relu_mask, p.d_mean, p.scale, p.shift, p.d_u,
           p.d_residual, p.g1, p.gc, p.center, p.workspace, p.tickets},
          static_cast<float>(images->pixels)};
      return vector_width(*images) > 1 ? launch_eval_backward<T, kFull<T>>(*images, op, stream)
                                       : launch_eval_backward<T, 1>(*images, op, stream);
    };
    return pointers->saved.slope != nullptr ? run(std::true_type{}, pointers->saved.slope)
                                            : run(std::false_type{}, pointers->saved.y);
  });
}

}  // namespace awnet::cuda
