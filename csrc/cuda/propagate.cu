// d_u = by_grad * g + by_input * (u - center) + constant and d_residual = g, where g is the
// gradient of the activation's input
#include "elementwise.h"

namespace awnet::cuda {
namespace {

template <class T, bool kSlope>
struct Propagate {
  using Value = T;
  static constexpr int kUnroll = 2;

  T *d_u, *d_residual;
  ActivationBackward<T, kSlope> activation;
  const T* u;
  PropagationPointers by;

  template <int V>
  struct Inputs {
    typename ActivationBackward<T, kSlope>::template Inputs<V> activation;
    Vector<T, V> u;
  };
  template <int V>
  struct Coefficients {
    float by_grad[V], center[V], by_input[V], constant[V];
    __device__ __forceinline__ Coefficients<1> at(int j) const {
      return {{by_grad[j]}, {center[j]}, {by_input[j]}, {constant[j]}};
    }
  };

  template <int V>
  __device__ __forceinline__ Inputs<V> read(int64_t i) const {
    Inputs<V> in;
    in.activation = activation.template read<V>(i);
    if (by.by_input != nullptr) in.u = load<V>(u + i);
    return in;
  }

  template <int V>
  __device__ __forceinline__ Coefficients<V> coefficients(int64_t entry) const {
    Coefficients<V> c = {};
    load_entries(by.by_grad + entry, c.by_grad);
    if (by.by_input != nullptr) {
      load_entries(by.center + entry, c.center);
      load_entries(by.by_input + entry, c.by_input);
      load_entries(by.constant + entry, c.constant);
    }
    return c;
  }

  template <int V, class Of>
  __device__ __forceinline__ void write(int64_t i, const Inputs<V>& in, Of&& of) const {
    float u_grads[V], residual_grads[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Coefficients<1> c = of(j);
      const float g = activation.at(in.activation, j);
      float d = g * c.by_grad[0];
      if (by.by_input != nullptr) d += (in.u[j] - c.center[0]) * c.by_input[0] + c.constant[0];
      u_grads[j] = d;
      residual_grads[j] = g;
    }
    store(d_u + i, u_grads);
    if (d_residual != nullptr) store(d_residual + i, residual_grads);
  }
};

}  // namespace

extern "C" const char* awnet_cuda_propagate(const Images* images, void* d_u, void* d_residual,
                                            const void* grad, const void* u,
                                            const SavedActivationPointers* saved,
                                            const PropagationPointers* propagation, void* stream) {
  return for_dtype(*images, [&](auto tag) {
    using T = decltype(tag);
    const auto run = [&](auto by_slope, const void* values) {
      const Propagate<T, decltype(by_slope)::value> op{
          static_cast<T*>(d_u),
          static_cast<T*>(d_residual),
          {static_cast<const T*>(grad), static_cast<const T*>(values), saved->relu_mask},
          static_cast<const T*>(u),
          *propagation};
      return over_images(*images, op, stream);
    };
    return saved->slope != nullptr ? run(std::true_type{}, saved->slope) : run(std::false_type{}, saved->y);
  });
}

}  // namespace awnet::cuda
