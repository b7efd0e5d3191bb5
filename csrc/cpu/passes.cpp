// The passes over images on CPUs: layouts, threads and the choice of the instruction set.
#include "passes.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "../ops.h"
#include "../tensors.h"

namespace awnet::cpu {
namespace {

const Dtypes& kernels() {
  static const Dtypes* const chosen = [] {
#if defined(__x86_64__)
    if (std::string(instruction_set()) == "avx512") return &avx512::kernels;
    if (std::string(instruction_set()) == "avx2") return &avx2::kernels;
#endif
    return &baseline::kernels;
  }();
  return *chosen;
}

// Values for one thread before another one pays: about 10 microseconds of streaming.
constexpr int64_t kGrain = 16384;
constexpr int64_t kColumns = 64;  // that one thread sums

int64_t grain(int64_t values) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, values)); }

struct Shape {
  at::MemoryFormat format;
  int64_t batch, channels, pixels;

  explicit Shape(const Tensor& u) : batch(u.size(0)), channels(u.size(1)), pixels(u.size(2) * u.size(3)) {
    TORCH_CHECK(u.dim() == 4, "u must have 4 dimensions, got ", u.dim());
    const bool last = !u.is_contiguous() && u.is_contiguous(at::MemoryFormat::ChannelsLast);
    format = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  }

  Tensor image(const Tensor& x, const char* name, at::ScalarType dtype) const {
    TORCH_CHECK(
        x.dim() == 4 && x.size(0) == batch && x.size(1) == channels && x.size(2) * x.size(3) == pixels, name,
        " must have u's shape, got ", x.sizes());
    TORCH_CHECK(x.scalar_type() == dtype, name, " must have dtype ", dtype, ", got ", x.scalar_type());
    return x.contiguous(format);
  }
  Tensor image(const MaybeTensor& x, const char* name, at::ScalarType dtype) const {
    return x ? image(*x, name, dtype) : Tensor();
  }
  Tensor relu_mask(const MaybeTensor& x, at::ScalarType dtype) const {
    return image(x, "relu_mask", x && x->scalar_type() == at::kBool ? at::kBool : dtype);
  }

  Tensor table(const Tensor& x, const char* name) const {
    TORCH_CHECK(x.dim() == 2 && x.size(0) == batch && x.size(1) == channels && x.scalar_type() == at::kFloat,
                name, " must be float32 [", batch, ", ", channels, "], got ", x.scalar_type(), " ",
                x.sizes());
    return x.contiguous();
  }

  // Runs a kernel on all threads. The sums of channels_last images run over whole columns, so that the number
  // of threads changes no bit.
  template <class T, class Args>
  void run(void (*Kernels<T>::*kernel)(const Args&, Extent), const Args& args, bool sums) const {
    if (format == at::MemoryFormat::Contiguous) {
      const auto run_planes = std::get<Layouts<T>>(kernels()).nchw.*kernel;
      at::parallel_for(0, batch * channels, grain(pixels), [&](int64_t first, int64_t last) {
        run_planes(args, {pixels, channels, first, last});
      });
      return;
    }
    const auto run_rows = std::get<Layouts<T>>(kernels()).channels_last.*kernel;
    if (sums) {
      const int64_t blocks = (channels + kColumns - 1) / kColumns;
      at::parallel_for(0, batch * blocks, grain(pixels * kColumns), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / blocks, first = i % blocks * kColumns;
          run_rows(args.from(b * pixels * channels, b * channels),
                   {pixels, channels, first, std::min(channels, first + kColumns)});
        }
      });
      return;
    }
    at::parallel_for(0, batch * pixels, grain(channels), [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t b = begin / pixels, count = std::min(pixels - begin % pixels, end - begin);
        run_rows(args.from(begin * channels, b * channels), {count, channels, 0, channels});
        begin += count;
      }
    });
  }
};

template <class Body>
void for_dtype(at::ScalarType dtype, Body body) {
  switch (dtype) {
    case at::kFloat:
      return body(float{});
    case at::kBFloat16:
      return body(BFloat16{});
    case at::kHalf:
      return body(Float16{});
    default:
      TORCH_CHECK_TYPE(false, "the C++ passes take float32, bfloat16 and float16, got ", dtype);
  }
}

template <class T>
T* data(const Tensor& x) {
  return x.defined() && x.numel() > 0 ? static_cast<T*>(x.data_ptr()) : nullptr;
}

template <class T>
SavedActivation<T> saved_activation(const Tensor& relu_mask, const Tensor& slope) {
  if (slope.defined()) return {nullptr, nullptr, data<T>(slope)};
  if (relu_mask.defined() && relu_mask.scalar_type() == at::kBool) return {nullptr, data<uint8_t>(relu_mask)};
  return {data<T>(relu_mask)};
}

}  // namespace

void check_activation(int64_t activation, bool keep_mask) {
  TORCH_CHECK(activation >= kNone && activation <= kLeakyRelu, "there is no activation ", activation);
  TORCH_CHECK(activation != kNone || !keep_mask, "there is no mask without an activation");
}

const char* instruction_set() {
#if defined(__x86_64__)
  static const char* const isa = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
      return "avx512";
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      return "avx2";
    }
    return "baseline";
  }();
  return isa;
