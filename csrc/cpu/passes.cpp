// The passes over images on CPUs: layouts, threads and the choice of the instruction set.
#include "passes.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "../ops.h"
#include "../tensors.h"

namespace awnet::cpu {
namespace {

template <class T>
struct Entry;
template <>
struct Entry<float> {
  static constexpr auto pick(const Kernels<float>& f, const Kernels<BFloat16>&, const Kernels<Float16>&) {
    return &f;
  }
};
template <>
struct Entry<BFloat16> {
  static constexpr auto pick(const Kernels<float>&, const Kernels<BFloat16>& b, const Kernels<Float16>&) {
    return &b;
  }
};
template <>
struct Entry<Float16> {
  static constexpr auto pick(const Kernels<float>&, const Kernels<BFloat16>&, const Kernels<Float16>& h) {
    return &h;
  }
};

#define AWNET_PICK(T, isa) Entry<T>::pick(isa::float32_kernels, isa::bfloat16_kernels, isa::float16_kernels)

template <class T>
const Kernels<T>& kernels() {
  static const Kernels<T>* chosen = [] {
#if defined(__x86_64__)
    if (std::string(instruction_set()) == "avx512") return AWNET_PICK(T, avx512);
    if (std::string(instruction_set()) == "avx2") return AWNET_PICK(T, avx2);
#endif
    return AWNET_PICK(T, baseline);
  }();
  return *chosen;
}

// Work for one thread before another one pays: about 10 microseconds of streaming.
constexpr int64_t kGrain = 16384;

struct Shape {
  at::MemoryFormat format;
  int64_t batch, channels, pixels;

  explicit Shape(const at::Tensor& u) : batch(u.size(0)), channels(u.size(1)), pixels(u.size(2) * u.size(3)) {
    TORCH_CHECK(u.dim() == 4, "u must have 4 dimensions, got ", u.dim());
    const bool last = !u.is_contiguous() && u.is_contiguous(at::MemoryFormat::ChannelsLast);
    format = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  }

  bool rows() const { return format == at::MemoryFormat::ChannelsLast; }

  at::Tensor laid_out(const at::Tensor& x, const char* name, at::ScalarType dtype) const {
    TORCH_CHECK(
        x.dim() == 4 && x.size(0) == batch && x.size(1) == channels && x.size(2) * x.size(3) == pixels, name,
        " must have u's shape, got ", x.sizes());
    TORCH_CHECK(x.scalar_type() == dtype, name, " must have dtype ", dtype, ", got ", x.scalar_type());
    return x.contiguous(format);
  }

  at::Tensor relu_mask(const std::optional<at::Tensor>& x, at::ScalarType dtype) const {
    if (!x) return at::Tensor();
    return laid_out(*x, "relu_mask", x->scalar_type() == at::kBool ? at::kBool : dtype);
  }

  at::Tensor slope(const std::optional<at::Tensor>& x, at::ScalarType dtype) const {
    return x ? laid_out(*x, "slope", dtype) : at::Tensor();
  }

  at::Tensor table(const at::Tensor& x, const char* name) const {
    TORCH_CHECK(x.dim() == 2 && x.size(0) == batch && x.size(1) == channels && x.scalar_type() == at::kFloat,
                name, " must be float32 [", batch, ", ", channels, "], got ", x.scalar_type(), " ",
                x.sizes());
    return x.contiguous();
  }
};

// Planes: body(plane index). Rows: body(sample, first pixel or column, one past the last).
template <class Body>
void for_planes(const Shape& s, Body body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, s.pixels));
  at::parallel_for(0, s.batch * s.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) body(plane);
  });
}

template <class Body>
void for_pixels(const Shape& s, Body body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, s.channels));
  at::parallel_for(0, s.batch * s.pixels, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / s.pixels, first = begin % s.pixels;
      const int64_t last = std::min(s.pixels, first + end - begin);
      body(sample, first, last);
      begin += last - first;
    }
  });
}

// Sums run over whole columns, so that the number of threads changes no bit.
template <class Body>
void for_columns(const Shape& s, Body body) {
  constexpr int64_t kColumns = 64;
  const int64_t blocks = (s.channels + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, s.pixels * kColumns));
  at::parallel_for(0, s.batch * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kColumns;
      body(i / blocks, first, std::min(s.channels, first + kColumns));
    }
  });
}

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
T* data(const at::Tensor& x) {
  return x.defined() ? static_cast<T*>(x.data_ptr()) : nullptr;
}

