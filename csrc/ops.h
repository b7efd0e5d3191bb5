// The operators that library.cpp registers, by device. awnet/ops/backends/eager.py says what each one does.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace awnet {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

using Needs = std::array<bool, 4>;  // whether omega's, p's, weight's and bias's gradients are asked for

// A gate is y or a bool mask of where the activation passed. Outputs that are not asked for are empty.
#define AWNET_DECLARE_OPS                                                                                    \
  std::tuple<Tensor, Tensor> statistics(const Tensor& u);                                                    \
  std::tuple<Tensor, Tensor> apply(const Tensor& u, const Tensor& scale, const Tensor& shift,                \
                                   const MaybeTensor& residual, bool relu, bool keep_mask, bool in_place);   \
  std::tuple<Tensor, Tensor> reduce(const Tensor& grad, const Tensor& u, const Tensor& centre,               \
                                    const MaybeTensor& gate);                                                \
  std::tuple<Tensor, Tensor> propagate(                                                                      \
      const Tensor& grad, const MaybeTensor& u, const MaybeTensor& centre, const MaybeTensor& gate,          \
      const Tensor& by_grad, const MaybeTensor& by_input, const MaybeTensor& constant, bool residual);       \
  std::tuple<Tensor, Tensor> testing_coefficients(const MaybeTensor& omega, const Tensor& weight,            \
                                                  const Tensor& bias, const Tensor& mean, const Tensor& var, \
                                                  const MaybeTensor& p_clean, double eps, int64_t batch);    \
  std::tuple<Tensor, Tensor, Tensor, Tensor> testing_gradients(                                              \
      const Tensor& g1, const Tensor& gc, const Tensor& centre, const MaybeTensor& omega,                    \
      const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,                       \
      const MaybeTensor& p_clean, double eps, Needs needs);                                                  \
  std::tuple<Tensor, Tensor, Tensor> batch_statistics(const Tensor& mean, const Tensor& m2, int64_t hw,      \
                                                      const MaybeTensor& omega, const MaybeTensor& is_clean, \
                                                      int64_t rows);                                         \
  std::tuple<Tensor, Tensor> training_coefficients(                                                          \
      const MaybeTensor& omega, const Tensor& weight, const Tensor& bias, const Tensor& batch_mean,          \
      const Tensor& batch_var, const MaybeTensor& is_clean, double eps, int64_t batch);                      \
  std::tuple<Tensor, Tensor, Tensor> training_sums(const Tensor& g1, const Tensor& gc, const Tensor& mean,   \
                                                   const MaybeTensor& omega, const Tensor& weight,           \
                                                   const Tensor& batch_mean, const Tensor& batch_var,        \
                                                   const MaybeTensor& is_clean, double eps);                 \
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> training_gradients(                             \
      const Tensor& g1, const Tensor& gc, const Tensor& mean, const Tensor& m2, int64_t hw,                  \
      const MaybeTensor& omega, const Tensor& weight, const Tensor& batch_mean, const Tensor& batch_var,     \
      const Tensor& n, const MaybeTensor& is_clean, double eps, bool need_omega,                             \
      const MaybeTensor& through);

namespace cpu {
AWNET_DECLARE_OPS
const char* instruction_set();  // "avx512", "avx2" or "baseline"
}  // namespace cpu

// where the CUDA part is built, see setup.py
namespace cuda {
AWNET_DECLARE_OPS
}  // namespace cuda

}  // namespace awnet
