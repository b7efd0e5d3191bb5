// What all the kernels share: values of the three dtypes, 16-byte accesses, sums over lanes and blocks,
// launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../arithmetic.h"
#include "launch.h"

namespace awnet::cuda {

constexpr int kThreads = 256;  // of every block; the drivers' index arithmetic relies on it
constexpr int kWarp = 32;

// Values of a 16-byte access.
template <class T>
constexpr int kFull = 16 / static_cast<int>(sizeof(T));

// V neighboring values as stored, widened one by one.
template <class T, int V>
struct alignas(V * sizeof(T)) Vector {
  T value[V];
  __device__ __forceinline__ float operator[](int j) const { return static_cast<float>(value[j]); }
};

// Two values per register until they are used: members of 16 bits would be unpacked as soon as they are
// loaded.
template <>
struct alignas(16) Vector<__nv_bfloat16, 8> {
  uint32_t pair[4];
  __device__ __forceinline__ float operator[](int j) const {
    return __uint_as_float(j % 2 == 0 ? pair[j / 2] << 16 : pair[j / 2] & 0xffff0000u);
  }
};

template <>
struct alignas(16) Vector<__half, 8> {
  uint32_t pair[4];
  __device__ __forceinline__ float operator[](int j) const {
    return static_cast<float>(__ushort_as_half(static_cast<unsigned short>(pair[j / 2] >> 16 * (j % 2))));
  }
};

// Bytes of a mask, four to a register.
template <>
struct alignas(4) Vector<uint8_t, 4> {
  uint32_t word;
  __device__ __forceinline__ float operator[](int j) const {
    return static_cast<float>(word >> 8 * j & 0xffu);
  }
};
template <>
struct alignas(8) Vector<uint8_t, 8> {
  uint32_t word[2];
  __device__ __forceinline__ float operator[](int j) const {
    return static_cast<float>(word[j / 4] >> 8 * (j % 4) & 0xffu);
  }
};

template <int V, class T>
__device__ __forceinline__ Vector<T, V> load(const T* from) {
  return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <class T>
__device__ __forceinline__ T rounded(float x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half rounded(float x) {
  return __float2half_rn(x);
}

template <>
__device__ __forceinline__ uint8_t rounded(float x) {
  return x != 0.0f;
}

template <int V, class T>
__device__ __forceinline__ void store(T* to, const float (&value)[V]) {
  struct alignas(V * sizeof(T)) Packed {
    T value[V];
  } packed;
#pragma unroll
  for (int j = 0; j < V; ++j) packed.value[j] = rounded<T>(value[j]);
  *reinterpret_cast<Packed*>(to) = packed;
}

// As torch's ReLU: NaN passes.
__device__ __forceinline__ float relu(float v) { return v <= 0.0f ? 0.0f : v; }
__device__ __forceinline__ float relu_backward(float grad, float y) { return y <= 0.0f ? 0.0f : grad; }

// act(z) and its derivative, of activations other than the ReLU.
struct Activated {
  float y, slope;
};
__device__ __forceinline__ Activated activated(float z, int32_t activation) {
  if (activation == kSilu) {
    const float s = 1.0f / (1.0f + expf(-z));
    return {z * s, s * (1.0f + z * (1.0f - s))};
  }
  if (activation == kGelu) {
    const float distribution = 0.5f * erfcf(z * -0.707106781f);
    return {z * distribution, distribution + z * (expf(-0.5f * z * z) * 0.398942280f)};
  }
  const float slope = z > 0.0f ? 1.0f : 0.01f;
  return {z * slope, slope};
}

// The gradient of the activation's input. The ReLU: grad where y is not <= 0 or relu_mask is 1, else 0; at
// most one of y and relu_mask is not null, and without both it is grad. kSlope: another activation, whose
// slope is stored in y.
template <class T, bool kSlope>
struct ActivationBackward {
  const T *grad, *y;
  const uint8_t* relu_mask;

  template <int V>
  struct Inputs {
    Vector<T, V> grad, y;
    Vector<uint8_t, V> relu_mask;
  };

  template <int V>
  __device__ __forceinline__ Inputs<V> read(int64_t i) const {
    Inputs<V> in;
    in.grad = load<V>(grad + i);
    if (kSlope || y != nullptr) in.y = load<V>(y + i);
    if (!kSlope && relu_mask != nullptr) in.relu_mask = load<V>(relu_mask + i);
    return in;
  }

  template <int V>
  __device__ __forceinline__ float at(const Inputs<V>& in, int j) const {
    const float g = in.grad[j];
    if (kSlope) return g * in.y[j];
    if (y != nullptr) return relu_backward(g, in.y[j]);
    if (relu_mask != nullptr) return relu_backward(g, in.relu_mask[j]);
    return g;
  }
};

// V entries of a [B, C] table; where V > 1, the first one is aligned to 16 bytes.
template <int V>
__device__ __forceinline__ void load_entries(const float* from, float (&entries)[V]) {
  constexpr int kAtOnce = V % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int j = 0; j < V; j += kAtOnce) {
    const Vector<float, kAtOnce> some = load<kAtOnce>(from + j);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) entries[j + k] = some[k];
  }
}

// --- sums, always in the same order

// Over `width` neighboring lanes, a power of two; all lanes of the warp take part and get their group's sum.
__device__ __forceinline__ float lane_sum(float value, int width) {
  for (int step = width / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Over the block, which all its threads get.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float of_warp[kThreads / kWarp];
  value = lane_sum(value, kWarp);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += of_warp[warp];
  __syncthreads();  // before the next sum overwrites it
  return sum;
}

// Over threadIdx.y, for each threadIdx.x and each of V values; all threads get it. blockDim.y is a power of
// two.
template <int V>
__device__ __forceinline__ void column_sums(float (&value)[V]) {
  __shared__ float shared[V][kThreads];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int v = 0; v < V; ++v) shared[v][thread] = value[v];
  __syncthreads();
  for (int rows = blockDim.y / 2; rows > 0; rows /= 2) {
    if (threadIdx.y < rows) {
#pragma unroll
      for (int v = 0; v < V; ++v) shared[v][thread] += shared[v][thread + rows * blockDim.x];
    }
    __syncthreads();
  }
#pragma unroll
  for (int v = 0; v < V; ++v) value[v] = shared[v][threadIdx.x];
  __syncthreads();
}

// --- launches

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // along x; 65535 along y

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int64_t blocks_y, dim3 threads,
                   void* stream, Arguments... arguments) {
  if (blocks == 0 || blocks_y == 0) return nullptr;
  if (blocks > kMaxBlocks || blocks_y > 65535) return "the tensor is too large for one launch";
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(blocks_y));
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears the error, which the next call would report
  return cudaGetErrorString(error);
}

// Calls body(T{}) for the images' dtype T.
template <class Body>
const char* for_dtype(const Images& images, Body body) {
  switch (images.dtype) {
    case kFloat32:
      return body(float{});
    case kBFloat16:
      return body(__nv_bfloat16{});
    case kFloat16:
      return body(__half{});
  }
  return "the CUDA kernels take float32, bfloat16 and float16";
}

}  // namespace awnet::cuda
