"""The training step in plain torch: the baseline of ``awnet bench train``.

The same networks with the layer written out (a convolution, the filter scale, two batch norms, the residual,
the ReLU; or, ``literal``, a grouped convolution with separate filters for each sample), PGD on a model whose
parameters require gradients, and separate passes for the clean and the adversarial images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import reference, rng
from awnet.data import ThreatModel
from awnet.nn import AWConv2d, AWNet, FilterScaledConv2d, MixBatchNorm2d, Routing
from awnet.training import Recipe, Trades


class _Norm(MixBatchNorm2d):
    """In training ``is_clean`` is True or False for the whole batch."""

    def forward(self, input: Tensor, *, p_clean: Tensor | None = None, is_clean: Any = None) -> Tensor:
        if self.training:
            return self._branch(input, int(bool(is_clean)))
        if self.branches == "one":
            return self._branch(input, 0)
        assert p_clean is not None
        p = p_clean[:, None, None, None].to(input.dtype)
        return p * self._branch(input, 1) + (1 - p) * self._branch(input, 0)

    def _branch(self, input: Tensor, row: int) -> Tensor:
        affine, stat = min(row, len(self.weight) - 1), min(row, len(self.running_mean) - 1)
        tables = (self.running_mean[stat], self.running_var[stat], self.weight[affine], self.bias[affine])
        assert self.momentum is not None
        return F.batch_norm(input, *tables, self.training, self.momentum, self.eps)


class _Convolution(FilterScaledConv2d):
    literal = False

    def convolved(self, input: Tensor, filter_scale: Tensor | None) -> Tensor:
        input, options = self._convolution(input)
        if self.literal:
            return reference.filter_scaled_conv2d(input, self.weight, filter_scale, **options)
        u = F.conv2d(input, self.weight, **options)
        return u if filter_scale is None else u * filter_scale[:, :, None, None].to(u.dtype)

    def forward(self, input: Tensor, filter_scale: Tensor | None = None) -> Tensor:
        output = self.convolved(input, filter_scale)
        return output if self.bias is None else output + self.bias.to(output.dtype)[:, None, None]


class _Layer(AWConv2d, _Convolution):
    def forward(
        self,
        input: Tensor,
        filter_scale: Tensor | None = None,
        *,
        p_clean: Tensor | None = None,
        is_clean: Any = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        output = self.bn(self.convolved(input, filter_scale), p_clean=p_clean, is_clean=is_clean)
        if residual is not None:
            output = output + residual
        return reference.activated(output, self.activation)


_PLAIN: dict[type, type] = {MixBatchNorm2d: _Norm, FilterScaledConv2d: _Convolution, AWConv2d: _Layer}


def plain_model(model: nn.Module, *, literal: bool = False) -> nn.Module:
    """A copy of ``model`` with the same weights, its layers written out in plain torch."""
    model = copy.deepcopy(model)
    for module in model.modules():
        written_out = _PLAIN.get(type(module))
        if written_out is not None:
            module.__class__ = written_out
            if isinstance(module, _Convolution):
                module.literal = literal
    return model


class SeparatePasses(nn.Module):
    """A plain AW-Net for ``awnet.training.forward``, with one forward pass for each call of :meth:`route`.

    The images of the first call are clean, those of the second adversarial.
    """

    def __init__(self, model: AWNet) -> None:
        super().__init__()
        self.model = model
        self._sizes: list[int] = []

    def route(self, x: Tensor) -> Routing:
        self._sizes.append(len(x))
        return self.model.route(x)

    def forward(self, x: Tensor, *, is_clean: Tensor, routing: Routing) -> Tensor:
        sizes, self._sizes = self._sizes, []
        scales = zip(*(scale.split(sizes) for scale in routing.filter_scales), strict=True)
        parts = x.split(sizes)
        return torch.cat(
            [
                self.model.dynamic(part, list(filter_scales), None, kind)
                for part, filter_scales, kind in zip(
                    parts, scales if routing.filter_scales else [()] * len(parts), (True, False), strict=False
                )
            ]
        )


def check_plain(recipe: Recipe) -> None:
    """Raises ValueError for settings of ``recipe`` that the plain step does not have."""
    off = {"inner_type_weight": 0.0, "attack_kind": "pgd", "awp": 0.0, "optimizer": "sgd", "ema_decay": 0.0}
    for name, value in (off | {"temperature_lr": 0.0}).items():
        if getattr(recipe, name, value) != value:
            raise ValueError(f"{name} must be {value}: the step in plain torch does not have it")


def plain_attack(
    recipe: Recipe,
    model: nn.Module,
    threat_model: ThreatModel,
    seed: int,
    autocast: Callable[[], Any] = nullcontext,
) -> Any:
    """The recipe's PGD, from the same noise, with a backward pass that reaches the parameters too."""
    check_plain(recipe)
    kl = isinstance(recipe, Trades)
    trades = kl and recipe.name == "trades"
    default = threat_model.trades_train_step_size if trades else threat_model.train_step_size
    step_size = default if recipe.attack_step_size is None else recipe.attack_step_size
    key = rng.key("attack start", seed)

    def attack(x: Tensor, y: Tensor, *, index: Tensor) -> Tensor:
        model.eval()
        low, high = (x - threat_model.eps).clamp(min=0), (x + threat_model.eps).clamp(max=1)
        x_adv = (x + recipe.attack_noise * rng.normal(key, index, x.shape[1:])).clamp(low, high)
        if kl:
            with torch.no_grad(), autocast():
                target = model(x).float().softmax(1)
        for _ in range(recipe.attack_steps):
            x_adv.requires_grad_(True)
            with autocast():
                logits = model(x_adv).float()
            if kl:
                loss = F.kl_div(logits.log_softmax(1), target, reduction="sum")
            else:
                loss = F.cross_entropy(logits, y, reduction="sum")
            loss.backward()
            assert x_adv.grad is not None
            x_adv = (x_adv.detach() + step_size * x_adv.grad.sign()).clamp(low, high)
        model.train()
        return x_adv

    return attack


def plain_step(
    recipe: Recipe,
    model: nn.Module,
    attack: Any,
    teachers: Any,
    weights: Any,
    autocast: Callable[[], Any],
) -> Callable[[Any], Any]:
    """Clean and adversarial passes, backward, and torch's SGD."""
    check_plain(recipe)
    passes, router = model, set[int]()
    if isinstance(model, AWNet):
        passes, router = SeparatePasses(model), {id(p) for p in model.router.parameters()}
    options = replace(recipe.loss_options(), router_passes="separate")
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in router], "lr": recipe.lr},
        {"params": [p for p in model.parameters() if id(p) in router], "lr": recipe.router_lr},
    ]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )

    (phase,) = recipe.phases()

    def step(batch: Any) -> Any:
        optimizer.zero_grad()
        with autocast():
            x_adv = None
            if recipe.needs_attack:
                x_adv = attack(batch.x, batch.y, index=batch.index)
                optimizer.zero_grad()  # gradients that the attack left with the parameters
            result = phase.result(passes, batch, x_adv, options, teachers, weights)
        result.total.backward()
        optimizer.step()
        return result.terms

    return step
