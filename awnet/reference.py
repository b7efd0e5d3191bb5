"""The layer as the paper writes it: the specification that every other path is tested against.

Wei, Zhao and Li, "Revisiting the Trade-off between Accuracy and Robustness via Weight Distribution of
Filters", Section 4. Equation numbers are the paper's. It is written for clarity, not speed; run it in
float64 to test another backend. Shapes and arguments are those of :mod:`awnet.ops`, which checks them first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Size2 = int | tuple[int, int]


def filter_scaled_conv2d(
    input: Tensor,
    weight: Tensor,
    filter_scale: Tensor | None,
    *,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """π = Ŵ * ψ: every sample is convolved with separate filters, Eq. 11 and 12."""
    batch, c_in, height, width = input.shape
    if filter_scale is None or batch == 0:
        return F.conv2d(input, weight, None, stride, padding, dilation, groups)
    weight_per_sample = filter_scale[:, :, None, None, None] * weight  # Eq. 11, [B, C_out, C_in/groups, k, k]
    # contiguous, since torch's float64 and float16 convolutions on CPUs give a wrong weight gradient where a
    # channels_last image that was folded before keeps an odd stride for its batch of one
    folded = F.conv2d(  # Eq. 12: the batch folded into the groups
        input.reshape(1, batch * c_in, height, width).contiguous(),
        weight_per_sample.flatten(0, 1).to(input.dtype),
        None,
        stride,
        padding,
        dilation,
        batch * groups,
    )
    return folded.reshape(batch, len(weight), *folded.shape[2:])


def mix_batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    p_clean: Tensor | None = None,
    is_clean: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """BN_mix: Eq. 13 in train mode, Eq. 14 in eval mode. Row 0 of each parameter is BN_adv, row 1 BN_nat."""
    affine_rows, stat_rows = len(weight), len(running_mean)
    wide = torch.promote_types(input.dtype, torch.float32)
    x, weight, bias = input.to(wide), weight.to(wide), bias.to(wide)
    if not training:
        output = torch.zeros((), dtype=wide, device=input.device)
        for k in range(max(affine_rows, stat_rows)):
            a, s = min(k, affine_rows - 1), min(k, stat_rows - 1)
            normal = _normalized(x, running_mean[s].to(wide), running_var[s].to(wide), eps)
            branch = weight[a][:, None, None] * normal + bias[a][:, None, None]
            if max(affine_rows, stat_rows) == 1:
                return branch.to(input.dtype)
            assert p_clean is not None
            probability = (p_clean if k == 1 else 1 - p_clean).to(wide)
            output = output + probability[:, None, None, None] * branch  # Eq. 14
        return output.to(input.dtype)

    normalized = torch.zeros_like(x)
    kind = torch.zeros(len(x), dtype=torch.long, device=x.device)
    if is_clean is not None:
        kind = is_clean.long()
    for s in range(stat_rows):  # Eq. 13: each branch by the statistics of its samples
        selected = kind == s if stat_rows == 2 else torch.ones_like(kind, dtype=torch.bool)
        if selected.any():
            mean, var = _statistics(x[selected])
            normalized = normalized.index_put((selected,), _normalized(x[selected], mean, var, eps))
            count = int(selected.sum()) * x.shape[2] * x.shape[3]
            rate = float(momentum[s]) if isinstance(momentum, Tensor) else momentum
            _update(running_mean[s], mean, rate)
            _update(running_var[s], var * (count / (count - 1)), rate)
    row = kind if affine_rows == 2 else torch.zeros_like(kind)
    output = weight[row][:, :, None, None] * normalized + bias[row][:, :, None, None]
    return output.to(input.dtype)


# Written out, since torch's own batch norm gives a wrong gradient on CPUs for a batch of one whose strides
# are not those of a new tensor, as after a convolution with channels_last filters.


def _normalized(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (x - mean[:, None, None]) / torch.sqrt(var + eps)[:, None, None]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] over the samples and pixels of x [B, C, H, W]."""
    if len(x) * x.shape[2] * x.shape[3] == 1:
        raise ValueError("expected more than 1 value per channel when training, got one in a branch")
    mean = x.mean((0, 2, 3))
    return mean, (x - mean[:, None, None]).square().mean((0, 2, 3))


def _update(running: Tensor, batch: Tensor, rate: float) -> None:
    """running ← (1 − rate) running + rate batch, in place and without a derivative."""
    try:
        with torch.no_grad():
            running.mul_(1 - rate).add_(batch.detach(), alpha=rate)
    except RuntimeError as error:
        if not torch._C._are_functorch_transforms_active():
            raise
        raise RuntimeError(
            "training updates running_mean and running_var in place, which torch.func refuses for tensors "
            "that are not its own inputs: use eval mode, where nothing is updated, or pass the buffers as "
            "inputs, as with torch.func.functional_call"
        ) from error


def aw_conv2d(
    input: Tensor,
    weight: Tensor,
    filter_scale: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    p_clean: Tensor | None = None,
    is_clean: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str | None = "relu",
) -> Tensor:
    """σ(F(ψ) + residual) with F(ψ) = BN_mix(Ŵ * ψ), Eq. 15: one half of the block of Eq. 16.

    The paper's σ is the ReLU; ``activated`` lists the others.
    """
    scaled = filter_scaled_conv2d(
        input, weight, filter_scale, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    output = mix_batch_norm(  # Eq. 15
        scaled,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        p_clean=p_clean,
        is_clean=is_clean,
        training=training,
        momentum=momentum,
        eps=eps,
    )
    if residual is not None:
        output = output + residual  # Eq. 16
    return activated(output, activation)


def activated(z: Tensor, activation: str | None) -> Tensor:
    """The activation by its name; None is the identity.

    ``"relu"``: max(z, 0). ``"silu"``: z / (1 + exp(−z)). ``"gelu"``: z Φ(z) with the distribution function Φ
    of the normal distribution, not its approximation by tanh. ``"leaky_relu"``: z where z > 0, else z / 100.
    """
    if activation == "relu":
        return torch.relu(z)
    if activation == "silu":
        return F.silu(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, 0.01)
    return z
