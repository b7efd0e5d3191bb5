// y = act(u * scale + shift + residual), and relu_mask, 1 where y is not <= 0, or the slope of another
// activation
#include "elementwise.h"

namespace awnet::cuda {
namespace {

template <class T>
struct Apply {
  using Value = T;
  static constexpr int kUnroll = 2;

  T* y;
  uint8_t* relu_mask;  // may be null
  const T *u, *residual;
  const float *scale, *shift;
  bool has_relu;

  template <int V>
  struct Inputs {
    Vector<T, V> u, residual;
  };
  template <int V>
  struct Coefficients {
    float scale[V], shift[V];
    __device__ __forceinline__ Coefficients<1> at(int j) const { return {{scale[j]}, {shift[j]}}; }
  };

  template <int V>
  __device__ __forceinline__ Inputs<V> read(int64_t i) const {
    Inputs<V> in;
    in.u = load<V>(u + i);
    if (residual != nullptr) in.residual = load<V>(residual + i);
    return in;
  }

  template <int V>
  __device__ __forceinline__ Coefficients<V> coefficients(int64_t entry) const {
    Coefficients<V> c;
    load_entries(scale + entry, c.scale);
    load_entries(shift + entry, c.shift);
    return c;
  }

  template <int V, class Of>
  __device__ __forceinline__ void write(int64_t i, const Inputs<V>& in, Of&& of) const {
    float out[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Coefficients<1> c = of(j);
      float v = fmaf(in.u[j], c.scale[0], c.shift[0]);  // eval_backward.cu computes the same bits
      if (residual != nullptr) v += in.residual[j];
      out[j] = has_relu ? relu(v) : v;
    }
    store(y + i, out);
    if (relu_mask != nullptr) {  // of y as it is stored
#pragma unroll
      for (int j = 0; j < V; ++j) out[j] = static_cast<float>(rounded<T>(out[j])) <= 0.0f ? 0.0f : 1.0f;
      store(relu_mask + i, out);
    }
  }
};

// Of an activation other than the ReLU.
template <class T>
struct Activate : Apply<T> {
  T* slope;  // may be null
  int32_t activation;

  template <int V, class Of>
  __device__ __forceinline__ void write(int64_t i, const typename Apply<T>::template Inputs<V>& in,
                                        Of&& of) const {
    float out[V], slopes[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const auto c = of(j);
      float z = fmaf(in.u[j], c.scale[0], c.shift[0]);
      if (this->residual != nullptr) z += in.residual[j];
      const Activated a = activated(z, activation);
      out[j] = a.y;
      slopes[j] = a.slope;
    }
    store(this->y + i, out);
    if (slope != nullptr) store(slope + i, slopes);
  }
};

}  // namespace

extern "C" const char* awnet_cuda_apply(const Images* images, void* y, void* mask, const void* u,
                                        const void* residual, const float* scale, const float* shift,
                                        int32_t activation, void* stream) {
  return for_dtype(*images, [&](auto tag) {
    using T = decltype(tag);
    const Apply<T> op{static_cast<T*>(y),
                      activation == kRelu ? static_cast<uint8_t*>(mask) : nullptr,
                      static_cast<const T*>(u),
                      static_cast<const T*>(residual),
                      scale,
                      shift,
                      activation == kRelu};
    if (activation > kRelu) {
      return over_images(*images, Activate<T>{op, static_cast<T*>(mask), activation}, stream);
    }
    return over_images(*images, op, stream);
  });
}

}  // namespace awnet::cuda