template <class T>
Gate<T> gate_of(const at::Tensor& relu_mask, const at::Tensor& slope) {
  if (slope.defined()) return {nullptr, nullptr, data<T>(slope)};
  if (relu_mask.defined() && relu_mask.scalar_type() == at::kBool) return {nullptr, data<uint8_t>(relu_mask)};
  return {data<T>(relu_mask)};
}

const float* table_data(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }

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

const Kernels<float>& float32_passes() { return kernels<float>(); }

std::tuple<at::Tensor, at::Tensor> statistics(const at::Tensor& u_in) {
  const Shape s(u_in);
  const at::Tensor u = u_in.contiguous(s.format);
  const auto options = u.options().dtype(at::kFloat);
  at::Tensor mean = new_tensor({s.batch, s.channels}, options), m2 = new_tensor_like(mean);
  float *mean_p = data<float>(mean), *m2_p = data<float>(m2);
  for_dtype(u.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* p = data<T>(u);
    if (s.rows()) {
      for_columns(s, [&](int64_t b, int64_t first, int64_t last) {
        kernels<T>().statistics_rows(p + b * s.pixels * s.channels, s.pixels, s.channels, first, last,
                                     mean_p + b * s.channels, m2_p + b * s.channels);
      });
    } else {
      for_planes(s, [&](int64_t i) {
        kernels<T>().statistics_plane(p + i * s.pixels, s.pixels, mean_p + i, m2_p + i);
      });
    }
  });
  return {mean, m2};
}

std::tuple<at::Tensor, at::Tensor> apply(const at::Tensor& u_in, const at::Tensor& scale_in,
                                         const at::Tensor& shift_in,
                                         const std::optional<at::Tensor>& residual_in, int64_t activation,
                                         bool keep_mask, bool in_place) {
  const Shape s(u_in);
  const at::Tensor u = u_in.contiguous(s.format);
  const at::Tensor scale = s.table(scale_in, "scale"), shift = s.table(shift_in, "shift");
  check_activation(activation, keep_mask);
  const bool relu = activation == kRelu, smooth = activation > kRelu;
  at::Tensor residual;
  if (residual_in) residual = s.laid_out(*residual_in, "residual", u.scalar_type());
  const at::Tensor y = in_place ? u : new_tensor_like(u, u.options(), s.format);
  const auto bools = u.options().dtype(at::kBool);
  const at::Tensor mask =
      keep_mask ? new_tensor_like(u, smooth ? u.options() : bools, s.format) : new_tensor({0}, bools);
  const float *scale_p = table_data(scale), *shift_p = table_data(shift);
  uint8_t* mask_p = keep_mask && relu ? data<uint8_t>(mask) : nullptr;
  for_dtype(u.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T *p = data<T>(u), *r = data<T>(residual);
    T* out = data<T>(y);
    if (smooth) {
      const auto act = static_cast<Activation>(activation);
      T* const slope = keep_mask ? data<T>(mask) : nullptr;
      if (s.rows()) {
        for_pixels(s, [&](int64_t b, int64_t first, int64_t last) {
          const int64_t at = (b * s.pixels + first) * s.channels, row = b * s.channels;
          kernels<T>().activate_rows(out + at, slope ? slope + at : nullptr, p + at, r ? r + at : nullptr,
                                     last - first, s.channels, scale_p + row, shift_p + row, act);
        });
      } else {
        for_planes(s, [&](int64_t i) {
          const int64_t at = i * s.pixels;
          kernels<T>().activate_plane(out + at, slope ? slope + at : nullptr, p + at, r ? r + at : nullptr,
                                      s.pixels, scale_p[i], shift_p[i], act);
        });
      }
    } else if (s.rows()) {
      for_pixels(s, [&](int64_t b, int64_t first, int64_t last) {
        const int64_t at = (b * s.pixels + first) * s.channels;
        kernels<T>().apply_rows(out + at, mask_p ? mask_p + at : nullptr, p + at, r ? r + at : nullptr,
                                last - first, s.channels, scale_p + b * s.channels, shift_p + b * s.channels,
                                relu);
      });
    } else {
      for_planes(s, [&](int64_t i) {
        const int64_t at = i * s.pixels;
        kernels<T>().apply_plane(out + at, mask_p ? mask_p + at : nullptr, p + at, r ? r + at : nullptr,
                                 s.pixels, scale_p[i], shift_p[i], relu);
      });
    }
  });
  return {y, mask};
}

