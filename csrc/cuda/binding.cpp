// The operators on CUDA tensors: checks, memory and the current stream; the kernels are behind launch.h. It
// needs neither CUDA's headers nor a torch that was built with CUDA.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdint>
#include <vector>

#include "../ops.h"
#include "launch.h"

namespace awnet::cuda {
namespace {

// Makes a tensor's device the current one while it lives, and knows its current stream.
class On {
 public:
  explicit On(const Tensor& x) : device_(x.device()), guard_(device_) {
    TORCH_CHECK(x.is_cuda(), "the CUDA kernels need a tensor on a CUDA device, got one on ", device_);
    stream_ = c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).native_handle();
  }

  void* stream() const { return stream_; }

  void check(const Tensor& x, const char* name) const {
    TORCH_CHECK(x.device() == device_, name, " must be on ", device_, ", got ", x.device());
  }

  const float* floats(const Tensor& x, at::IntArrayRef shape, const char* name) const {
    check(x, name);
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.sizes() == shape, name,
                " must be contiguous float32 ", shape, ", got ", x.scalar_type(), " ", x.sizes());
    return x.const_data_ptr<float>();
  }
  const float* floats(const MaybeTensor& x, at::IntArrayRef shape, const char* name) const {
    return x ? floats(*x, shape, name) : nullptr;
  }
  const bool* bools(const MaybeTensor& x, int64_t batch) const {
    if (!x) return nullptr;
    check(*x, "is_clean");
    TORCH_CHECK(x->scalar_type() == at::kBool && x->is_contiguous() && x->dim() == 1 && x->size(0) == batch,
                "is_clean must be contiguous bool [", batch, "], got ", x->scalar_type(), " ", x->sizes());
    return x->const_data_ptr<bool>();
  }

 private:
  c10::Device device_;
  c10::DeviceGuard guard_;
  void* stream_ = nullptr;
};

void succeed(const char* error, const char* op) {
  TORCH_CHECK(error == nullptr, "awnet::", op, " failed on the GPU: ", error);
}

float* data(const Tensor& x) { return x.data_ptr<float>(); }

// An output that is empty if it is not required; the kernels then get null.
Tensor new_if(bool needed, at::IntArrayRef shape, const Tensor& like) {
  return at::empty(needed ? shape : at::IntArrayRef({0}), like.options());
}
float* data_if(const Tensor& x) { return x.dim() == 1 && x.size(0) == 0 ? nullptr : data(x); }

// --- images

class Batch {
 public:
  Batch(const Tensor& u, const On& on) : on_(on) {
    TORCH_CHECK(u.dim() == 4, "u must have 4 dimensions, got ", u.dim());
    const bool last = !u.is_contiguous() && u.is_contiguous(at::MemoryFormat::ChannelsLast);
    format_ = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    dtype_ = u.scalar_type();
    shape_ = u.sizes().vec();
    images_.channels_last = last;
    images_.aligned = true;
    images_.batch = u.size(0);
    images_.channels = u.size(1);
    images_.pixels = u.size(2) * u.size(3);
    switch (dtype_) {
      case at::kFloat:
        images_.dtype = kFloat32;
        break;
      case at::kBFloat16:
        images_.dtype = kBFloat16;
        break;
      case at::kHalf:
        images_.dtype = kFloat16;
        break;
      default:
        TORCH_CHECK_TYPE(false, "the CUDA kernels take float32, bfloat16 and float16, got ", dtype_);
    }
  }

  int64_t batch() const { return images_.batch; }
  int64_t channels() const { return images_.channels; }

  Tensor image(const Tensor& x, const char* name) { return image(x, name, dtype_); }
  Tensor relu_mask(const MaybeTensor& x) {
    if (!x) return Tensor();
    return image(*x, "relu_mask", x->scalar_type() == at::kBool ? at::kBool : dtype_);
  }
  Tensor image(const MaybeTensor& x, const char* name) { return x ? image(*x, name) : Tensor(); }

  Tensor table(const Tensor& x, const char* name) {
    on_.check(x, name);
    TORCH_CHECK(
        x.dim() == 2 && x.size(0) == batch() && x.size(1) == channels() && x.scalar_type() == at::kFloat,
        name, " must be float32 [", batch(), ", ", channels(), "], got ", x.scalar_type(), " ", x.sizes());
    return seen(x.contiguous());
  }
  Tensor table(const MaybeTensor& x, const char* name) { return x ? table(*x, name) : Tensor(); }

