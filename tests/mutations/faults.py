"""The faults. Each replaces a text that occurs exactly once in its file, and is caught by one of its tests.

A new one: take a line whose mathematics matters, write down what a tired author would have written, and name
the tests that should object. Where none does, the missing test is what to write.
"""

from __future__ import annotations

from dataclasses import dataclass

OPS = "tests/ops/test_ops.py::"
CUDA = "tests/ops/test_cuda_kernels_on_cpu.py::"
PASSES = "tests/kernels/test_passes.py::"
EVAL_BACKWARD = "tests/kernels/test_eval_backward.py::"
NETWORK_FUNCTION = "tests/ops/test_network_autograd.py::"
ALGEBRA = "tests/kernels/test_coefficients.py::"
CONV = "tests/kernels/test_conv.py::"
STEP = "tests/kernels/test_sign_step.py::"
FORMS = "tests/nn/test_frozen_forms.py::"

NATIVE_LAYER = OPS + "test_native_layers_of_any_shape_equal_the_reference"
NATIVE_PASSES = OPS + "test_native_passes_equal_eager_in_every_shape"
ACTIVATIONS = "tests/ops/test_activations.py::"
NETWORK = "tests/nn/test_frozen.py::test_a_network_in_one_operator_equals_its_layers"
DIRECT = "tests/ops/test_native.py::test_the_direct_convolution_and_its_gradients_equal_the_librarys"
EAGER_LAYER = OPS + "test_eager_equals_the_reference_in_float64"
AMX = "tests/ops/test_amx.py::"
AMX_LAYER = AMX + "test_one_layer_is_within_the_bound_of_its_roundings"
AMX_READERS = AMX + "test_gradients_of_all_readers_of_a_layer_are_added"
CUDA_PASSES = CUDA + "test_every_pass_equals_eager_in_every_shape"
CUDA_ALGEBRA = CUDA + "test_the_coefficients_equal_plain_torch"
SELF_CHECK = "tests/ops/test_self_check.py::test_a_wrong_kernel_fails_with_its_name_and_case"
EVAL, TRAIN = (
    ALGEBRA + "test_eval_coefficients_and_gradients_equal_float64",
    ALGEBRA + "test_train_coefficients_and_gradients_equal_float64",
)


@dataclass(frozen=True)
class Fault:
    name: str  # in the words of docs/mutations.md
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def build(self) -> str:
        """What must be compiled for it: "native", "emulator", or "" for Python."""
        if self.file.startswith("csrc/cuda/"):
            return "emulator"
        native = self.file.startswith("csrc/") or any(name.startswith(AMX) for name in self.tests)
        return "native" if native else ""


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, file, old, new, tests)


