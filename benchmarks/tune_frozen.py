"""Chooses the forms of frozen networks (``launch_config.FROZEN_NETWORK``) for ``awnet bench tune``.

The training attack on an AW-Net (:class:`awnet.attacks.GraphedPGD`) is timed, on a GPU the replay of its CUDA
graph. A form is timed only if logits and gradients are about as accurate as those of the default form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from awnet.attacks import GraphedPGD
from awnet.models import create_model
from awnet.nn import MixBatchNorm2d, inference_copy
from awnet.ops import launch_config

Forms = Mapping[str, str]
_STEPS = 4  # of the timed attack
_MARGIN = 1.005  # the replay of a graph varies less than the launches of single kernels


class FrozenNetworkTimer:
    """The training attack on ``model`` with frozen networks of given forms.

    Args:
        model: name of the model.
        batch, size: number of the images, and their rows and columns.
        dtype: of the inference copy.
        device: of model and images.
    """

    def __init__(self, model: str, batch: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = _with_statistics(create_model(model), generator).to(device).train()
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = torch.rand(batch, 3, size, size, generator=generator).to(device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch,), generator=generator).to(device)
        self.index = torch.arange(batch, device=device)
        self.dtype = dtype
        self._attacks: dict[tuple[str, ...], GraphedPGD] = {}

    def attack(self, forms: Forms) -> Tensor:
        """Runs the attack; the first two calls compile kernels and capture the graph."""
        key = tuple(forms.values())
        if key not in self._attacks:
            self._attacks[key] = GraphedPGD(
                self.model, num_classes=10, dtype=self.dtype, eps=8 / 255, step_size=2 / 255, steps=_STEPS
            )
        with launch_config.use_frozen_network(**forms):
            return self._attacks[key](self.images, self.labels, index=self.index)

    def close(self, forms: Forms) -> None:
        """Drops the graph of ``forms``, which holds the memory of a whole batch."""
        self._attacks.pop(tuple(forms.values())).close()

    def errors(self, forms: Forms) -> tuple[float, float]:
        """Relative errors of logits and image gradients, against the default forms in float32."""
        expected = self._logits_and_gradient(launch_config.default_forms(), torch.float32)
        actual = self._logits_and_gradient(forms, self.dtype)
        logits, gradient = (
            float((a.double() - b.double()).norm() / b.double().norm())
            for a, b in zip(actual, expected, strict=True)
        )
        return logits, gradient

    def _logits_and_gradient(self, forms: Forms, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with launch_config.use_frozen_network(**forms):
            copy = inference_copy(self.model, dtype)
            assert copy is not None
            x = self.images[:16].clone(memory_format=torch.channels_last).requires_grad_()
            logits = copy(x)
            loss = torch.nn.functional.cross_entropy(logits.float(), self.labels[:16], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
        return logits.detach(), gradient


def _with_statistics(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """``model`` with norms and heads that differ from their initial values, which would hide errors."""
    with torch.no_grad():
        for name, module in model.named_modules():
            tensors = []
            if isinstance(module, MixBatchNorm2d):
                tensors = [module.weight, module.bias, module.running_mean]
                module.running_var.mul_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            elif name.endswith("signal_heads"):
                tensors = [module.weight]
            for tensor in tensors:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def fastest_forms(
    timer: FrozenNetworkTimer,
    do_bench: Callable[[Callable[[], object]], float],
    report: Callable[[str], None],
) -> tuple[dict[str, str], float, float]:
    """The fastest forms, part by part, their time and that of the default forms, in ms of an attack step.

    A form that raises RuntimeError (cuDNN may have no algorithm for it), or with which logits or gradients
    have more than twice the error of the default forms, is never chosen; ``report`` gets the reason.
    """
    best = launch_config.default_forms()
    allowed = timer.errors(best)

    def measure(forms: dict[str, str]) -> float:
        for kind, got, limit in zip(("logits", "gradients"), timer.errors(forms), allowed, strict=True):
            if not got <= 2 * limit:
                raise RuntimeError(
                    f"{kind} have a relative error of {got:.2g}, the default forms {limit:.2g}"
                )
        for _ in range(2):
            timer.attack(forms)
        took = do_bench(partial(timer.attack, forms)) / _STEPS
        timer.close(forms)
        return took

    first = least = measure(best)
    for part, known in launch_config.FROZEN_NETWORK.items():
        for form in known[1:]:
            candidate = {**best, part: form}
            try:
                took = measure(candidate)
            except RuntimeError as error:
                report(f"{part}={form} is not used: {error}")
                continue
            if took * _MARGIN < least:
                best, least = candidate, took
    return best, least, first
