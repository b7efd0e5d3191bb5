"""Optimizers and schedules of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR, OneCycleLR

OptimizerName = Literal["sgd", "adamw"]
ScheduleName = Literal["step", "onecycle", "cosine", "linear"]


def build_optimizer(
    name: OptimizerName, groups: list[dict[str, Any]], *, momentum: float, nesterov: bool, weight_decay: float
) -> torch.optim.Optimizer:
    """A fused optimizer of parameter groups ``{"params": [...], "lr": ...}``.

    A fused optimizer reads ``found_inf`` and ``grad_scale`` on the device, so that a step can be skipped or
    its gradient clipped without waiting. ``momentum`` is the first beta of ``adamw``; its second is 0.999.
    """
    lr = groups[0]["lr"]
    if name == "sgd":
        return torch.optim.SGD(
            groups, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=True
        )
    return torch.optim.AdamW(
        groups,
        lr=lr,
        betas=(momentum, 0.999),
        weight_decay=weight_decay,
        fused=True,
        capturable=any(p.is_cuda for group in groups for p in group["params"]),
    )


def build_scheduler(
    name: ScheduleName,
    optimizer: torch.optim.Optimizer,
    *,
    total: int,
    warmup: int,
    milestones: Sequence[int],
    decay: float,
) -> LRScheduler:
    """The schedule, stepped once per optimizer step.

    Args:
        name: ``step`` multiplies the rate by ``decay`` at each of ``milestones``; ``cosine`` and ``linear``
            lower it to 0 at ``total``; ``onecycle`` raises it to the optimizer's rate and lowers it to nearly
            0 (Smith and Topin), with constant momentum.
        total, warmup, milestones: in steps. In the first ``warmup`` steps, n = 0, 1, …, the rate is
            multiplied by (n + 1) / warmup instead; ``onecycle`` includes a warm-up.
    """
    if name == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lr=rates, total_steps=total, cycle_momentum=False)
    if name == "step" and not warmup:
        return MultiStepLR(optimizer, list(milestones), gamma=decay)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if name == "step":
            return float(decay ** sum(step >= milestone for milestone in milestones))
        share = min(1.0, (step - warmup) / max(1, total - warmup))
        return 0.5 * (1 + math.cos(math.pi * share)) if name == "cosine" else 1 - share

    return LambdaLR(optimizer, factor)
