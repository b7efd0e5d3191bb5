"""The layers of an AW-Net: scaled filters, batch norm with two branches, and both fused in one call.

On every axis of branches, 0 is adversarial and 1 is clean. In train mode each sample goes through the branch
that ``is_clean`` names (Eq. 13); in eval mode the branches are blended by ``p_clean`` (Eq. 14). The mode is
``self.training``, as for torch's batch norm.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import ops
from awnet.ops import running_statistics
from awnet.ops.checks import check_activation
from awnet.ops.distributed import summed
from awnet.scalars import check_integer

Branches = Literal["mix", "dual", "one"]
Activation = Literal["relu", "silu", "gelu", "leaky_relu"] | None
Size2 = int | tuple[int, int]


def check_image(x: Tensor, in_channels: int) -> None:
    """Raises TypeError or ValueError unless ``x`` is floating point and [B, in_channels, H, W]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor [B, {in_channels}, H, W], got {type(x).__name__}")
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(
            f"x must be [B, {in_channels}, H, W], got {list(x.shape)}; "
            + (
                "add the batch axis with x[None]"
                if x.dim() == 3
                else "create the model with other in_channels"
            )
        )
    if not x.is_floating_point():
        raise TypeError(
            f"x must be floating point in [0, 1], got {x.dtype}; convert it, e.g. x.float() / 255"
        )


def check_sizes(num_classes: int, in_channels: int) -> None:
    """Raises TypeError or ValueError unless a network can be built for so many classes and channels."""
    check_integer("num_classes", num_classes, 1)
    check_integer("in_channels", in_channels, 1)


def check_is_clean(is_clean: Tensor, x: Tensor) -> None:
    """Raises TypeError or ValueError unless ``is_clean`` is bool [B] for the batch ``x``."""
    if not isinstance(is_clean, Tensor) or is_clean.dtype != torch.bool:
        kind = is_clean.dtype if isinstance(is_clean, Tensor) else type(is_clean).__name__
        raise TypeError(f"is_clean must be a bool tensor [B], True for clean samples, got {kind}")
    if is_clean.shape != x.shape[:1]:
        raise ValueError(
            f"is_clean must be bool [{x.shape[0]}], one for each sample, got {list(is_clean.shape)}"
        )