  Tensor new_image(const Tensor& like) { return seen(at::empty_like(like, like.options(), format_)); }
  // Of a ReLU, or the slope of another activation; empty unless `needed`.
  Tensor new_mask(const Tensor& like, int64_t activation, bool needed) {
    const bool has_slope = needed && activation > kRelu;
    const auto options = has_slope ? like.options() : like.options().dtype(at::kBool);
    return needed ? seen(at::empty_like(like, options, format_)) : at::empty({0}, options);
  }
  Tensor new_table(const Tensor& like) {
    return at::empty({batch(), channels()}, like.options().dtype(at::kFloat));
  }

  // To be called after all tensors of the call were seen.
  const Images* images() const { return &images_; }
  Tensor workspace(const Tensor& like) const {
    return at::empty({awnet_cuda_workspace(&images_)}, like.options().dtype(at::kFloat));
  }

 private:
  Tensor image(const Tensor& x, const char* name, at::ScalarType dtype) {
    on_.check(x, name);
    TORCH_CHECK(x.sizes() == shape_, name, " must have u's shape ", shape_, ", got ", x.sizes());
    TORCH_CHECK(x.scalar_type() == dtype, name, " must have dtype ", dtype, ", got ", x.scalar_type());
    return seen(x.contiguous(format_));
  }

  Tensor seen(const Tensor& x) {
    if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 != 0) images_.aligned = false;
    return x;
  }

  const On& on_;
  at::MemoryFormat format_;
  at::ScalarType dtype_;
  std::vector<int64_t> shape_;
  Images images_;
};

bool is_mask(const Tensor& x) { return x.defined() && x.scalar_type() == at::kBool && x.numel() > 0; }
uint8_t* mask_of(const Tensor& x) { return is_mask(x) ? static_cast<uint8_t*>(x.data_ptr()) : nullptr; }
const void* y_of(const Tensor& x) { return x.defined() && !is_mask(x) ? x.const_data_ptr() : nullptr; }
const void* address(const Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }
SavedActivationPointers pointers(const Tensor& relu_mask, const Tensor& slope) {
  return {y_of(relu_mask), mask_of(relu_mask), address(slope)};
}
const float* entries(const Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }

// --- batch norms

NormPointers pointers(const On& on, const MixNorm& norm) {
  const Tensor &weight = norm.weight, &mean = norm.mean;
  for (const Tensor* x : {&weight, &mean}) {
    TORCH_CHECK(x->dim() == 2 && (x->size(0) == 1 || x->size(0) == 2),
                "a batch norm's tables must have 1 or 2 rows, got shape ", x->sizes());
  }
  const int64_t affine_rows = weight.size(0), stat_rows = mean.size(0), channels = weight.size(1);
  NormPointers p;
  p.weight = on.floats(weight, {affine_rows, channels}, "weight");
  p.bias = norm.bias.defined() ? on.floats(norm.bias, {affine_rows, channels}, "bias") : nullptr;
  p.mean = on.floats(mean, {stat_rows, channels}, "mean");
  p.var = on.floats(norm.var, {stat_rows, channels}, "var");
  p.affine_rows = static_cast<int32_t>(affine_rows);
  p.stat_rows = static_cast<int32_t>(stat_rows);
  p.eps = static_cast<float>(norm.eps);
  return p;
}

bool two_branches(const NormPointers& norm) { return norm.affine_rows == 2 || norm.stat_rows == 2; }

using Table = std::array<int64_t, 2>;  // its shape

MixPointers pointers(const On& on, const Mix& mix, Table table) {
  return {on.floats(mix.filter_scale, table, "filter_scale"), on.floats(mix.p_clean, {table[0]}, "p_clean"),
          on.bools(mix.is_clean, table[0])};
}

SumsPointers pointers(const On& on, const Reduced& sums, Table table) {
  return {on.floats(sums.g1, table, "g1"), on.floats(sums.gc, table, "gc"),
          on.floats(sums.center, table, "center")};
}

StatsPointers pointers(const On& on, const SampleStats& stats, Table table) {
  return {on.floats(stats.mean, table, "mean"), on.floats(stats.m2, table, "m2"), stats.hw};
}

}  // namespace