#else
  return "baseline";
#endif
}

const Kernels<float>& float32_kernels() { return std::get<Layouts<float>>(kernels()).nchw; }

std::tuple<Tensor, Tensor> statistics(const Tensor& u_in) {
  const Shape s(u_in);
  const Tensor u = u_in.contiguous(s.format);
  const Tensor mean = new_tensor({s.batch, s.channels}, u.options().dtype(at::kFloat)),
               m2 = new_tensor_like(mean);
  for_dtype(u.scalar_type(), [&](auto value) {
    using T = decltype(value);
    const StatisticsArgs<T> args{data<T>(u), data<float>(mean), data<float>(m2)};
    s.run(&Kernels<T>::statistics, args, true);
  });
  return {mean, m2};
}

std::tuple<Tensor, Tensor> apply(const Tensor& u_in, const Tensor& scale_in, const Tensor& shift_in,
                                 const MaybeTensor& residual_in, int64_t activation, bool keep_mask,
                                 bool in_place) {
  const Shape s(u_in);
  const Tensor u = u_in.contiguous(s.format);
  const Tensor scale = s.table(scale_in, "scale"), shift = s.table(shift_in, "shift"),
               residual = s.image(residual_in, "residual", u.scalar_type());
  check_activation(activation, keep_mask);
  const Tensor y = in_place ? u : new_tensor_like(u, u.options(), s.format);
  const bool has_slope = keep_mask && activation > kRelu;
  const auto options = has_slope ? u.options() : u.options().dtype(at::kBool);
  const Tensor mask = keep_mask ? new_tensor_like(u, options, s.format) : new_tensor({0}, options);
  for_dtype(u.scalar_type(), [&](auto value) {
    using T = decltype(value);
    const ApplyArgs<T> args{data<T>(y),
                            data<T>(u),
                            data<T>(residual),
                            data<float>(scale),
                            data<float>(shift),
                            static_cast<Activation>(activation),
                            has_slope ? nullptr : data<uint8_t>(mask),
                            has_slope ? data<T>(mask) : nullptr};
    s.run(&Kernels<T>::apply, args, false);
  });
  return {y, mask};
}

std::tuple<Tensor, Tensor> reduce(const Tensor& grad_in, const Tensor& u_in, const Tensor& center_in,
                                  const MaybeTensor& relu_mask_in, const MaybeTensor& slope_in) {
  const Shape s(u_in);
  const auto dtype = u_in.scalar_type();
  const Tensor u = u_in.contiguous(s.format), grad = s.image(grad_in, "grad", dtype),
               center = s.table(center_in, "center"), relu_mask = s.relu_mask(relu_mask_in, dtype),
               slope = s.image(slope_in, "slope", dtype);
  const Tensor g1 = new_tensor_like(center), gc = new_tensor_like(center);
  for_dtype(dtype, [&](auto value) {
    using T = decltype(value);
    BackwardArgs<T> args{data<T>(grad), data<T>(u), saved_activation<T>(relu_mask, slope),
                         data<float>(center)};
    args.g1 = data<float>(g1);
    args.gc = data<float>(gc);
    s.run(&Kernels<T>::reduce, args, true);
  });
  return {g1, gc};
}

std::tuple<Tensor, Tensor> propagate(const Tensor& grad_in, const MaybeTensor& u_in,
                                     const MaybeTensor& center_in, const MaybeTensor& relu_mask_in,
                                     const Propagation& propagation, bool residual,
                                     const MaybeTensor& slope_in) {
  const auto &by_input_in = propagation.by_input, &constant_in = propagation.constant;
  const Shape s(grad_in);
  const auto dtype = grad_in.scalar_type();
  const Tensor grad = grad_in.contiguous(s.format), by_grad = s.table(propagation.by_grad, "by_grad"),
               relu_mask = s.relu_mask(relu_mask_in, dtype), slope = s.image(slope_in, "slope", dtype);
  TORCH_CHECK(by_input_in.has_value() == constant_in.has_value(), "by_input and constant come together");
  Tensor u, center, by_input, constant;
  if (by_input_in) {
    TORCH_CHECK(u_in && center_in, "by_input needs u and center");
    u = s.image(*u_in, "u", dtype);
    center = s.table(*center_in, "center");
    by_input = s.table(*by_input_in, "by_input");
    constant = s.table(*constant_in, "constant");
  }
  const Tensor d_u = new_tensor_like(grad, grad.options(), s.format),
               d_residual = residual ? new_tensor_like(d_u) : new_tensor({0}, grad.options());
  for_dtype(dtype, [&](auto value) {
    using T = decltype(value);
    const BackwardArgs<T> args{data<T>(grad),
                               data<T>(u),
                               saved_activation<T>(relu_mask, slope),
                               data<float>(center),
                               data<float>(by_grad),
                               data<float>(by_input),
                               data<float>(constant),
                               data<T>(d_u),
                               data<T>(d_residual),
                               nullptr,
                               nullptr};
    s.run(&Kernels<T>::propagate, args, false);
  });
  return {d_u, d_residual};
}

}  // namespace awnet::cpu
