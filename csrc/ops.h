// The operators that library.cpp registers, by device. awnet/ops/passes.py says what each one does.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace awnet {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

#define AWNET_DECLARE_OPS                                                                                    \
  std::tuple<Tensor, Tensor> statistics(const Tensor& u);                                                    \
  Tensor apply(const Tensor& u, const Tensor& scale, const Tensor& shift, const MaybeTensor& residual,       \
               bool relu);                                                                                   \
  std::tuple<Tensor, Tensor> reduce(const Tensor& grad, const Tensor& u, const Tensor& centre,               \
                                    const MaybeTensor& y);                                                   \
  std::tuple<Tensor, Tensor> propagate(                                                                      \
      const Tensor& grad, const Tensor& u, const Tensor& centre, const MaybeTensor& y,                       \
      const Tensor& by_grad, const MaybeTensor& by_input, const MaybeTensor& constant, bool residual);       \
  std::tuple<Tensor, Tensor> testing_coefficients(const MaybeTensor& omega, const Tensor& weight,            \
                                                  const Tensor& bias, const Tensor& mean, const Tensor& var, \
                                                  const MaybeTensor& p_clean, double eps, int64_t batch);    \
  std::tuple<Tensor, Tensor, Tensor, Tensor> testing_gradients(                                              \
      const Tensor& g1, const Tensor& gc, const Tensor& centre, const MaybeTensor& omega,                    \
      const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,                       \
      const MaybeTensor& p_clean, double eps);                                                               \
  std::tuple<Tensor, Tensor, Tensor> batch_statistics(const Tensor& mean, const Tensor& m2, int64_t hw,      \
                                                      const MaybeTensor& omega, const MaybeTensor& is_clean, \
                                                      int64_t rows);                                         \
  std::tuple<Tensor, Tensor> training_coefficients(                                                          \
      const MaybeTensor& omega, const Tensor& weight, const Tensor& bias, const Tensor& batch_mean,          \
      const Tensor& batch_var, const MaybeTensor& is_clean, double eps, int64_t batch);                      \
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> training_gradients(                             \
      const Tensor& g1, const Tensor& gc, const Tensor& mean, const Tensor& m2, int64_t hw,                  \
      const MaybeTensor& omega, const Tensor& weight, const Tensor& batch_mean, const Tensor& batch_var,     \
      const Tensor& n, const MaybeTensor& is_clean, double eps);

namespace cpu {
AWNET_DECLARE_OPS
const char* instruction_set();  // "avx512", "avx2" or "baseline"
}  // namespace cpu

// where the CUDA part is built, see setup.py
namespace cuda {
AWNET_DECLARE_OPS
}  // namespace cuda

}  // namespace awnet
