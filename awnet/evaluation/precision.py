"""Chooses what an evaluation runs: the model or an inference copy, in float32 or bfloat16."""

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
"""The description of each precision in reports."""


class Prepared(NamedTuple):
    """The module that an evaluation runs.

    module: an inference copy of the model, or the model itself; in bfloat16 the model under autocast.
    runs_on: which of the two, with the reason if it is the model itself, for the report.
    flag: a warning for the report if the copy had to be discarded; None otherwise.
    """

    module: nn.Module
    runs_on: str
    flag: str | None = None


COPY = "a frozen copy of the model"
ROUNDING = 1e-4
"""Largest relative difference between a float32 copy and its model that counts as rounding.

Two orders of summation in a ResNet differ by about 1e-6. An error in a copy (a layer, a branch, a setting)
changes logits by far more."""


def prepare(model: nn.Module, precision: PrecisionName, x: Tensor) -> Prepared:
    """The module that an evaluation of ``model`` runs; its parameters get no gradients.

    It is an inference copy if :func:`awnet.nn.not_supported` gives no reason against one and the copy's
    logits and routing for the images ``x`` [B, C, H, W] equal the model's up to rounding; for ``"float32"``
    the copy has the model's dtype. Otherwise it is the model itself, in bfloat16 under autocast.
    """
    if precision not in DESCRIPTIONS:
        raise ValueError(f"precision must be one of {', '.join(DESCRIPTIONS)}, got {precision!r}")
    low = precision == "bfloat16"
    itself = in_bfloat16(model, copied=False) if low else model
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
            f"the inference copy's outputs differed from the model's by {difference:.1e} of the largest on "
            "one batch, so the model itself was evaluated: please report this"
        )
        logger.warning(flag)
        return Prepared(
            itself, f"the model itself, frozen in place: its copy differed by {difference:.1e}", flag
        )
    return Prepared(in_bfloat16(model, copied=True) if low else copy, COPY)


def in_bfloat16(model: nn.Module, *, copied: bool) -> nn.Module:
    """An inference copy of ``model`` in bfloat16, or without ``copied`` the model under autocast."""
    copy = inference_copy(model, torch.bfloat16) if copied else None
    return _Autocast(model) if copy is None else copy


@torch.no_grad()
def _difference(model: nn.Module, copy: InferenceCopy, x: Tensor) -> float:
    """Largest difference of logits and routing on ``x``, relative to the largest value of each."""
    with frozen(model):
        expected, got = [model(x)], [copy(x)]
        if has_router(model):
            for outputs, module in ((expected, model), (got, copy)):
                routing = route(module, x)
                outputs += [routing.p_clean, *routing.filter_scales]
                outputs += [] if routing.type_logits is None else [routing.type_logits]
    if [value.shape for value in got] != [value.shape for value in expected]:
        return math.inf
    shares = [0.0]
    for one, other in zip(got, expected, strict=True):
        one, other = one.double().nan_to_num(), other.double().nan_to_num()
        scale = max(float(other.abs().max()), 1e-30) if other.numel() else 1.0
        shares.append(float((one - other).abs().max()) / scale if other.numel() else 0.0)
    return max(shares)


class _Autocast(nn.Module):
    """A model that runs under bfloat16 autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        if name == "model" or name in self.__dict__["_modules"]:
            return super().__getattr__(name)
        value = getattr(self.model, name)
        if name not in ("route", "exit_of") or not callable(value):
            return value

        def run(x: Tensor) -> Any:
            with torch.autocast(x.device.type, torch.bfloat16):
                return value(x)

        return run

    def forward(self, x: Tensor, *, routing: Routing | None = None) -> Tensor:
        arguments = {} if routing is None else {"routing": routing}
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x, **arguments)
        return logits
