"""Checks of the public functions' arguments, and autocast; the results go into a :class:`LayerArgs`.

An error names the argument, what is expected and what was passed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awnet.ops.args import ACTIVATIONS, Conv, MixNorm
from awnet.scalars import plain

Size2 = int | tuple[int, int]

_LARGEST = 2**62  # stride, padding or dilation; torch stores them in 64 bits
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def checked_convolution(
    input: Tensor, weight: Tensor, stride: Size2, padding: Size2, dilation: Size2, groups: int
) -> tuple[Tensor, Tensor, Conv, tuple[int, int, int, int]]:
    """``input`` and ``weight`` with autocast applied, the geometry and the output's shape."""
    input = autocast(check_image(input, "input"))
    weight = autocast(check_image(weight, "weight"))
    check_like(weight, "weight", input, "input")
    groups = plain(groups)
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    conv = Conv(
        _pair(stride, "stride", 1), _pair(padding, "padding", 0), _pair(dilation, "dilation", 1), groups
    )
    c_out, c_in, *kernel = weight.shape
    if groups < 1 or c_out % groups != 0:
        raise ValueError(f"groups must be at least 1 and divide weight's {c_out} filters, got {groups}")
    if input.shape[1] != c_in * groups:
        raise ValueError(
            f"input must have {c_in * groups} channels for weight {list(weight.shape)} with groups={groups}, "
            f"got {input.shape[1]}"
        )
    if c_out == 0 or c_in == 0 or kernel[0] == 0 or kernel[1] == 0:
        raise ValueError(f"weight must not be empty, got shape {list(weight.shape)}")
    height, width = (
        (size + 2 * conv.padding[i] - conv.dilation[i] * (kernel[i] - 1) - 1) // conv.stride[i] + 1
        for i, size in enumerate(input.shape[2:])
    )
    if height < 1 or width < 1:
        raise ValueError(
            f"input {list(input.shape)} is too small for weight {list(weight.shape)} with stride={stride}, "
            f"padding={padding}, dilation={dilation}: the output would have size {[height, width]}"
        )
    return input, weight, conv, (input.shape[0], c_out, height, width)


def check_filter_scale(filter_scale: Tensor | None, output: tuple[int, ...], input: Tensor) -> None:
    """Raises unless ``filter_scale`` is None or [B, C_out] of an ``output`` [B, C_out, H', W']."""
    if filter_scale is not None:
        check_table(filter_scale, "filter_scale", output[:2], "[B, C_out]", input)


def checked_norm(
    input: Tensor,
    output: tuple[int, ...],
    tables: dict[str, Tensor],
    p_clean: Tensor | None,
    is_clean: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    process_group: str | None,
) -> tuple[MixNorm, Tensor | None, Tensor | None]:
    """The batch norm of images of shape ``output``; p_clean and is_clean if it has two branches.

    ``tables``: weight, bias, running mean and running variance, by the names of the function's arguments.
    """
    eps, momentum, training = plain(eps), plain(momentum), plain(training)
    batch, channels, height, width = output
    for name, table in tables.items():
        check_table(table, name, (None, channels), "[2, C] or [1, C]", input)
        if table.shape[0] not in (1, 2):
            raise ValueError(f"{name} must have 1 or 2 rows (adversarial, clean), got {table.shape[0]}")
    names = list(tables)
    for first, second in ((names[0], names[1]), (names[2], names[3])):
        if tables[first].shape != tables[second].shape:
            raise ValueError(
                f"{first} and {second} must have one shape, got {list(tables[first].shape)} and "
                f"{list(tables[second].shape)}"
            )
    weight, bias, mean, var = tables.values()
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, got {type(training).__name__}")
    if not isinstance(eps, float | int) or not eps > 0:
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    _check_momentum(momentum, mean)
    for value, name in ((p_clean, "p_clean"), (is_clean, "is_clean")):
        if value is not None:
            check_table(value, name, (batch,), "[B]", input, boolean=name == "is_clean")
    two = weight.shape[0] == 2 or mean.shape[0] == 2
    if two and training and is_clean is None:
        raise ValueError("is_clean is missing: training with two branches needs each sample's kind, bool [B]")
    if two and not training and p_clean is None:
        raise ValueError("p_clean is missing: eval mode blends the two branches by p, [B] in [0, 1]")
    if two and training and p_clean is not None:
        raise ValueError("p_clean is for eval mode only: in train mode is_clean chooses each sample's branch")
    if two and not training and is_clean is not None:
        raise ValueError("is_clean is for train mode only: in eval mode p_clean blends the branches")
    if process_group is not None and (not isinstance(process_group, str) or not process_group):
        raise TypeError(f"process_group must be a group's name or None, got {process_group!r}")
    if training and height * width == 1 and process_group is None and not torch.compiler.is_compiling():
        _check_more_than_one_value(is_clean if mean.shape[0] == 2 else None, batch, input)
    group = process_group if training and process_group else ""
    norm = MixNorm(weight, bias, mean, var, float(eps), momentum, training, group)
    return norm, p_clean if two else None, is_clean if two else None