class MixBatchNorm2d(nn.Module):
    """Batch norm with a branch for adversarial and a branch for clean samples, Eq. 13 and 14.

    A branch without samples in the batch keeps its running statistics. ``num_batches_tracked`` int64
    ``[1 or 2]`` counts the batches of each branch.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of the running statistics; None averages all batches that a branch has seen.
        branches: ``"mix"`` has separate statistics and affine parameters, all ``[2, C]``, as in the paper;
            ``"dual"`` has statistics ``[1, C]`` shared by all samples and affine parameters ``[2, C]``;
            ``"one"`` is one plain batch norm, ``[1, C]``, that needs neither ``p_clean`` nor ``is_clean``.

    Attributes:
        process_group: name of the torch.distributed group whose ranks share batch statistics, or None; not
            part of the state. See :func:`synchronize`.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    process_group: str | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        branches: Branches = "mix",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if branches not in get_args(Branches):
            raise ValueError(f"branches must be one of {list(get_args(Branches))}, got {branches!r}")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.branches = branches
        affine = (1 if branches == "one" else 2, num_features)
        statistics = (2 if branches == "mix" else 1, num_features)
        self.weight = nn.Parameter(torch.ones(affine, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(affine, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(statistics, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(statistics, device=device, dtype=dtype))
        self.register_buffer(
            "num_batches_tracked", torch.zeros(statistics[0], device=device, dtype=torch.int64)
        )

    @classmethod
    def from_batch_norm(
        cls, norm: nn.BatchNorm2d | MixBatchNorm2d, branches: Branches = "mix", bias: Tensor | None = None
    ) -> MixBatchNorm2d:
        """Copies a plain batch norm to both branches: in eval mode the same function for any ``p_clean``.

        ``bias`` [C] of the convolution before it is subtracted from the running mean, so that the layer can
        be applied to the output of that convolution without bias.
        """
        if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
            raise ValueError("the batch norm keeps no running statistics (track_running_stats=False)")
        mean = norm.running_mean if bias is None else norm.running_mean - bias
        mixed = cls(norm.num_features, norm.eps, norm.momentum, branches, mean.device, mean.dtype)
        with torch.no_grad():
            if norm.weight is not None:  # affine=False stays γ = 1, β = 0
                mixed.weight.copy_(norm.weight)
                mixed.bias.copy_(norm.bias)
            mixed.running_mean.copy_(mean)
            mixed.running_var.copy_(norm.running_var)
            mixed.num_batches_tracked.copy_(norm.num_batches_tracked)
        mixed.weight.requires_grad_(norm.weight is not None and norm.weight.requires_grad)
        mixed.bias.requires_grad_(norm.bias is not None and norm.bias.requires_grad)
        return mixed

    def arguments(
        self, input: Tensor, p_clean: Tensor | None, is_clean: Tensor | None
    ) -> tuple[dict[str, Any], Tensor | int]:
        """The keyword arguments of the op, and how many batches to count, for all branches or bool ``[2]``.

        The caller counts them after the op has succeeded, by :func:`running_statistics.count`. This never
        waits for the device.
        """
        common: dict[str, Any] = {"training": self.training, "eps": self.eps}
        if not self.training:
            if is_clean is not None:
                raise ValueError(
                    "is_clean is for train mode, but the layer is in eval mode: call .train() first"
                )
            if self.branches == "one":
                return common, 0
            if p_clean is None:
                raise ValueError(
                    f"p_clean is missing: with branches={self.branches!r}, eval mode blends the branches by "
                    "the probability [B] that each sample is clean"
                )
            return {**common, "p_clean": p_clean}, 0
        if p_clean is not None:
            raise ValueError(
                "p_clean is for eval mode, but the layer is in train mode, where is_clean chooses the "
                "branch: call .eval() first or leave p_clean out"
            )
        if self.branches == "one":
            is_clean = None
        elif is_clean is None:
            raise ValueError(
                "is_clean is missing: in train mode it chooses the branch of each sample, "
                "so pass bool [B], or call .eval() for eval mode"
            )
        else:
            check_is_clean(is_clean, input)
        present: Tensor | int
        if self.branches == "mix":
            assert is_clean is not None
            present = running_statistics.present_branches(is_clean)
            if self.process_group is not None and self.momentum is None:
                # all ranks need the same weight of a batch; with a momentum each rank counts separately
                present = summed(present.long(), self.process_group) > 0
        else:
            present = int(input.shape[0] > 0 or self.process_group is not None)
        momentum: float | Tensor
        if self.momentum is None:  # cumulative mean: the n-th batch of a branch has weight 1/n
            tracked = self.num_batches_tracked + present
            momentum = tracked.clamp(min=1).to(self.running_mean.dtype).reciprocal()
        else:
            momentum = self.momentum
        common["process_group"] = self.process_group
        return {**common, "is_clean": is_clean, "momentum": momentum}, present

    def forward(
        self, input: Tensor, *, p_clean: Tensor | None = None, is_clean: Tensor | None = None
    ) -> Tensor:
        """``input`` [B, C, H, W] → [B, C, H, W].

        Args:
            input: images.
            p_clean: float [B], for eval mode.
            is_clean: bool [B], for train mode.

        Raises:
            ValueError: the argument of the mode is missing, or that of the other mode is given.
        """
        arguments, batches = self.arguments(input, p_clean, is_clean)
        output = ops.mix_batch_norm(
            input, self.weight, self.bias, self.running_mean, self.running_var, **arguments
        )
        if self.training:
            running_statistics.count(self.num_batches_tracked, batches)
        return output

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, branches={self.branches!r}"


def synchronize(model: nn.Module, group: str | None) -> None:
    """Makes every :class:`MixBatchNorm2d` of ``model`` share batch statistics over the ranks of a group.

    Statistics and gradients are then exactly those of one process with all ranks' samples, also with unequal
    batches and if a rank has no samples of a branch. Each layer makes one collective call in its forward and
    one in its backward (with ``momentum=None`` a small third one), and all ranks have to take part. The
    gradients of γ and β remain sums over each rank's samples. The setting is not part of the state.

    Args:
        model: contains the layers.
        group: name of the group, such as ``torch.distributed.group.WORLD.group_name``; None for no sharing.
    """
    if group is not None and not isinstance(group, str):
        raise TypeError(f"group must be a process group's name or None, got {type(group).__name__}")
    for module in model.modules():
        if isinstance(module, MixBatchNorm2d):
            module.process_group = group


class FilterScaledConv2d(nn.Conv2d):
    """A convolution whose filters are scaled for each sample, Eq. 11 and 12.

    It has the options and the state of :class:`torch.nn.Conv2d`. A bias is added after the scaling.
    """

    def forward(self, input: Tensor, filter_scale: Tensor | None = None) -> Tensor:
        """``input`` [B, C_in, H, W], ``filter_scale`` ω [B, C_out] or None (ω ≡ 1) → [B, C_out, H', W']."""
        input, options = self._convolution(input)
        output = ops.filter_scaled_conv2d(input, self.weight, filter_scale, **options)
        if self.bias is not None:
            output = output + self.bias.to(output.dtype)[:, None, None]
        return output

    def _convolution(self, input: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The input and the options of the op; a padding that the op lacks is applied to the input here."""
        padding: Any = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = 0
        options = {
            "stride": self.stride,
            "padding": padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }
        return input, options


