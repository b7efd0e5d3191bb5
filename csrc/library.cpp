// Registers the operators with torch, once for all devices.
#include <torch/library.h>

#include "ops.h"

TORCH_LIBRARY_FRAGMENT(awnet, m) {
  m.def("statistics(Tensor u) -> (Tensor mean, Tensor m2)");
  m.def("apply(Tensor u, Tensor scale, Tensor shift, Tensor? residual, bool relu) -> Tensor");
  m.def("reduce(Tensor grad, Tensor u, Tensor centre, Tensor? y) -> (Tensor g1, Tensor gc)");
  m.def(
      "propagate(Tensor grad, Tensor u, Tensor centre, Tensor? y, Tensor by_grad, Tensor? by_input, "
      "Tensor? constant, bool residual) -> (Tensor d_u, Tensor d_residual)");
  m.def(
      "testing_coefficients(Tensor? omega, Tensor weight, Tensor bias, Tensor mean, Tensor var, Tensor? "
      "p_clean, "
      "float eps, int batch) -> (Tensor scale, Tensor shift)");
  m.def(
      "testing_gradients(Tensor g1, Tensor gc, Tensor centre, Tensor? omega, Tensor weight, Tensor bias, "
      "Tensor mean, "
      "Tensor var, Tensor? p_clean, float eps) -> (Tensor d_omega, Tensor d_p, Tensor d_weight, Tensor "
      "d_bias)");
  m.def(
      "batch_statistics(Tensor mean, Tensor m2, int hw, Tensor? omega, Tensor? is_clean, int rows) -> "
      "(Tensor batch_mean, Tensor batch_var, Tensor n)");
  m.def(
      "training_coefficients(Tensor? omega, Tensor weight, Tensor bias, Tensor batch_mean, Tensor batch_var, "
      "Tensor? is_clean, float eps, int batch) -> (Tensor scale, Tensor shift)");
  m.def(
      "training_gradients(Tensor g1, Tensor gc, Tensor mean, Tensor m2, int hw, Tensor? omega, Tensor "
      "weight, "
      "Tensor batch_mean, Tensor batch_var, Tensor n, Tensor? is_clean, float eps) -> (Tensor d_omega, "
      "Tensor d_weight, Tensor d_bias, Tensor by_grad, Tensor by_input, Tensor constant)");
}

#define AWNET_IMPLEMENT(space)                                    \
  m.impl("statistics", &space::statistics);                       \
  m.impl("apply", &space::apply);                                 \
  m.impl("reduce", &space::reduce);                               \
  m.impl("propagate", &space::propagate);                         \
  m.impl("testing_coefficients", &space::testing_coefficients);   \
  m.impl("testing_gradients", &space::testing_gradients);         \
  m.impl("batch_statistics", &space::batch_statistics);           \
  m.impl("training_coefficients", &space::training_coefficients); \
  m.impl("training_gradients", &space::training_gradients);

TORCH_LIBRARY_IMPL(awnet, CPU, m){AWNET_IMPLEMENT(awnet::cpu)}
#if defined(AWNET_CUDA)
TORCH_LIBRARY_IMPL(awnet, CUDA, m) {
  AWNET_IMPLEMENT(awnet::cuda)
}
#endif
