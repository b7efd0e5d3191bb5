"""One implementation on one problem, and the check of its results before it is timed."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from awnet.ops import use_backend

from .cases import Case, LayerCase, Mode, Problem, step
from .providers import Provider, providers, unfused


class Trial:
    """A step to call repeatedly. The images rotate over copies, so that they are not in a cache."""

    def __init__(
        self, case: Case, problem: Problem, provider: Provider, mode: Mode, upstream: Tensor, copies: int
    ) -> None:
        self.mode, self.upstream, self.provider = mode, upstream, provider
        self.problem = problem = problem.clone()
        uses_awnet_module = problem.module is not None and provider.backend is not None
        device = problem.image.device
        self.forward = case.forward(
            problem,
            None if uses_awnet_module else provider.layer,
            mode,
            compiler(device) if provider.compiled else None,
        )
        self.backend = provider.backend if uses_awnet_module else None
        for parameter in problem.parameters.values():
            parameter.requires_grad_(mode == "training" or (mode == "attack" and not provider.frozen))
        self.leaves = case.leaves(problem, mode)
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        self.differentiates_image = mode == "attack" or (mode == "training" and not case.image_is_data)
        images = [problem.image.detach().clone() for _ in range(copies)]
        for image in images:
            image.requires_grad_(self.differentiates_image)
        self.images = cycle(images)

    def __call__(self) -> dict[str, Tensor]:
        image = next(self.images)
        leaves = {"image": image, **self.leaves} if self.differentiates_image else self.leaves
        with _use_backend(self.backend):
            return step(self.forward, image, leaves, self.problem.running, self.mode, self.upstream)


def _use_backend(name: str | None) -> Any:
    return nullcontext() if name is None else use_backend(name)


def compiler(device: torch.device) -> Callable[[Any], Any]:
    """The function that compiles a provider's layer or module on ``device``."""
    # no CUDA graphs of torch.compile: awnet.benchmarks.timing captures all providers in the same way
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    return lambda what: torch.compile(what, mode=mode, dynamic=False)


def exact_provider(case: Case) -> Provider:
    """The provider whose float64 results are the reference.

    It is the literal form. For a whole network it is plain torch, because the literal form copies the weights
    for each sample; tests check that the two are equal.
    """
    return providers()["unfused" if case.name == "network" else "literal"]


def _joined(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Joins a network's parameters by kind (``conv1.bn.weight`` of all blocks).

    A single one of hundreds of gradients may be almost zero; all of one kind are not.
    """
    kinds: dict[str, list[Tensor]] = {}
    for name, value in values.items():
        what, _, place = name.rpartition(" ")
        kind = re.split(r"\.\d+\.", place)[-1] if "." in place else place
        kinds.setdefault(f"{what} {kind}".strip(), []).append(value)
    return {k: v[0] if len(v) == 1 else torch.cat([x.flatten() for x in v]) for k, v in kinds.items()}


def relative_errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """|got − expected| / |expected| of each result, joined as in ``_joined``; inf for another shape."""
    if any(got[name].shape != expected[name].shape for name in expected):
        return {name: float("inf") for name in expected if got[name].shape != expected[name].shape}
    actual, exact = _joined(got), _joined(expected)
    return {
        name: float((actual[name].double() - exact[name]).norm() / exact[name].norm().clamp(min=1e-30))
        for name in exact
    }


def error_limits(
    case: Case, problem: Problem, mode: Mode, upstream: Tensor, expected: dict[str, Tensor]
) -> dict[str, float]:
    """The relative error allowed for each result.

    For one layer in float32 it is 1e-5 forward and 1e-4 for a gradient, in low precision twice the error of
    plain torch. With ReLUs between layers, rounding switches a fraction eps of them, different ones in each
    provider, so that gradients differ by about √eps.
    """
    dtype = problem.image.dtype
    eps = torch.finfo(dtype).eps
    if isinstance(case, LayerCase) and dtype == torch.float32:
        return {name: 1e-4 if name.startswith("gradient") else 1e-5 for name in _joined(expected)}
    plain = relative_errors(Trial(case, problem, Provider(unfused), mode, upstream, 1)(), expected)
    if isinstance(case, LayerCase):
        return {name: min(max(eps, 2 * error), 0.1) for name, error in plain.items()}
    worst = max((error for name, error in plain.items() if name.startswith("gradient")), default=0.0)
    return {
        name: min(max(4 * eps**0.5, 3 * worst), 0.5)
        if name.startswith("gradient")
        else min(max(100 * eps, 2 * error), 0.1)
        for name, error in plain.items()
    }


def fault(
    trial: Callable[[], dict[str, Tensor]], expected: dict[str, Tensor], limits: dict[str, float]
) -> str:
    """Why ``trial`` must not be timed; empty if its results agree with ``expected``."""
    errors = relative_errors(trial(), expected)
    # NaN fails the comparison too; a name without a limit has the wrong shape
    wrong = [name for name, error in errors.items() if not error <= limits.get(name, 0.0)]
    return "; ".join(
        f"{name} is off by {errors[name]:.1e}, at most {limits.get(name, 0.0):.1e} allowed" for name in wrong
    )