class AWConv2d(FilterScaledConv2d):
    """Convolution with scaled filters → MixBN → (+ residual) → activation in one fused call, Eq. 11–15.

    There is no bias, since the batch norm has a shift. ``dynamic=False, bn="one"`` is a plain convolution
    with batch norm and activation.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as for
            :class:`torch.nn.Conv2d`.
        dynamic: False for a static convolution (a stem, a shortcut), which takes no ``filter_scale``.
        activation: ``"relu"``, ``"silu"``, ``"gelu"`` (the exact one), ``"leaky_relu"`` (negative slope
            0.01) or None.
        bn: ``branches`` of the :class:`MixBatchNorm2d`.
        eps, momentum: of the batch norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: Size2 | str = 0,
        dilation: Size2 = 1,
        groups: int = 1,
        *,
        dynamic: bool = True,
        activation: Activation = "relu",
        bn: Branches = "mix",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=False,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        check_activation(activation)
        self.dynamic = dynamic
        self.activation = activation
        self.bn = MixBatchNorm2d(out_channels, eps, momentum, bn, device, dtype)

    def forward(
        self,
        input: Tensor,
        filter_scale: Tensor | None = None,
        *,
        p_clean: Tensor | None = None,
        is_clean: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``input`` [B, C_in, H, W] → [B, C_out, H', W'].

        Args:
            input: images.
            filter_scale: ω [B, C_out], or None for ω ≡ 1.
            p_clean: float [B], for eval mode.
            is_clean: bool [B], for train mode.
            residual: of the output's shape, added before the activation.
        """
        if filter_scale is not None and not self.dynamic:
            raise ValueError("filter_scale was given to a static convolution: create it with dynamic=True")
        arguments, batches = self.bn.arguments(input, p_clean, is_clean)
        input, options = self._convolution(input)
        output = ops.aw_conv2d(
            input,
            self.weight,
            filter_scale,
            self.bn.weight,
            self.bn.bias,
            self.bn.running_mean,
            self.bn.running_var,
            residual=residual,
            activation=self.activation,
            **options,
            **arguments,
        )
        if self.bn.training:
            running_statistics.count(self.bn.num_batches_tracked, batches)
        return output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dynamic={self.dynamic}, activation={self.activation!r}"
