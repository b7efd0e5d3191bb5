"""Optimizers and schedules of the learning rate."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR, OneCycleLR

from awnet.nn import routers

OptimizerName = Literal["sgd", "adamw"]
ScheduleName = Literal["step", "onecycle", "cosine", "linear"]


def build_optimizer(recipe: Any, model: nn.Module) -> torch.optim.Optimizer:
    """The fused optimizer of a :class:`Recipe`: router and heads at ``router_lr``, the rest at ``lr``.

    A fused optimizer reads ``found_inf`` and ``grad_scale`` on the device, so that a step can be skipped or
    its gradient clipped without waiting. ``momentum`` is the first beta of ``adamw``; its second is 0.999.
    """
    slow = {id(p) for router in routers(model) for p in router.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in slow], "lr": recipe.lr},
        {"params": [p for p in model.parameters() if id(p) in slow], "lr": recipe.router_lr},
    ]
    groups = [group for group in groups if group["params"]]
    shared = {"lr": groups[0]["lr"], "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.nesterov, **shared)
    capturable = any(p.is_cuda for p in model.parameters())
    return torch.optim.AdamW(groups, betas=(recipe.momentum, 0.999), capturable=capturable, **shared)


def build_scheduler(recipe: Any, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> LRScheduler:
    """The schedule of a :class:`Recipe`, stepped once per optimizer step.

    In the first ``warmup`` steps, n = 0, 1, …, the rate is multiplied by (n + 1) / warmup.
    """
    name, decay = recipe.schedule, recipe.lr_decay
    total, warmup = recipe.epochs * steps_per_epoch, round(recipe.warmup_epochs * steps_per_epoch)
    milestones = [milestone * steps_per_epoch for milestone in recipe.milestones]
    if name == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lr=rates, total_steps=total, cycle_momentum=False)
    if name == "step" and not warmup:
        return MultiStepLR(optimizer, milestones, gamma=decay)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if name == "step":
            return float(decay ** sum(step >= milestone for milestone in milestones))
        share = min(1.0, (step - warmup) / max(1, total - warmup))
        return 0.5 * (1 + math.cos(math.pi * share)) if name == "cosine" else 1 - share

    return LambdaLR(optimizer, factor)