def checked_residual(
    residual: Tensor | None, activation: str | None, output: tuple[int, ...], input: Tensor
) -> Tensor | None:
    """``residual`` with autocast applied; also checks the activation."""
    check_activation(activation)
    if residual is None:
        return None
    residual = autocast(check_image(residual, "residual"))
    if tuple(residual.shape) != output:
        raise ValueError(f"residual must have the output's shape {list(output)}, got {list(residual.shape)}")
    check_like(residual, "residual", input, "input")
    return residual


# --- checks


def check_activation(activation: object) -> None:
    """Raises ValueError unless ``activation`` is one of ``ACTIVATIONS``."""
    if activation is None or (isinstance(activation, str) and activation in ACTIVATIONS):
        return
    names = ", ".join(f'"{name}"' for name in ACTIVATIONS if name)
    raise ValueError(f"activation must be {names} or None, got {activation!r}")


def check_image(x: object, name: str) -> Tensor:
    """``x``; TypeError or ValueError unless it is a dense floating-point tensor of 4 dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions, got shape {list(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    return x


def check_like(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """Raises ValueError for another device, TypeError for another dtype than ``other``'s."""
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}: put both on one device")
    if x.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, {other_name} {other.dtype}: they must be the same")


def check_table(
    x: object, name: str, shape: tuple[int | None, ...], meaning: str, input: Tensor, boolean: bool = False
) -> None:
    """Raises unless ``x`` has ``shape`` (None: 1 or 2), a dtype that fits, and the device of ``input``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {meaning}, got {type(x).__name__}")
    known = 1 if shape[0] is None else 0  # the first of the sizes that are known
    if x.dim() != len(shape) or tuple(x.shape[known:]) != shape[known:]:
        sizes = ", ".join("1 or 2" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape {meaning} = [{sizes}], got {list(x.shape)}")
    if boolean and x.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {x.dtype}")
    if not boolean and x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if x.device != input.device:
        raise ValueError(f"{name} is on {x.device}, input on {input.device}: put both on one device")


def _check_momentum(momentum: object, running_mean: Tensor) -> None:
    if isinstance(momentum, Tensor):
        if tuple(momentum.shape) != (running_mean.shape[0],):
            raise ValueError(
                f"momentum must be a number or have one value per row [{running_mean.shape[0]}], "
                f"got shape {list(momentum.shape)}"
            )
    elif isinstance(momentum, bool) or not isinstance(momentum, float | int):
        raise TypeError(f"momentum must be a number or a tensor, got {type(momentum).__name__}")
    elif not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")


def _check_more_than_one_value(is_clean: Tensor | None, batch: int, input: Tensor) -> None:
    # the caller has checked that an image has one pixel: only then can a branch have one value per channel
    if input.is_meta or (input.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    counts = [batch] if is_clean is None else [int((~is_clean).sum()), int(is_clean.sum())]
    if 1 in counts:
        raise ValueError(
            f"expected more than 1 value per channel when training, got one in a branch of a batch of "
            f"{batch} with a single pixel"
        )


def _pair(value: object, name: str, least: int) -> tuple[int, int]:
    value = plain(value)
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not (_is_int(pair[0]) and _is_int(pair[1])):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if pair[0] < least or pair[1] < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    if pair[0] > _LARGEST or pair[1] > _LARGEST:
        raise ValueError(f"{name} must be at most 2**62, got {value!r}")
    return (pair[0], pair[1])


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# is_autocast_enabled raises for other devices; torch.compile of torch 2.11 cannot trace is_autocast_available
_AUTOCASTING = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla")
    if torch.amp.is_autocast_available(kind)
)


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype of autocast, if that is enabled for its device; float64 is not changed."""
    device = x.device.type
    if device in _AUTOCASTING and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