std::tuple<Tensor, Tensor> statistics(const Tensor& u_in) {
  const On on(u_in);
  Batch batch(u_in, on);
  const Tensor u = batch.image(u_in, "u");
  Tensor mean = batch.new_table(u), m2 = batch.new_table(u), workspace = batch.workspace(u);
  succeed(
      awnet_cuda_statistics(batch.images(), address(u), data(mean), data(m2), data(workspace), on.stream()),
      "statistics");
  return {mean, m2};
}

std::tuple<Tensor, Tensor> apply(const Tensor& u_in, const Tensor& scale_in, const Tensor& shift_in,
                                 const MaybeTensor& residual_in, int64_t activation, bool keep_mask,
                                 bool in_place) {
  const On on(u_in);
  Batch batch(u_in, on);
  const Tensor u = batch.image(u_in, "u"), residual = batch.image(residual_in, "residual");
  const Tensor scale = batch.table(scale_in, "scale"), shift = batch.table(shift_in, "shift");
  TORCH_CHECK(activation >= kNone && activation <= kLeakyRelu, "there is no activation ", activation);
  TORCH_CHECK(activation != kNone || !keep_mask, "there is no mask without an activation");
  const Tensor y = in_place ? u : batch.new_image(u), mask = batch.new_mask(u, activation, keep_mask);
  succeed(awnet_cuda_apply(batch.images(), y.data_ptr(), keep_mask ? mask.data_ptr() : nullptr, address(u),
                           address(residual), entries(scale), entries(shift),
                           static_cast<int32_t>(activation), on.stream()),
          "apply");
  return {y, mask};
}

std::tuple<Tensor, Tensor> reduce(const Tensor& grad_in, const Tensor& u_in, const Tensor& center_in,
                                  const MaybeTensor& relu_mask_in, const MaybeTensor& slope_in) {
  const On on(u_in);
  Batch batch(u_in, on);
  const Tensor u = batch.image(u_in, "u"), grad = batch.image(grad_in, "grad"),
               relu_mask = batch.relu_mask(relu_mask_in), slope = batch.image(slope_in, "slope");
  const Tensor center = batch.table(center_in, "center");
  Tensor g1 = batch.new_table(u), gc = batch.new_table(u), workspace = batch.workspace(u);
  const SavedActivationPointers saved = pointers(relu_mask, slope);
  succeed(awnet_cuda_reduce(batch.images(), address(grad), address(u), &saved, entries(center), data(g1),
                            data(gc), data(workspace), on.stream()),
          "reduce");
  return {g1, gc};
}

std::tuple<Tensor, Tensor> propagate(const Tensor& grad_in, const MaybeTensor& u_in,
                                     const MaybeTensor& center_in, const MaybeTensor& relu_mask_in,
                                     const Propagation& propagation, bool residual,
                                     const MaybeTensor& slope_in) {
  const MaybeTensor &by_input_in = propagation.by_input, &constant_in = propagation.constant;
  const On on(grad_in);
  Batch batch(grad_in, on);
  TORCH_CHECK(by_input_in.has_value() == constant_in.has_value(), "by_input and constant come together");
  TORCH_CHECK(!by_input_in || (u_in && center_in), "by_input needs u and center");
  const MaybeTensor none;
  const Tensor grad = batch.image(grad_in, "grad"), u = batch.image(by_input_in ? u_in : none, "u");
  const Tensor relu_mask = batch.relu_mask(relu_mask_in), slope = batch.image(slope_in, "slope"),
               by_grad = batch.table(propagation.by_grad, "by_grad");
  const Tensor center = batch.table(by_input_in ? center_in : none, "center");
  const Tensor by_input = batch.table(by_input_in, "by_input"),
               constant = batch.table(constant_in, "constant");
  Tensor d_u = batch.new_image(grad);
  Tensor d_residual = residual ? batch.new_image(grad) : at::empty({0}, grad.options());
  const PropagationPointers by{entries(center), entries(by_grad), entries(by_input), entries(constant)};
  const SavedActivationPointers saved = pointers(relu_mask, slope);
  succeed(awnet_cuda_propagate(batch.images(), d_u.data_ptr(), residual ? d_residual.data_ptr() : nullptr,
                               address(grad), address(u), &saved, &by, on.stream()),
          "propagate");
  return {d_u, d_residual};
}

