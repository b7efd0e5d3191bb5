"""From the arguments of a public function to a checked :class:`Call`, with autocast applied.

Each check says which argument, what came and what is expected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from awnet.ops.autograd import Call
from awnet.scalars import plain

Size2 = int | tuple[int, int]

_MOST = 2**62  # of a stride, padding or dilation, which are 64-bit integers in torch
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def conv_call(
    input: Tensor,
    weight: Tensor,
    filter_scale: Tensor | None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Call:
    """``filter_scaled_conv2d``."""
    input = _autocast(check_image(input, "input"))
    weight = _autocast(check_image(weight, "weight"))
    check_like(weight, "weight", input, "input")
    sizes = (
        _pair(stride, "stride", 1),
        _pair(padding, "padding", 0),
        _pair(dilation, "dilation", 1),
    )
    groups = plain(groups)
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
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
    call = Call(input, weight, filter_scale, *(None,) * 7, False, 1e-5, False, *sizes, groups)
    output = _output_shape(call)
    if output[2] < 1 or output[3] < 1:
        raise ValueError(
            f"input {list(input.shape)} is too small for weight {list(weight.shape)} with stride={stride}, "
            f"padding={padding}, dilation={dilation}: the output would have size {list(output[2:])}"
        )
    if filter_scale is not None:
        check_table(filter_scale, "filter_scale", (output[0], output[1]), "[B, C_out]", input)
    return call


def norm_call(
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
    process_group: str | None = None,
    names: tuple[str, str] = ("weight", "bias"),
    convolution: Call | None = None,
) -> Call:
    """``mix_batch_norm``; with ``convolution`` the norm of that call's output."""
    eps, momentum, training = plain(eps), plain(momentum), plain(training)
    if convolution is None:
        input = _autocast(check_image(input, "input"))
        convolution = Call(input, *(None,) * 9, False, eps, False, (1, 1), (0, 0), (1, 1), 1)
        if input.shape[2] == 0 or input.shape[3] == 0:
            raise ValueError(f"input must have at least one pixel, got shape {list(input.shape)}")
    batch, channels, height, width = _output_shape(convolution)
    tables = {names[0]: weight, names[1]: bias, "running_mean": running_mean, "running_var": running_var}
    for name, table in tables.items():
        check_table(table, name, (None, channels), "[2, C] or [1, C]", input)
        if table.shape[0] not in (1, 2):
            raise ValueError(f"{name} must have 1 or 2 rows (adversarial, clean), got {table.shape[0]}")
    for first, second in (names, ("running_mean", "running_var")):
        if tables[first].shape != tables[second].shape:
            raise ValueError(
                f"{first} and {second} must have one shape, got {list(tables[first].shape)} and "
                f"{list(tables[second].shape)}"
            )
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, got {type(training).__name__}")
    if not isinstance(eps, float | int) or not eps > 0:
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    _check_momentum(momentum, running_mean)
    for value, name in ((p_clean, "p_clean"), (is_clean, "is_clean")):
        if value is not None:
            check_table(value, name, (batch,), "[B]", input, boolean=name == "is_clean")
    two = weight.shape[0] == 2 or running_mean.shape[0] == 2
    if two and training and is_clean is None:
        raise ValueError("is_clean is missing: training with two branches needs each sample's kind, bool [B]")
    if two and not training and p_clean is None:
        raise ValueError("p_clean is missing: testing blends the two branches by p, [B] in [0, 1]")
    if two and training and p_clean is not None:
        raise ValueError("p_clean is for testing only: in training is_clean decides each sample's branch")
    if two and not training and is_clean is not None:
        raise ValueError("is_clean is for training only: in testing p_clean blends the branches")
    if process_group is not None and (not isinstance(process_group, str) or not process_group):
        raise TypeError(f"process_group must be a group's name or None, got {process_group!r}")
    if training and height * width == 1 and process_group is None and not torch.compiler.is_compiling():
        _check_more_than_one_value(is_clean if running_mean.shape[0] == 2 else None, batch, input)
    return convolution._replace(
        p_clean=p_clean if two else None,
        bn_weight=weight,
        bn_bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        is_clean=is_clean if two else None,
        training=training,
        eps=float(eps),
        process_group=process_group if training and process_group else "",
    )


