"""Frozen bfloat16 networks on CPUs with AMX: whether they can run there, and their packed filters.

The environment variable ``AWNET_AMX`` chooses: ``auto`` (the default) uses AMX if the processor has it,
``0`` never does, and ``emulate`` runs the same code on plain loops, which is slow and for tests only.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from awnet.ops.backends import native

logger = logging.getLogger(__name__)

_MODES = ("auto", "0", "emulate")

# A tile holds 16 images: with fewer images than this the library was as fast (docs/performance-notes.md).
_FEWEST_IMAGES = 8


def mode() -> str:
    """The value of ``AWNET_AMX``. Raises ValueError unless it is ``auto``, ``0`` or ``emulate``."""
    chosen = os.environ.get("AWNET_AMX") or "auto"
    if chosen not in _MODES:
        raise ValueError(f"AWNET_AMX must be one of {', '.join(_MODES)}, got {chosen!r}")
    return chosen


@cache
def _native_obstacle() -> str | None:
    return native.load()


@cache
def hardware_obstacle() -> str | None:
    """Why this process cannot use AMX; None if it can. Call it only if the native module is loaded."""
    module = importlib.import_module("awnet._C")
    if not hasattr(module, "amx_obstacle"):
        return f"{module.__file__} was built from older sources; {native.REBUILD}"
    reason: str = module.amx_obstacle()
    if reason.startswith("the kernel refuses"):
        logger.warning(f"bfloat16 networks run without AMX: {reason}")
    return reason or None


def obstacle() -> str | None:
    """Why frozen bfloat16 networks do not run on AMX tiles in this process; None if they do."""
    chosen = mode()
    if chosen == "0":
        return "AWNET_AMX=0"
    if _native_obstacle() is not None or chosen == "emulate":
        return _native_obstacle()
    return hardware_obstacle()


def layer_obstacle(groups: int, activation: str | None) -> str | None:
    """Why a frozen network with such a layer cannot run on AMX tiles; None if it may."""
    if groups != 1:
        return "which do not support grouped convolutions"
    if activation not in ("relu", None):
        return f"whose networks have no activation {activation!r}"
    return None


def runs(
    x: Tensor, weights: Sequence[Tensor], groups: Sequence[int], activations: Sequence[str | None] = ()
) -> bool:
    """Whether a frozen network on images ``x`` runs on AMX tiles.

    ``groups`` and ``activations`` are those of its layers.
    """
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and len(x) >= _FEWEST_IMAGES
        and all(weight.dtype == torch.bfloat16 for weight in weights)
        and all(layer_obstacle(count, None) is None for count in groups)
        and all(layer_obstacle(1, activation) is None for activation in activations)
        and obstacle() is None
    )


class PackedWeights:
    """The filters of a frozen network in the order in which tiles read them, cached between calls.

    One object belongs to one list of weights. The filters are packed again after ``clear``, and after a
    weight was written to or replaced.
    """

    def __init__(self) -> None:
        self._packed: list[Tensor] = []
        self._key: tuple[tuple[int, int], ...] = ()

    def clear(self) -> None:
        self._packed = []

    def of(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The packed filters of ``weights``."""
        # an inference tensor has no version counter: its owner calls `clear`
        key = tuple((w.data_ptr(), -1 if w.is_inference() else w._version) for w in weights)
        if not self._packed or key != self._key:
            with torch.inference_mode(False), torch.no_grad():
                self._packed = [torch.ops.awnet.amx_pack_weight(w.detach()) for w in weights]
            self._key = key
        return self._packed