FAULTS = (
    # --- the algebra that the CPU and the CUDA code share
    fault(
        "p and 1 − p exchanged in the scale", "csrc/arithmetic.h",
        "{filter_scale * (q * adversarial.gain() + p * clean.gain())",
        "{filter_scale * (p * adversarial.gain() + q * clean.gain())",
        NATIVE_LAYER,
    ),
    fault(
        "wrong sign of μγ/σ in the shift", "csrc/arithmetic.h",
        "return bias - mean * weight * inv_std", "return bias + mean * weight * inv_std",
        NATIVE_LAYER,
    ),
    fault(
        "eps left out of 1/σ", "csrc/arithmetic.h",
        "1.0f / sqrtf(var + eps)", "1.0f / sqrtf(var + 0.0f * eps)",
        NATIVE_LAYER, OPS + "test_eps_matters_where_the_variance_is_small",
    ),
    fault(
        "ω instead of ω² in a branch's variance", "csrc/arithmetic.h",
        "return filter_scale * filter_scale * m2", "return filter_scale * m2",
        NATIVE_LAYER,
    ),
    fault(
        "β left out of the gradient of p", "csrc/arithmetic.h",
        "clean.gain() * centered[1] + clean.bias * g1", "clean.gain() * centered[1]",
        NATIVE_LAYER,
    ),
    fault(
        "the gradient through the batch mean dropped", "csrc/arithmetic.h",
        "r.constant = -scaled * (through_mean + through_var * d)", "r.constant = -scaled * (through_var * d)",
        NATIVE_LAYER,
    ),
    fault(
        "hw left out of the gradient of ω", "csrc/arithmetic.h",
        "branch.weight * g1 - hw * (", "branch.weight * g1 - (",
        NATIVE_LAYER,
    ),
    # --- C++
    fault(
        "sum over the batch missing in ∂γ", "csrc/cpu/coefficients.cpp",
        "table[2 + row] += product;", "table[2 + row] = product;",
        NATIVE_LAYER,
    ),
    fault(
        "the other branch's sums in ∂u", "csrc/cpu/coefficients.cpp",
        "static_cast<float>(sum[2 + stat_row]) *", "static_cast<float>(sum[3 - stat_row]) *",
        NATIVE_LAYER,
    ),
    fault(
        "unbiased factor in the variance that normalises", "csrc/cpu/coefficients.cpp",
        "(pass == 0 ? 1.0 : static_cast<double>(hw));", "(pass == 0 ? 1.0 : static_cast<double>(hw)) - pass;",
        NATIVE_LAYER,
    ),
    fault(
        "values after the last full vector left out", "csrc/cpu/passes.inl",
        "for (; i < n; ++i) {", "for (; i + 1 < n; ++i) {",
        NATIVE_PASSES,
    ),
    fault(
        "NaN becomes 0 in a vector's ReLU", "csrc/cpu/passes.inl",
        "relu(Vector v) { return v <= 0.0f ? Vector{} : v; }", "relu(Vector v) { return v > 0.0f ? v : Vector{}; }",
        OPS + "test_nan_passes_the_activation_as_in_torch",
    ),
    fault(
        "the mask of the ReLU dropped from the gradient", "csrc/cpu/passes.inl",
        "if (saved.mask != nullptr) return relu_backward(g, read(saved.mask + i));", "",
        OPS + "test_only_arguments_that_require_a_gradient_get_one[cpp]",
    ),
    fault(
        "the slope of the SiLU without the term of its logistic function", "csrc/cpu/passes.inl",
        "slope = s * (one + z * (one - s));", "slope = s;",
        ACTIVATIONS + "test_values_and_slopes_of_all_sizes_in_float32",
    ),
    fault(
        "a slope left out of the direct convolution's gradient", "csrc/cpu/convolution.cpp",
        "if (!plan.input.offsets.empty() && !p.activation.slope)", "if (!plan.input.offsets.empty())",
        ACTIVATIONS + "test_the_direct_convolution_with_an_activation",
    ),
    fault(
        "a slope left out of a frozen network's gradient", "csrc/network.cpp",
        "args.slope = layer.mask;", "",
        ACTIVATIONS + "test_a_frozen_network_equals_its_layers",
    ),
    fault(
        "bfloat16 cut off instead of rounded", "csrc/cpu/passes.inl",
        "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16",
        NATIVE_PASSES,
    ),
    fault(
        "partial sums of a long column overwritten", "csrc/cpu/passes.inl",
        "totals[s] = next;", "totals[s] = parts[s];",
        NATIVE_PASSES,
    ),
    fault(
        "padding left out of the direct convolution's gradient", "csrc/cpu/convolution.cpp",
        "return begin + conv.padding[d] - k", "return begin - k",
        DIRECT,
    ),
    fault(
        "every block of the direct convolution by the first one's filters", "csrc/cpu/convolution.cpp",
        "weights + phase.weights + first * inputs * taps", "weights + phase.weights",
        DIRECT,
    ),
    fault(
        "odd columns of a stride-2 gradient from the even phase", "csrc/cpu/convolution.inl",
        "load_at<true>(even + j, odd - even)", "load_at<true>(even + j, 0)",
        DIRECT,
    ),
    fault(
        "one column off in the second half of a stride-2 row", "csrc/cpu/convolution.inl",
        "14, 17, 19,", "14, 16, 19,",
        DIRECT,
    ),
    fault(
        "half a vector from a neighboring row's end", "csrc/cpu/convolution.cpp",
        "vectors.second = pitch;", "vectors.second = pitch - 1;",
        DIRECT,
    ),
    fault(
        "residual left out where the direct convolution writes whole rows", "csrc/cpu/convolution.inl",
        "if (to.residual != nullptr) y += load(to.residual + i);", "",
        DIRECT,
    ),
    fault(
        "center left out of a packed plane's sums", "csrc/cpu/convolution.inl",
        "load(p.u + i) - center", "load(p.u + i)",
        DIRECT,
    ),
    fault(
        "a wrong sign in one of Winograd's combinations", "csrc/cpu/winograd.inl",
        "store(out + 4 * point, even2 - odd2);", "store(out + 4 * point, even2 + odd2);",
        DIRECT,
    ),
    fault(
        "Winograd's gradient by filters that are not turned", "csrc/cpu/convolution.cpp",
        "w.taps[3 * row + column] = phases[0].tap[t];", "w.taps[3 * row + column] = 3 * row + column;",
        DIRECT,
    ),
    fault(
        "a group's samples all written to its first", "csrc/cpu/winograd.inl",
        "sample * to.sample + r", "r",
        DIRECT,
    ),
    fault(
        "rows of two bands in one vector left as they are", "csrc/cpu/winograd.inl",
        "if constexpr (kHalves) {", "if constexpr (false) {",
        DIRECT,
    ),
    fault(
        "a stride-2 layer's gradient put in place of the one that is there", "csrc/cpu/convolution.inl",
        "add ? load(to + 2 * j) + both : both", "both",
        NETWORK,
    ),
    fault(
        "a block's residual without its gradient", "csrc/network.cpp",
        "if (s.residual >= 0) collect(s.residual, d_residual);", "",
        NETWORK,
    ),
    fault(
        "of a layer that two others take, the gradient of one", "csrc/network.cpp",
        "if (args.need_input && !joins && d_input.defined()) args.add_to = d_input;", "",
        NETWORK,
    ),
    fault(
        "every sample of a channels_last batch by the first one's scale", "csrc/cpu/passes.cpp",
        "args.from(begin * channels, b * channels)", "args.from(begin * channels, 0)",
        NATIVE_PASSES,
    ),
    fault(
        "wrong stride between blocks of columns in channels_last", "csrc/cpu/passes.cpp",
        "i % blocks * kColumns", "i % blocks * (kColumns + 1)",
        NATIVE_PASSES,
    ),
    fault(
        "a pixel of u as center in training, where it is the mean", "csrc/layer.cpp",
        "batch_stats ? b.mean :", "false ? b.mean :",
        NATIVE_LAYER,
    ),
    fault(
        "the center left out of ∂ω without a norm", "csrc/layer.cpp",
        "at::addcmul(sums.gc, sums.center, sums.g1)", "sums.gc",
        OPS + "test_mix_batch_norm_and_filter_scaled_conv2d_equal_the_reference[cpp]",
    ),
    fault(
        "the gradient of the batch norm's weight returned for its bias", "csrc/autograd.cpp",
        "d.bn_bias, d.shift", "d.bn_weight, d.shift",
        NATIVE_LAYER,
    ),
    # --- CUDA, through the emulator
    fault(
        "the residual dropped", "csrc/cuda/apply.cu",
        "if (residual != nullptr) v += in.residual[j];", "",
        CUDA_PASSES,
    ),
    fault(
        "the slope of the GELU without its density", "csrc/cuda/device.h",
        "return {z * distribution, distribution + z * (expf(-0.5f * z * z) * 0.398942280f)};",
        "return {z * distribution, distribution};",
        CUDA_PASSES,
    ),
    fault(
        "the first value's mask for the whole vector", "csrc/cuda/device.h",
        "return relu_backward(g, in.relu_mask[j]);", "return relu_backward(g, in.relu_mask[0]);",
        CUDA_PASSES,
    ),
    fault(
        "the values after the last full vector left out", "csrc/cuda/elementwise.h",
        "for (int64_t tail = i; tail < total; ++tail)", "for (int64_t tail = i; tail + 1 < total; ++tail)",
        CUDA_PASSES,
    ),
    fault(
        "vectors that straddle two planes", "csrc/cuda/layout.h",
        "images.aligned && run % full == 0 ?", "images.aligned ?",
        CUDA_PASSES,
    ),
    fault(
        "the last step of a warp's sum left out", "csrc/cuda/device.h",
        "for (int step = width / 2; step > 0;", "for (int step = width / 2; step > 1;",
        CUDA_PASSES,
    ),
    fault(
        "every part of an image as the first one", "csrc/cuda/reduce.cu",
        "entry / channels * parts * channels + entry % channels", "entry",
        CUDA_PASSES,
    ),
    fault(
        "the parts' distance left out of Chan's update", "csrc/cuda/statistics.cu",
        "sum += squares[from] + p.count(part) * d * d;", "sum += squares[from];",
        CUDA_PASSES,
    ),
    fault(
        "the constant of ∂u dropped", "csrc/cuda/propagate.cu",
        "* c.by_input[0] + c.constant[0]", "* c.by_input[0]",
        CUDA_PASSES,
    ),
    fault(
        "the block with the first ticket combines the parts", "csrc/cuda/eval_backward.cu",
        "return ticket == parts - 1;", "return ticket == 0;",
        CUDA_PASSES,
    ),
    fault(
        "the gradient of the mean not divided by the pixels", "csrc/cuda/eval_backward.cu",
        "c.d_mean[j] /= pixels;", "c.d_mean[j] /= 1.0f;",
        CUDA_PASSES,
    ),
    fault(
        "the count of the wrong branch", "csrc/cuda/coefficients.cu",
        "n[two_rows ? k : 0]", "n[two_rows ? 1 - k : 0]",
        CUDA_ALGEBRA,
    ),
    fault(
        "samples beyond the first block's rows left out", "csrc/cuda/coefficients.cu",
        "squares[0] += row == 0 ? square : 0.0f;", "squares[0] += row == 0 && b < kDown ? square : 0.0f;",
        CUDA_ALGEBRA,
    ),
    # --- Triton, through its interpreter
    fault(
        "the residual dropped", "kernels/passes.py",
        "        y += residual\n", "",
        PASSES + "test_apply_equals_float64",
    ),
    fault(
        "wrong stride between pixels in channels_last", "kernels/tiles.py",
        "start[:, None] + (pixel * channels)[None, :]", "start[:, None] + pixel[None, :]",
        PASSES + "test_apply_equals_float64",
    ),
    fault(
        "a wrong sign in the slope of the SiLU", "kernels/activations.py",
        "slope = s * (1.0 + z * (1.0 - s))", "slope = s * (1.0 - z * (1.0 - s))",
        PASSES + "test_apply_with_an_activation_whose_slope_is_stored",
    ),
    fault(
        "a slope left out of the gradient", "kernels/passes.py",
        "        g *= load_values(slope_ptr, offsets, in_bounds)\n", "        g *= 1.0\n",
        PASSES + "test_a_slope_multiplies_the_gradient",
    ),
    fault(
        "NaN becomes 0 in the ReLU", "kernels/passes.py",
        "y = tl.where(y <= 0, 0.0, y)", "y = tl.where(y > 0, y, 0.0)",
        PASSES + "test_nan_passes_the_activation_as_in_torch",
    ),
    fault(
        "the gradient let through where the ReLU gave 0", "kernels/passes.py",
        "g = tl.where(load_values(relu_mask_ptr, offsets, in_bounds) <= 0, 0.0, g)",
        "g = tl.where(load_values(relu_mask_ptr, offsets, in_bounds) < 0, 0.0, g)",
        PASSES + "test_reduce_equals_float64",
    ),
    fault(
        "statistics that do not center before they square", "kernels/passes.py",
        "    mean = tl.sum(x, 1) / tl.minimum(hw - first_pixel, BLOCK_P).to(tl.float32)\n", "    mean = tl.zeros([BLOCK_M], tl.float32)\n",
        PASSES + "test_statistics_equal_float64",
    ),
    fault(
        "the mask of the last pixels dropped", "kernels/tiles.py",
        "in_planes[:, None] & (pixel < hw)[None, :]", "in_planes[:, None] & (pixel >= 0)[None, :]",
        PASSES + "test_reduce_equals_float64",
    ),
    fault(
        "the program with the last ticket but one adds the parts", "kernels/eval_backward.py",
        "last = ticket == splits - 1", "last = ticket == splits - 2",
        EVAL_BACKWARD + "test_eval_backward_equals_float64",
    ),
    fault(
        "the second gradient of a joined output left out", "kernels/eval_backward.py",
        "g += load_values(other_grad_ptr, offsets, in_bounds)", "g += 0.0",
        EVAL_BACKWARD + "test_eval_backward_equals_float64",
    ),
    fault(
        "the bits of a packed mask in reverse in the backward", "kernels/tiles.py",
        "[:, None, :] >> tl.arange(0, 8)[None, :, None]) & 1", "[:, None, :] >> (7 - tl.arange(0, 8))[None, :, None]) & 1",
        EVAL_BACKWARD + "test_a_packed_mask_gives_the_bits_of_a_bool_mask",
    ),
    fault(
        "the offset of a tile of a packed mask in pixels, not bytes", "kernels/tiles.py",
        "start, in_planes, first_pixel // 8, channels", "start, in_planes, first_pixel, channels",
        EVAL_BACKWARD + "test_a_packed_mask_gives_the_bits_of_a_bool_mask",
    ),
    fault(
        "y = 0 lets the gradient through where the mask is computed from u", "kernels/eval_backward.py",
        "element_ty).to(tl.float32) <= 0", "element_ty).to(tl.float32) < 0",
        EVAL_BACKWARD + "test_the_mask_from_u_is_that_of_apply_in_every_bit",
    ),
    fault(
        "a residual's gradient dropped where it is the layer's input too", "awnet/ops/network_autograd.py",
        "            if need_residual:\n", "            if need_residual and layer.residual != layer.input:\n",
        NETWORK_FUNCTION + "test_values_and_gradients_equal_those_of_the_layers",
    ),
    fault(
        "the shift of a folded shortcut dropped", "awnet/ops/folding.py",
        "shifts[reader] = shifts[reader] + shifts[i]", "shifts[reader] = shifts[reader] + 0 * shifts[i]",
        FORMS + "test_each_form_equals_the_reference",
    ),
    fault(
        "the input added to a folded layer without a residual", "awnet/ops/folding.py",
        "addend, factor = (x, 0.0) if", "addend, factor = (x, 1.0) if",
        FORMS + "test_the_operator_gets_the_residual_or_the_input_times_zero",
    ),
    fault(
        "folded weights kept when the weights change", "awnet/nn/inference_network.py",
        "self._cached = self._folded = None\n", "self._cached = None\n",
        FORMS + "test_refresh_updates_each_form",
    ),
    fault(
        "images padded before their channels", "awnet/nn/inference_network.py",
        "F.pad(x, (0, 0, 0, 0, 0, self.padding))", "F.pad(x, (0, 0, 0, 0, self.padding, 0))",
        FORMS + "test_each_form_equals_the_reference",
    ),
    fault(
        "ω instead of ω² in a branch's variance", "kernels/train_coefficients.py",
        "m2 = scaled(m2, filter_scale_ptr, offsets, in_bounds) + hw * delta * delta", "m2 = m2 + hw * delta * delta",
        TRAIN,
    ),
    fault(
        "the rows of a table exchanged", "kernels/tables.py",
        "row = tl.where(is_clean, load_row(table_ptr, 1, c, channels)[None, :], row)",
        "row = tl.where(is_clean, row, load_row(table_ptr, 1, c, channels)[None, :])",
        TRAIN,
    ),
    fault(
        "samples of absent rows counted", "kernels/train_coefficients.py",
        "in_batch = (b < batch)[:, None]", "in_batch = (b >= 0)[:, None]",
        TRAIN,
    ),
    fault(
        "the second branch weighted by 1 − p", "kernels/eval_coefficients.py",
        "d_weight_0, d_weight_1 = q * centered_0 * inv_std_0, p * centered_1 * inv_std_1",
        "d_weight_0, d_weight_1 = q * centered_0 * inv_std_0, q * centered_1 * inv_std_1",
        EVAL,
    ),
    fault(
        "an off-by-one tap", "kernels/conv.py",
        "x_offsets = x_row[:, None] + ((i * W + j) * C_IN + depth)[None, :]", "x_offsets = x_row[:, None] + ((i * W + j + 1) * C_IN + depth)[None, :]",
        CONV + "test_fused_apply_equals_float64",
    ),
    fault(
        "taps not turned round in the gradient of the input", "kernels/conv.py",
        "flipped_tap = TAPS - 1 - tap", "flipped_tap = tap",
        CONV + "test_fused_dgrad_equals_float64",
    ),
    fault(
        "the scale of the tile's first sample for all that share the tile", "kernels/epilogue.py",
        "table_offsets = (sample_in_tile * C)[:, None] + channel[None, :]", "table_offsets = (sample_in_tile * 0)[:, None] + channel[None, :]",
        CONV + "test_fused_apply_equals_float64",
    ),
    fault(
        "the wrong group's channels", "kernels/grouped_conv.py",
        "first_in = channel // GROUP_OUT * GROUP_IN", "first_in = channel // GROUP_OUT",
        CONV + "test_grouped_convolution_equals_float64",
    ),
    fault(
        "the weight of the gradient of the input not transposed", "kernels/grouped_conv.py",
        "read, written = (1, 2) if problem.dgrad else (2, 1)", "read, written = 2, 1",
        CONV + "test_grouped_dgrad_equals_float64",
    ),
    fault(
        "pixels between the strides let through in the gradient of the input", "kernels/grouped_conv.py",
        "inside & (in_y % STRIDE_H == 0) & (in_x % STRIDE_W == 0)", "inside & (in_x % STRIDE_W == 0)",
        CONV + "test_grouped_dgrad_equals_float64",
    ),
    fault(
        "the lower side of the ball dropped", "kernels/sign_step.py",
        "tl.maximum(x - eps, 0.0)", "0.0",
        STEP + "test_sign_step_equals_torchs_bit_for_bit",
    ),
    # --- torch
    fault(
        "the branches' sums exchanged", "awnet/ops/coefficients.py",
        "[torch.where(clean, zero, x).sum(0), torch.where(clean, x, zero).sum(0)]",
        "[torch.where(clean, x, zero).sum(0), torch.where(clean, zero, x).sum(0)]",
        EAGER_LAYER,
    ),
    fault(
        "hw left out of a branch's variance", "awnet/ops/coefficients.py",
        "+ hw * distance.square()", "+ distance.square()",
        EAGER_LAYER,
    ),
    fault(
        "wrong sign of the gradient of p", "awnet/ops/coefficients.py",
        "d_p = (by_branch[1] - by_branch[0]).sum(1)", "d_p = (by_branch[0] - by_branch[1]).sum(1)",
        EAGER_LAYER,
    ),
    fault(
        "the center left out of ∂ω in eval mode", "awnet/ops/coefficients.py",
        "(gc if center is None else gc + center * g1) * _blend", "gc * _blend",
        EAGER_LAYER,
    ),
    fault(
        "the mask turned round", "awnet/ops/backends/base.py",
        "(y <= 0).logical_not_()", "(y <= 0)",
        OPS + "test_only_arguments_that_require_a_gradient_get_one[eager]",
    ),
    fault(
        "statistics as E[x²] − μ²", "awnet/ops/backends/base.py",
        "(wide - _image(mean)).square_().sum((2, 3))", "wide.square().sum((2, 3)) - mean.square() * wide[0, 0].numel()",
        OPS + "test_the_variance_does_not_cancel_far_from_zero[eager]",
    ),
    fault(
        "the distribution function alone as the slope of the GELU", "awnet/ops/activations.py",
        "return torch.special.ndtr(z) + z * density", "return torch.special.ndtr(z)",
        EAGER_LAYER,
    ),
    fault(
        "∂u without the term of the input", "awnet/ops/backends/base.py",
        "d_u.mul_(_image(by_input))", "d_u.mul_(0)",
        EAGER_LAYER,
    ),
    fault(
        "a pixel of u as center in training, where it is the mean", "awnet/ops/autograd.py",
        "sums = Reduced(*passes.reduce(grad, u, args.mean, relu_mask, slope), args.mean)",
        "sums = Reduced(*passes.reduce(grad, u, u[:, :, 0, 0].to(wide), relu_mask, slope), u[:, :, 0, 0].to(wide))",
        EAGER_LAYER,
    ),
    fault(
        "the biased variance in the running statistics", "awnet/ops/running_statistics.py",
        "var * (n / (n - 1).clamp(min=1))", "var",
        EAGER_LAYER,
    ),
    # --- bfloat16 on AMX tiles
    fault(
        "the ReLU's mask left out of the gradient", "csrc/cpu/amx/kernels.inl",
        "if (to.relu_mask) d = d.where(to.relu_mask[pixel * kImages + image]);", "",
        AMX_LAYER,
    ),
    fault(
        "the second pixel of a pair from the first one's tap", "csrc/cpu/amx/kernels.inl",
        "load<5>(tap->second < 0 ? kZeros : input + tap->second * kCell)",
        "load<5>(tap->first < 0 ? kZeros : input + tap->first * kCell)",
        AMX_LAYER,
    ),
    fault(
        "one tile loaded twice instead of two", "csrc/cpu/amx/kernels.inl",
        "load<7>(b + kCell)", "load<7>(b)",
        AMX_LAYER,
    ),
    fault(
        "the gradient of the scale without u", "csrc/cpu/amx/kernels.inl",
        "plus(d.times(Row::load(to.u + at)))", "plus(d)",
        AMX_LAYER,
    ),
    fault(
        "shift and residual left out", "csrc/cpu/amx/kernels.inl",
        "v = v.plus(Row::load(to.residual + at))", "v = u.times(Row::load(to.scale + entry))",
        AMX + "test_residual_blocks_are_no_worse_than_twice_the_library",
    ),
    fault(
        "NaN becomes 0 in the emulated ReLU", "csrc/cpu/amx/emulated.cpp",
        "static_cast<uint32_t>(!(values[i] <= 0.0f))", "static_cast<uint32_t>(values[i] > 0.0f)",
        AMX + "test_an_image_does_not_depend_on_the_others_nor_on_the_batch[emulate]",
    ),
    fault(
        "of a residual with two readers, the gradient of one", "csrc/cpu/amx/network.cpp",
        "step.add_to_residual = d[residual] != kAbsent;", "step.add_to_residual = false;",
        AMX_READERS,
    ),
    fault(
        "a layer's memory taken before its last reader", "csrc/cpu/amx/network.cpp",
        "if (source >= 0 && last_reader[source] == i)", "if (source >= 0)",
        AMX_READERS,
    ),
    fault(
        "packed filters kept when the weights change", "awnet/ops/backends/amx.py",
        "-1 if w.is_inference() else w._version", "-1",
        AMX + "test_packed_weights_follow_the_weights",
    ),
    fault(
        "tiles for a handful of images", "awnet/ops/backends/amx.py",
        "len(x) >= _FEWEST_IMAGES", "len(x) >= 0",
        AMX + "test_grouped_convolutions_other_dtypes_and_the_switch_keep_the_library",
    ),
    fault(
        "the self-check does not look outside the results", "awnet/ops/self_check.py",
        "return not bands or bool((torch.cat(bands) == 255).all())", "return True",
        SELF_CHECK,
    ),
    fault(
        "the self-check passes a result that is wrong by one hundredth", "awnet/ops/self_check.py",
        "if not error <= tolerance * size:", "if not error <= 1e4 * tolerance * size:",
        SELF_CHECK,
    ),
    fault(
        "the self-check takes memory that was never written for zeros", "awnet/ops/self_check.py",
        "if not torch.equal(got.isnan(), want.isnan()):", "if got.shape != want.shape:",
        SELF_CHECK,
    ),
)  # fmt: skip