def layer_call(
    input: Tensor,
    weight: Tensor,
    filter_scale: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    **norm: Any,
) -> Call:
    """``aw_conv2d``."""
    call = conv_call(input, weight, filter_scale, stride, padding, dilation, groups)
    call = norm_call(
        input,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        **norm,
        names=("bn_weight", "bn_bias"),
        convolution=call,
    )
    return _finished(call, residual, activation)


def affine_call(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str | None = "relu",
) -> Call:
    """``affine_conv2d``: the scale goes as ω, the shift as a bias [B, C_out] without a batch norm."""
    call = conv_call(input, weight, None, stride, padding, dilation, groups)
    assert call.input is not None
    for name, table in (("scale", scale), ("shift", shift)):
        check_table(table, name, _output_shape(call)[:2], "[B, C_out]", call.input)
    return _finished(call._replace(filter_scale=scale, bn_bias=shift), residual, activation)


def _finished(call: Call, residual: Tensor | None, activation: str | None) -> Call:
    """``call`` with its residual and activation."""
    if activation not in ("relu", None):
        raise ValueError(f'activation must be "relu" or None, got {activation!r}')
    if residual is not None:
        residual = _autocast(check_image(residual, "residual"))
        output = _output_shape(call)
        if tuple(residual.shape) != output:
            raise ValueError(
                f"residual must have the output's shape {list(output)}, got {list(residual.shape)}"
            )
        assert call.input is not None
        check_like(residual, "residual", call.input, "input")
    return call._replace(residual=residual, relu=activation == "relu")


# --- checks


def check_image(x: object, name: str) -> Tensor:
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
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}: put both on one device")
    if x.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, {other_name} {other.dtype}: they must be the same")


def check_table(
    x: object, name: str, shape: tuple[int | None, ...], meaning: str, input: Tensor, boolean: bool = False
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {meaning}, got {type(x).__name__}")
    fits = x.dim() == len(shape) and all(
        size is None or size == had for size, had in zip(shape, x.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("1 or 2" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape {meaning} = [{wanted}], got {list(x.shape)}")
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
                f"momentum must be a number or have one value a row [{running_mean.shape[0]}], "
                f"got shape {list(momentum.shape)}"
            )
    elif isinstance(momentum, bool) or not isinstance(momentum, float | int):
        raise TypeError(f"momentum must be a number or a tensor, got {type(momentum).__name__}")
    elif not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")


def _check_more_than_one_value(is_clean: Tensor | None, batch: int, input: Tensor) -> None:
    # one pixel: the only case where a branch can hold a single value, so the only one worth a look
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
    if (
        not isinstance(pair, tuple | list)
        or len(pair) != 2
        or not all(isinstance(v, int) and not isinstance(v, bool) for v in pair)
    ):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if pair[0] < least or pair[1] < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    if max(pair) > _MOST:
        raise ValueError(f"{name} must be at most 2**62, got {value!r}")
    return (pair[0], pair[1])


def _output_shape(call: Call) -> tuple[int, int, int, int]:
    assert call.input is not None
    batch, channels, height, width = call.input.shape
    if call.weight is None:
        return batch, channels, height, width

    def size(axis: int, length: int) -> int:
        assert call.weight is not None
        reach = call.dilation[axis] * (call.weight.shape[2 + axis] - 1) + 1
        return (length + 2 * call.padding[axis] - reach) // call.stride[axis] + 1

    return batch, call.weight.shape[0], size(0, height), size(1, width)


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    able = torch.amp.is_autocast_available(device)
    if able and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
