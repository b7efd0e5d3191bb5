"""Forward passes in train mode: what the losses of ``awnet.training.losses`` are computed from.

    forward(model, batch, x_adv, options, teachers) -> outputs

A dynamic model (an AW-Net, or a module that contains one) sends each image through the branch of its kind. A
static model makes the same pass without branches.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from awnet.data.dataset import Batch
from awnet.nn import Routing, Steering, has_router, observe
from awnet.precision import at_least_float32
from awnet.training.losses import Loss, LossOptions, LossResult, MTARDWeights, Outputs


class Teachers(NamedTuple):
    """Models in eval mode without gradients; images [B, C, H, W] to logits [B, K].

    ``robust`` is None for a recipe that has only a clean teacher.
    """

    clean: nn.Module
    robust: nn.Module | None = None


class Forward(Protocol):
    """A forward pass in train mode; ``x_adv`` is None for a recipe without attack."""

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        x_adv: Tensor | None,
        options: LossOptions,
        teachers: Teachers | None,
    ) -> Any: ...


class Phase(NamedTuple):
    """One update of a training step: a forward pass, and the loss of its outputs."""

    forward: Forward
    loss: Loss

    def result(
        self,
        model: nn.Module,
        batch: Batch,
        x_adv: Tensor | None,
        options: LossOptions,
        teachers: Teachers | None = None,
        weights: MTARDWeights | None = None,
    ) -> LossResult:
        """The loss of ``model`` in train mode on a batch and its adversarial images ``x_adv``."""
        outputs = self.forward(model, batch, x_adv, options, teachers)
        return self.loss(outputs, batch.y, options, *(() if weights is None else (weights,)))


def clean_pass(
    model: nn.Module, batch: Batch, x_adv: Tensor | None, options: LossOptions, teachers: Teachers | None
) -> Outputs:
    """A pass over the clean images only; ``adversarial`` is ``clean``."""
    is_clean = torch.ones(len(batch.x), dtype=torch.bool, device=batch.x.device)
    type_logits = None
    if has_router(model):
        logits, routing = _routed_pass(model, batch.x, is_clean)
        type_logits = routing.type_logits
    else:
        logits = model(batch.x)
    logits = at_least_float32(logits)
    return Outputs(logits, logits, is_clean, type_logits)


def joint_pass(
    model: nn.Module, batch: Batch, x_adv: Tensor | None, options: LossOptions, teachers: Teachers | None
) -> Outputs:
    """One pass over [clean; adversarial] images."""
    assert x_adv is not None
    return _joint_pass(model, batch.x, x_adv, options)


def distillation_pass(
    model: nn.Module, batch: Batch, x_adv: Tensor | None, options: LossOptions, teachers: Teachers | None
) -> Outputs:
    """:func:`joint_pass`, with the logits of the clean and of the robust teacher."""
    if teachers is None or teachers.robust is None:
        raise ValueError("mtard needs teachers: pass Teachers(clean=..., robust=...)")
    assert x_adv is not None
    with torch.no_grad():
        teacher_clean, teacher_adversarial = teachers.clean(batch.x), teachers.robust(x_adv)
    outputs = _joint_pass(model, batch.x, x_adv, options)
    return outputs._replace(teacher_clean=teacher_clean, teacher_adversarial=teacher_adversarial)


def helper_pass(
    model: nn.Module, batch: Batch, x_adv: Tensor | None, options: LossOptions, teachers: Teachers | None
) -> Outputs:
    """One pass over [clean; adversarial; helper] images; the clean teacher labels the helper images."""
    if teachers is None:
        raise ValueError("hat needs a clean teacher: pass Teachers(clean=...)")
    assert x_adv is not None
    with torch.no_grad():
        labels = teachers.clean(x_adv).argmax(1)
    outputs = _joint_pass(model, batch.x, x_adv, options, helper=batch.x + 2 * (x_adv - batch.x))
    return outputs._replace(helper_labels=labels)


def _joint_pass(
    model: nn.Module, clean: Tensor, adversarial: Tensor, options: LossOptions, helper: Tensor | None = None
) -> Outputs:
    """One pass over [clean; adversarial; helper], each image through the branch of its kind.

    Helper images go through the adversarial branch, and the type loss ignores them.
    """
    size = len(clean)
    perturbed = adversarial if helper is None else torch.cat([adversarial, helper])
    x = torch.cat([clean, perturbed])
    is_clean = torch.arange(len(x), device=x.device) < size
    type_logits = None
    if not has_router(model):
        logits = model(x)
    else:
        separate = options.router_passes == "separate"
        logits, routing = _routed_pass(model, x, is_clean, size if separate else None)
        if routing.type_logits is not None:
            type_logits = routing.type_logits[: 2 * size]
    parts = at_least_float32(logits).split(size)
    return Outputs(
        parts[0], parts[1], is_clean[: 2 * size], type_logits, None if helper is None else parts[2]
    )


def _routed_pass(
    model: nn.Module, x: Tensor, is_clean: Tensor, split: int | None = None
) -> tuple[Tensor, Routing]:
    """Logits and routing of one pass; with ``split`` the router sees ``x[:split]`` in a separate pass."""

    def route_in_two(network: Any, images: Tensor) -> Routing:
        one, two = network.route(images[:split]), network.route(images[split:])
        has_type = one.type_logits is not None
        return Routing(
            type_logits=torch.cat([one.type_logits, two.type_logits]) if has_type else None,
            p_clean=torch.cat([one.p_clean, two.p_clean]),
            filter_scales=[
                torch.cat(pair) for pair in zip(one.filter_scales, two.filter_scales, strict=True)
            ],
        )

    steering = Steering(route=None if split is None else route_in_two, is_clean=is_clean)
    logits = observe(model, x, steering)
    if len(steering.routings) != 1:
        raise ValueError(
            f"{type(model).__name__} calls the routed network in it {len(steering.routings)} times for one "
            "batch; training needs exactly one call, on the whole batch"
        )
    return logits, steering.routings[0]
