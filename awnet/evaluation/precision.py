"""The arithmetic that an evaluation runs in."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from awnet.attacks import frozen
from awnet.nn import InferenceCopy, Routing, has_router, inference_copy, not_supported, route

logger = logging.getLogger(__name__)

PrecisionName = Literal["float32", "bfloat16"]

DESCRIPTIONS = {"float32": "float32, TF32 off", "bfloat16": "bfloat16"}
"""What reports say of each precision."""


class Prepared(NamedTuple):
    """What an evaluation runs in place of the user's model.

    module: a frozen copy of the model, or the model itself; in bfloat16 the model under autocast.
    runs_on: which of them, and for the model itself why, for the report.
    flag: a warning for the report where the copy had to be given up; None otherwise.
    """

    module: nn.Module
    runs_on: str
    flag: str | None = None


COPY = "a frozen copy of the model"
ROUNDING = 1e-4
"""Largest difference between a float32 copy and its model, as a share of the largest value, that is rounding.

A ResNet's two orders of summation differ by some 1e-6. What a copy could get wrong (a layer, a branch, a
setting) changes logits by far more."""


def prepare(model: nn.Module, precision: PrecisionName, x: Tensor) -> Prepared:
    """What an evaluation of ``model`` runs: no gradient of it reaches a weight.

    What the model computes when it is called decides. A frozen copy replaces it only where
    :func:`awnet.nn.not_supported` gives no reason against it and its logits and routing for the images ``x``
    [B, C, H, W] are the model's but for rounding; for ``"float32"`` it has the model's dtype. Any other model
    runs itself, in bfloat16 under autocast.
    """
    if precision not in DESCRIPTIONS:
        raise ValueError(f"precision must be one of {', '.join(DESCRIPTIONS)}, got {precision!r}")
    low = precision == "bfloat16"
    itself = _Autocast(model) if low else model
    reason = not_supported(model)
    if reason is not None:
        logger.info("the evaluation runs the model itself: %s", reason)
        return Prepared(itself, f"the model itself, frozen in place: {reason}")
    copy = inference_copy(model)
    assert copy is not None
    difference = _difference(model, copy, x)
    tolerance = ROUNDING if copy.image_dtype in (torch.float32, torch.float64) else 0.1
    if not difference <= tolerance:
        flag = (
            f"the frozen copy's outputs differed from the model's by {difference:.1e} of the largest on one "
            "batch, so the model itself was evaluated: please report this"
        )
        logger.warning(flag)
        return Prepared(
            itself, f"the model itself, frozen in place: its copy differed by {difference:.1e}", flag
        )
    if low:
        copy = inference_copy(model, torch.bfloat16)
        assert copy is not None
    return Prepared(copy, COPY)


@torch.no_grad()
def _difference(model: nn.Module, copy: InferenceCopy, x: Tensor) -> float:
    """Largest difference of logits and routing on ``x``, each as a share of its largest value."""
    with frozen(model):
        expected, got = [model(x)], [copy(x)]
        if has_router(model):
            for found, one in ((expected, model), (got, copy)):
                routing = route(one, x)
                found += [routing.p_clean, *routing.filter_scales]
                found += [] if routing.type_logits is None else [routing.type_logits]
    if [value.shape for value in got] != [value.shape for value in expected]:
        return math.inf
    shares = [0.0]
    for one, other in zip(got, expected, strict=True):
        one, other = one.double().nan_to_num(), other.double().nan_to_num()
        scale = max(float(other.abs().max()), 1e-30) if other.numel() else 1.0
        shares.append(float((one - other).abs().max()) / scale if other.numel() else 0.0)
    return max(shares)


class _Autocast(nn.Module):
    """A model whose passes run in bfloat16 where torch holds that safe."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        if name == "model" or name in self.__dict__["_modules"]:
            return super().__getattr__(name)
        found = getattr(self.model, name)
        if name not in ("route", "exit_of") or not callable(found):
            return found

        def run(x: Tensor) -> Any:
            with torch.autocast(x.device.type, torch.bfloat16):
                return found(x)

        return run

    def forward(self, x: Tensor, *, routing: Routing | None = None) -> Tensor:
        arguments = {} if routing is None else {"routing": routing}
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x, **arguments)
        return logits