std::tuple<at::Tensor, at::Tensor> reduce(const at::Tensor& grad_in, const at::Tensor& u_in,
                                          const at::Tensor& centre_in,
                                          const std::optional<at::Tensor>& relu_mask_in,
                                          const std::optional<at::Tensor>& slope_in) {
  const Shape s(u_in);
  const at::Tensor u = u_in.contiguous(s.format), grad = s.laid_out(grad_in, "grad", u.scalar_type());
  const at::Tensor centre = s.table(centre_in, "centre"),
                   relu_mask = s.relu_mask(relu_mask_in, u.scalar_type()),
                   slope = s.slope(slope_in, u.scalar_type());
  at::Tensor g1 = new_tensor_like(centre), gc = new_tensor_like(centre);
  const float* centre_p = table_data(centre);
  float *g1_p = data<float>(g1), *gc_p = data<float>(gc);
  for_dtype(u.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T *g = data<T>(grad), *p = data<T>(u);
    const Gate<T> gate = gate_of<T>(relu_mask, slope);
    if (s.rows()) {
      for_columns(s, [&](int64_t b, int64_t first, int64_t last) {
        const int64_t at = b * s.pixels * s.channels, row = b * s.channels;
        kernels<T>().reduce_rows(g + at, p + at, gate.from(at), s.pixels, s.channels, first, last,
                                 centre_p + row, g1_p + row, gc_p + row);
      });
    } else {
      for_planes(s, [&](int64_t i) {
        const int64_t at = i * s.pixels;
        kernels<T>().reduce_plane(g + at, p + at, gate.from(at), s.pixels, centre_p[i], g1_p + i, gc_p + i);
      });
    }
  });
  return {g1, gc};
}

std::tuple<at::Tensor, at::Tensor> propagate(const at::Tensor& grad_in, const std::optional<at::Tensor>& u_in,
                                             const std::optional<at::Tensor>& centre_in,
                                             const std::optional<at::Tensor>& relu_mask_in,
                                             const Propagation& propagation, bool residual,
                                             const std::optional<at::Tensor>& slope_in) {
  const auto &by_input_in = propagation.by_input, &constant_in = propagation.constant;
  const Shape s(grad_in);
  const at::Tensor grad = grad_in.contiguous(s.format), by_grad = s.table(propagation.by_grad, "by_grad");
  const at::Tensor relu_mask = s.relu_mask(relu_mask_in, grad.scalar_type()),
                   slope = s.slope(slope_in, grad.scalar_type());
  TORCH_CHECK(by_input_in.has_value() == constant_in.has_value(), "by_input and constant come together");
  at::Tensor u, centre, by_input, constant;
  if (by_input_in) {
    TORCH_CHECK(u_in && centre_in, "by_input needs u and centre");
    u = s.laid_out(*u_in, "u", grad.scalar_type());
    centre = s.table(*centre_in, "centre");
    by_input = s.table(*by_input_in, "by_input");
    constant = s.table(*constant_in, "constant");
  }
  at::Tensor d_u = new_tensor_like(grad, grad.options(), s.format);
  at::Tensor d_residual = residual ? new_tensor_like(d_u) : new_tensor({0}, grad.options());
  const float *centre_p = table_data(centre), *grad_p = table_data(by_grad), *input_p = table_data(by_input),
              *constant_p = table_data(constant);
  for_dtype(grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T *g = data<T>(grad), *p = data<T>(u);
    const Gate<T> gate = gate_of<T>(relu_mask, slope);
    T *out = data<T>(d_u), *r = residual ? data<T>(d_residual) : nullptr;
    const auto from = [](auto* x, int64_t i) { return x ? x + i : nullptr; };
    if (s.rows()) {
      for_pixels(s, [&](int64_t b, int64_t first, int64_t last) {
        const int64_t at = (b * s.pixels + first) * s.channels, row = b * s.channels;
        kernels<T>().propagate_rows(
            out + at, from(r, at), g + at, from(p, at), gate.from(at), last - first, s.channels,
            {from(centre_p, row), grad_p + row, from(input_p, row), from(constant_p, row)});
      });
    } else {
      for_planes(s, [&](int64_t i) {
        const int64_t at = i * s.pixels;
        kernels<T>().propagate_plane(
            out + at, from(r, at), g + at, from(p, at), gate.from(at), s.pixels,
            {p ? centre_p[i] : 0.0f, grad_p[i], p ? input_p[i] : 0.0f, p ? constant_p[i] : 0.0f});
      });
    }
  });
  return {d_u, d_residual};
}

}  // namespace awnet::cpu
