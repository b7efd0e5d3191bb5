"""Full float32 precision for a block of code, and the precision in which a model computes."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Backends and operations of torch's ``fp32_precision``, parents before children: "none" inherits the value of
# the backend's "all", and that of ("generic", "all").
FP32_SETTINGS = (
    *(("generic", "all"), ("cuda", "all"), ("mkldnn", "all")),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")),
)
_AUTOCAST = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")
_ONEDNN_VARIABLES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")


def check_environment() -> None:
    """Raises ValueError if an environment variable requests less than float32; torch cannot override it."""
    for name in _ONEDNN_VARIABLES:
        if os.environ.get(name, "").upper() not in ("", "STRICT"):
            raise ValueError(
                f"the environment variable {name}={os.environ[name]} lets float32 convolutions and products "
                "run in less than float32: unset it"
            )


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged in float64: 16 bits are too few for losses and differences."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


_lock = threading.Lock()
_depth = 0
_before: Callable[[], None] = lambda: None  # noqa: E731


@contextmanager
def full_precision() -> Iterator[None]:
    """Runs matrix products and convolutions of float32 tensors in full float32 for a block of code.

    Autocast is disabled for every device type. TF32 and bfloat16 are disabled by all settings of torch:
    ``fp32_precision`` of all backends and operations, ``torch.set_float32_matmul_precision``, ``allow_tf32``,
    and reduced-precision reductions and accumulation of half-precision products. All settings are restored
    after the block, also on an exception.

    Blocks may be nested and may run in several threads. The settings are per process and are restored when
    the last block ends; autocast is per thread.

    Raises:
        ValueError: the environment variable ``ONEDNN_DEFAULT_FPMATH_MODE`` requests less than float32, which
            no setting of torch overrides.
    """
    global _depth, _before
    check_environment()
    with _lock:
        if _depth == 0:
            _before = _set_full_precision()
        _depth += 1
    try:
        with ExitStack() as held:
            for kind in _AUTOCAST:
                if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                    held.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _before()


def _set_full_precision() -> Callable[[], None]:
    """Sets full precision; returns a function that restores the previous settings."""
    get: Any = torch._C._get_fp32_precision_getter
    put: Any = torch._C._set_fp32_precision_setter
    previous = {}
    for (
        backend,
        op,
    ) in FP32_SETTINGS:  # with its parents at "none" the getter does not return an inherited value
        previous[backend, op] = get(backend, op)
        put(backend, op, "none")
    for backend, op in FP32_SETTINGS:
        put(backend, op, "ieee")
    # Both the older settings and ``fp32_precision`` are set, because torch raises if they contradict.
    # With "ieee" everywhere, reading an older setting raises if and only if it is True.
    matmul = torch.get_float32_matmul_precision()
    cudnn = _allows(torch._C._get_cudnn_allow_tf32)
    onednn = _allows(torch._C._get_onednn_allow_tf32)
    half = torch._C._get_cublas_allow_fp16_reduced_precision_reduction()
    bfloat = torch._C._get_cublas_allow_bf16_reduced_precision_reduction()
    accumulation = torch._C._get_cublas_allow_fp16_accumulation()

    def set_older(matmul: str, cudnn: bool, onednn: bool, half: Any, bfloat: Any, accumulation: bool) -> None:
        if torch.get_float32_matmul_precision() != matmul:
            torch.set_float32_matmul_precision(matmul)
        torch._C._set_cudnn_allow_tf32(cudnn)
        if onednn != _allows(torch._C._get_onednn_allow_tf32):
            torch._C._set_onednn_allow_tf32(onednn)
        torch._C._set_cublas_allow_fp16_reduced_precision_reduction(*_pair(half))
        torch._C._set_cublas_allow_bf16_reduced_precision_reduction(*_pair(bfloat))
        torch._C._set_cublas_allow_fp16_accumulation(accumulation)

    def restore() -> None:
        for backend, op in FP32_SETTINGS:
            put(backend, op, "ieee")
        set_older(matmul, cudnn, onednn, half, bfloat, accumulation)
        for (backend, op), value in previous.items():
            put(backend, op, value)

    set_older("highest", False, False, (False, True), (False, True), False)
    for backend, op in FP32_SETTINGS:  # the older setters change these
        put(backend, op, "ieee")
    return restore


def _allows(read: Callable[[], Any]) -> bool:
    try:
        return bool(read())
    except RuntimeError:
        return True


def _pair(value: Any) -> tuple[bool, ...]:
    return value if isinstance(value, tuple) else (value,)


def computed_in(model: nn.Module, x: Tensor) -> torch.dtype:
    """The least precise floating-point dtype in which ``model(x)`` computes.

    The operands of every operation count, also within autocast blocks of the model, but not those of casts
    and copies. Compiled parts run uncompiled.
    """
    seen = _Dtypes()
    # without dynamo nothing is compiled, and loading it takes seconds
    stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with torch.no_grad(), stance, seen:
        model(x)
    return max(seen.dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=x.dtype)


class _Dtypes(TorchDispatchMode):
    """Collects the floating-point dtypes of operands."""

    _CASTS = frozenset(("_to_copy", "copy_", "clone", "detach", "lift_fresh", "empty_like", "zeros_like"))

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not func.is_view and func.overloadpacket.__name__ not in self._CASTS:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and value.is_floating_point():
                    self.dtypes.add(value.dtype)
        return func(*args, **kwargs)
