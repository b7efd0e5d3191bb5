#include "tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace awnet {

at::Tensor new_tensor(at::IntArrayRef shape, const at::TensorOptions& options) {
  return at::empty(shape, options);
}

at::Tensor new_tensor_like(const at::Tensor& x, const at::TensorOptions& options,
                           std::optional<at::MemoryFormat> format) {
  return at::empty_like(x, options, format);
}

}  // namespace awnet
