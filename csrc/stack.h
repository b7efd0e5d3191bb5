// Operators in torch's boxed form: arguments are read from a stack in the order of the schema.
#pragma once

#include <ATen/core/stack.h>
#include <c10/util/Exception.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "ops.h"

namespace awnet {

using torch::jit::Stack;

class Arguments {
 public:
  // The last `count` values of the stack, which stay there.
  Arguments(const Stack& stack, size_t count) : values_(torch::jit::last(stack, count)) {}

  const c10::IValue& next() { return values_[position_++]; }
  const Tensor& tensor() { return next().toTensor(); }
  MaybeTensor maybe_tensor() {
    const c10::IValue& value = next();
    return value.isNone() ? std::nullopt : MaybeTensor(value.toTensor());
  }
  bool flag() { return next().toBool(); }
  int64_t integer() { return next().toInt(); }
  double real() { return next().toDouble(); }
  std::string text() { return next().toStringRef(); }
  std::vector<int64_t> integers() { return next().toIntVector(); }
  // two sizes, height and width; the schema's int[2] does not limit a list
  std::array<int64_t, 2> pair() {
    const auto values = next().toDimVector();
    TORCH_CHECK(values.size() == 2, "expected 2 sizes, got ", values.size(), ": ", at::IntArrayRef(values));
    return {values[0], values[1]};
  }

 private:
  c10::ArrayRef<c10::IValue> values_;
  size_t position_ = 0;
};

// Puts the outputs in place of `count` arguments.
template <class... Outputs>
void return_outputs(Stack& stack, size_t count, Outputs&&... outputs) {
  torch::jit::drop(stack, count);
  torch::jit::push(stack, std::forward<Outputs>(outputs)...);
}

}  // namespace awnet