EvalBackwardOutputs eval_backward(const EvalBackwardArgs& args) {
  const On on(args.grad);
  Batch batch(args.grad, on);
  const Tensor grad = batch.image(args.grad, "grad"), other = batch.image(args.other_grad, "other_grad"),
               u = batch.image(args.u, "u"), relu_mask = batch.relu_mask(args.relu_mask),
               slope = batch.image(args.slope, "slope");
  const Tensor scale = batch.table(args.scale, "scale"), shift = batch.table(args.shift, "shift"),
               d_mean = batch.table(args.d_mean, "d_mean");
  TORCH_CHECK(u.defined() || !(args.sums || shift.defined()), "the sums and the mask from u need u");
  EvalBackwardOutputs out;
  out.d_u = batch.new_image(grad);
  if (args.residual) out.d_residual = batch.new_image(grad);
  EvalBackwardPointers p{};
  p.grad = address(grad);
  p.other_grad = address(other);
  p.u = address(u);
  p.saved = pointers(relu_mask, slope);
  p.d_mean = entries(d_mean);
  p.scale = entries(scale);
  p.shift = entries(shift);
  p.d_u = out.d_u.data_ptr();
  p.d_residual = args.residual ? out.d_residual.data_ptr() : nullptr;
  Tensor workspace, tickets;
  if (args.sums) {
    out.sums.g1 = batch.new_table(grad);
    out.sums.gc = batch.new_table(grad);
    p.g1 = data(out.sums.g1);
    p.gc = data(out.sums.gc);
    if (args.centered) {
      out.sums.center = batch.new_table(grad);
      p.center = data(out.sums.center);
    }
    workspace = batch.workspace(grad);
    p.workspace = data(workspace);
    if (workspace.numel() > 0) {
      tickets = at::zeros({batch.batch(), batch.channels()}, grad.options().dtype(at::kInt));
      p.tickets = tickets.data_ptr<int32_t>();
    }
  }
  succeed(awnet_cuda_eval_backward(batch.images(), &p, on.stream()), "eval_backward");
  return out;
}

