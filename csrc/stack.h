// Operators in torch's boxed form: arguments are read from a stack in the order of the schema.
#pragma once

#include <ATen/core/stack.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "ops.h"

namespace awnet {

using torch::jit::Stack;

// The argument of a schema that selects the branch: &Mix::p_clean in eval mode, &Mix::is_clean in train mode.
using Condition = MaybeTensor Mix::*;

class Arguments {
 public:
  // The last `count` values of the stack, which stay there.
  Arguments(const Stack& stack, size_t count, Condition condition = nullptr)
      : values_(torch::jit::last(stack, count)), condition_(condition) {}

  // Reads the next arguments; of a record its fields.
  template <class First, class Second, class... Rest>
  void read(First& first, Second& second, Rest&... rest) {
    read(first);
    read(second, rest...);
  }
  void read(Tensor& x) { x = next().toTensor(); }
  void read(MaybeTensor& x) {
    const c10::IValue& value = next();
    x = value.isNone() ? std::nullopt : MaybeTensor(value.toTensor());
  }
  void read(bool& x) { x = next().toBool(); }
  void read(int64_t& x) { x = next().toInt(); }
  void read(double& x) { x = next().toDouble(); }
  void read(std::string& x) { x = next().toStringRef(); }
  void read(std::vector<int64_t>& x) { x = next().toIntVector(); }
  void read(c10::List<bool>& x) { x = next().toBoolList(); }
  // height and width; the schema's int[2] does not limit a list
  void read(std::array<int64_t, 2>& x) {
    const auto values = next().toDimVector();
    TORCH_CHECK(values.size() == 2, "expected 2 sizes, got ", values.size(), ": ", at::IntArrayRef(values));
    x = {values[0], values[1]};
  }
  void read(Conv& conv) { read(conv.stride, conv.padding, conv.dilation); }
  void read(Mix& mix) { read(mix.filter_scale, mix.*condition_); }
  void read(MixNorm& norm) { read(norm.weight, norm.bias, norm.mean, norm.var, norm.eps); }
  void read(SampleStats& stats) { read(stats.mean, stats.m2, stats.hw); }
  void read(Reduced& sums) { read(sums.g1, sums.gc, sums.center); }
  void read(Propagation& by) { read(by.by_grad, by.by_input, by.constant); }

 private:
  const c10::IValue& next() { return values_[position_++]; }

  c10::ArrayRef<c10::IValue> values_;
  size_t position_ = 0;
  Condition condition_;
};

// Puts the outputs in place of `count` arguments.
template <class... Outputs>
void return_outputs(Stack& stack, size_t count, Outputs&&... outputs) {
  torch::jit::drop(stack, count);
  torch::jit::push(stack, std::forward<Outputs>(outputs)...);
}

template <class... Outputs>
std::tuple<Outputs...> as_tuple(const std::tuple<Outputs...>& outputs) {
  return outputs;
}
template <class Output>
std::tuple<Output> as_tuple(const Output& output) {
  return {output};
}

// Calls a function with the next arguments. Its parameters are types that Arguments reads.
template <class Result, class... Parameters>
Result call(Result (*function)(Parameters...), Arguments& in) {
  std::tuple<std::decay_t<Parameters>...> arguments;
  std::apply([&](auto&... x) { in.read(x...); }, arguments);
  return std::apply(function, arguments);
}

// A boxed operator from such a function, which returns a tuple or a single value.
template <auto function, Condition condition = nullptr>
void boxed(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  Arguments in(*stack, count, condition);
  std::apply([&](const auto&... x) { return_outputs(*stack, count, x...); }, as_tuple(call(function, in)));
}

template <auto function, Condition condition = nullptr>
torch::CppFunction boxed_function() {
  return torch::CppFunction::makeFromBoxedFunction<&boxed<function, condition>>();
}

}  // namespace awnet