std::tuple<Tensor, Tensor> eval_coefficients(const Mix& mix, const MixNorm& of, int64_t batch) {
  const Tensor& weight = of.weight;
  const On on(weight);
  const NormPointers norm = pointers(on, of);
  const int64_t channels = weight.size(1);
  const MixPointers mixed = pointers(on, mix, {batch, channels});
  TORCH_CHECK(!two_branches(norm) || mixed.p_clean != nullptr, "two branches need p_clean");
  Tensor scale = at::empty({batch, channels}, weight.options()), shift = at::empty_like(scale);
  succeed(awnet_cuda_eval_coefficients(&norm, batch, channels, &mixed, data(scale), data(shift), on.stream()),
          "eval_coefficients");
  return {scale, shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> eval_gradients(const Reduced& sums, const Mix& mix,
                                                          const MixNorm& of, const Needs& needs) {
  const Tensor& weight = of.weight;
  const On on(weight);
  const NormPointers norm = pointers(on, of);
  const int64_t batch = sums.g1.size(0), channels = weight.size(1);
  const Table table{batch, channels};
  const SumsPointers reduced = pointers(on, sums, table);
  const MixPointers mixed = pointers(on, mix, table);
  TORCH_CHECK(!two_branches(norm) || mixed.p_clean != nullptr, "two branches need p_clean");
  const bool need_tables = needs.bn_weight || needs.bn_bias;
  Tensor d_filter_scale = new_if(needs.filter_scale, table, weight),
         d_p_clean = new_if(needs.p_clean, {batch}, weight);
  Tensor d_weight = new_if(need_tables, weight.sizes(), weight),
         d_bias = new_if(need_tables, weight.sizes(), weight);
  const EvalGradientsPointers grads{data_if(d_filter_scale), data_if(d_p_clean), data_if(d_weight),
                                    data_if(d_bias)};
  succeed(awnet_cuda_eval_gradients(&norm, batch, channels, &reduced, &mixed, &grads, on.stream()),
          "eval_gradients");
  return {d_filter_scale, d_p_clean, d_weight, d_bias};
}

std::tuple<Tensor, Tensor, Tensor> batch_statistics(const SampleStats& stats, const Mix& mix,
                                                    int64_t stat_rows) {
  const Tensor& mean = stats.mean;
  const On on(mean);
  const int64_t batch = mean.size(0), channels = mean.size(1);
  const StatsPointers samples = pointers(on, stats, {batch, channels});
  const MixPointers mixed = pointers(on, mix, {batch, channels});
  TORCH_CHECK(stat_rows == 1 || (stat_rows == 2 && mixed.is_clean != nullptr),
              "two rows of statistics need is_clean");
  Tensor batch_mean = at::empty({stat_rows, channels}, mean.options()),
         batch_var = at::empty_like(batch_mean), n = at::empty({stat_rows}, mean.options());
  succeed(awnet_cuda_batch_statistics(batch, channels, static_cast<int32_t>(stat_rows), &samples, &mixed,
                                      data(batch_mean), data(batch_var), data(n), on.stream()),
          "batch_statistics");
  return {batch_mean, batch_var, n};
}

std::tuple<Tensor, Tensor> train_coefficients(const Mix& mix, const MixNorm& of, int64_t batch) {
  const Tensor& weight = of.weight;
  const On on(weight);
  const NormPointers norm = pointers(on, of);
  const int64_t channels = weight.size(1);
  const MixPointers mixed = pointers(on, mix, {batch, channels});
  TORCH_CHECK(!two_branches(norm) || mixed.is_clean != nullptr, "two branches need is_clean");
  Tensor scale = at::empty({batch, channels}, weight.options()), shift = at::empty_like(scale);
  succeed(
      awnet_cuda_train_coefficients(&norm, batch, channels, &mixed, data(scale), data(shift), on.stream()),
      "train_coefficients");
  return {scale, shift};
}

std::tuple<Tensor, Tensor, Tensor> train_sums(const Reduced& sums, const Mix& mix, const MixNorm& of) {
  const Tensor& weight = of.weight;
  const On on(weight);
  const NormPointers norm = pointers(on, of);
  const int64_t batch = sums.g1.size(0), channels = weight.size(1);
  const SumsPointers reduced = pointers(on, sums, {batch, channels});
  const MixPointers mixed = pointers(on, mix, {batch, channels});
  TORCH_CHECK(!two_branches(norm) || mixed.is_clean != nullptr, "two branches need is_clean");
  Tensor d_weight = at::empty_like(weight), d_bias = at::empty_like(weight),
         through = at::empty({2, norm.stat_rows, channels}, weight.options());
  succeed(awnet_cuda_train_sums(&norm, batch, channels, &reduced, &mixed, data(d_weight), data(d_bias),
                                data(through), on.stream()),
          "train_sums");
  return {d_weight, d_bias, through};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_gradients(
    const Reduced& sums, const SampleStats& stats, const Mix& mix, const MixNorm& of, const Tensor& n,
    bool need_filter_scale, const MaybeTensor& through) {
  const Tensor& weight = of.weight;
  const On on(weight);
  const NormPointers norm = pointers(on, of);
  const int64_t batch = sums.g1.size(0), channels = weight.size(1);
  const Table table{batch, channels};
  const SumsPointers reduced = pointers(on, sums, table);
  const StatsPointers samples = pointers(on, stats, table);
  const MixPointers mixed = pointers(on, mix, table);
  TORCH_CHECK(!two_branches(norm) || mixed.is_clean != nullptr, "two branches need is_clean");
  Tensor d_filter_scale = new_if(need_filter_scale, table, weight),
         by_grad = at::empty(table, weight.options()), by_input = at::empty_like(by_grad),
         constant = at::empty_like(by_grad);
  Tensor d_weight = new_if(!through, weight.sizes(), weight),
         d_bias = new_if(!through, weight.sizes(), weight);
  const TrainGradientsPointers grads{data_if(d_filter_scale), data_if(d_weight), data_if(d_bias),
                                     data(by_grad),           data(by_input),    data(constant)};
  succeed(awnet_cuda_train_gradients(
              &norm, batch, channels, &reduced, &samples, &mixed, on.floats(n, {norm.stat_rows}, "n"),
              on.floats(through, {2, norm.stat_rows, channels}, "through"), &grads, on.stream()),
          "train_gradients");
  return {d_filter_scale, d_weight, d_bias, by_grad, by_input, constant};
}

}  // namespace awnet::cuda
