"""Sanity checks of a measured robustness: a network with masked gradients fails them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import rng
from awnet.attacks import PGD, Suite, TransferAttack, frozen, named_attack
from awnet.attacks.norms import geometry
from awnet.attacks.stochastic import decision, seeded
from awnet.data.dataset import Dataset
from awnet.nn import has_router, route
from awnet.precision import full_precision


@dataclass(frozen=True)
class Effort:
    """The budget of the checks."""

    images: int
    steps: tuple[int, ...]
    """Numbers of steps for the loss against steps."""
    eps_steps: int
    """Steps of the attack for accuracy against eps."""


EFFORTS = {
    "smoke": Effort(images=64, steps=(5, 20, 100), eps_steps=20),
    "short": Effort(images=128, steps=(10, 50, 200), eps_steps=40),
    "standard": Effort(images=256, steps=(10, 20, 50, 100, 200, 500, 1000), eps_steps=100),
}
EPS_FACTORS = (1, 2, 4, 8, 16)


@dataclass
class Check:
    """A row of the sanity table."""

    check: str
    result: Literal["pass", "suspicious"]
    evidence: str


@full_precision()
def sanity_table(
    model: nn.Module,
    dataset: Dataset,
    suite: Suite,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> tuple[list[Check], dict[str, Any]]:
    """The checks, and the curves behind them (``loss_against_steps``, ``accuracy_against_eps``, ``p_clean``).

    They run on a stratified part of ``dataset``, which is on the model's device. A difference counts if it is
    at least 1 % of the images and at least two images.
    """
    effort = EFFORTS[suite.budget]
    data = dataset.subset(min(effort.images, len(dataset)), seed=0)
    with frozen(model), seeded(model, "sanity", data.index):
        return _Table(model, data, suite, effort, seed, batch_size).run()


def union_check(robust_aa: np.ndarray[Any, Any], robust_union: np.ndarray[Any, Any]) -> Check:
    """Whether AutoAttack breaks nearly all images that all attacks together break; bool ``[n]`` outcomes."""
    gap = float(robust_aa.mean() - robust_union.mean())
    return Check(
        "AutoAttack is not far from the union of all attacks",
        "suspicious" if gap > _tolerance(len(robust_aa)) else "pass",
        f"{_percent(robust_aa.mean())} under AutoAttack, {_percent(robust_union.mean())} under the union",
    )


def _tolerance(n: int) -> float:
    return max(0.01, 1.5 / n)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


class _Table:
    def __init__(
        self, model: nn.Module, data: Dataset, suite: Suite, effort: Effort, seed: int, batch_size: int
    ) -> None:
        self.model, self.data, self.suite, self.effort = model, data, suite, effort
        self.seed, self.batch_size = seed, batch_size
        self.eps, self.tolerance = data.threat_model.eps, _tolerance(len(data))
        white = torch.ones(1, data.pixels, dtype=torch.float64)
        self.largest = float(geometry(data.threat_model.norm).size(white)[0])
        """Radius of a ball that holds all images: 1 in L-infinity."""

    def run(self) -> tuple[list[Check], dict[str, Any]]:
        clean, _ = self._outcome(None)
        named = {
            name: self._outcome(named_attack(name, self.model, self.data.threat_model, self.seed, self.suite))
            for name in ("fgsm", "pgd_sat", "cw", "square")
        }
        correct = {name: outcome[0] for name, outcome in named.items()}
        steps = {n: self._outcome(self._pgd(self.eps, n)) for n in self.effort.steps}
        sizes = sorted({min(self.largest, factor * self.eps) for factor in EPS_FACTORS} | {self.largest})
        against_eps = {eps: self._outcome(self._pgd(eps, self.effort.eps_steps))[0] for eps in sizes}
        black_box = {"square": correct["square"]}
        for name, surrogate in self.suite.surrogates.items():
            source = named_attack("cw", surrogate, self.data.threat_model, self.seed, self.suite)
            black_box[f"transfer from {name}"] = self._outcome(TransferAttack(self.model, source))[0]
        checks = [
            self._steps(steps),
            self._grows(clean, against_eps),
            self._weaker("one step is no stronger than many", "FGSM", correct["fgsm"], correct["pgd_sat"]),
            self._weaker(
                "noise is no stronger than an attack", "uniform noise", self._noise(), correct["pgd_sat"]
            ),
            self._gradients(clean),
            self._black_box(correct["pgd_sat"] & correct["cw"], black_box),
            self._coupling(),
        ]
        curves: dict[str, Any] = {
            "images": len(self.data),
            "loss_against_steps": {
                "steps": list(steps),
                "loss": [loss for _, loss in steps.values()],
                "accuracy": [_share(correct) for correct, _ in steps.values()],
            },
            "accuracy_against_eps": {
                "eps": [0.0, *against_eps],
                "accuracy": [_share(clean), *(_share(correct) for correct in against_eps.values())],
            },
        }
        p_clean = self._p_clean()
        if p_clean is not None:
            checks.append(self._saturated(p_clean))
            counts, edges = np.histogram(p_clean, bins=20, range=(0, 1))
            curves["p_clean"] = {"edges": edges.tolist(), "counts": counts.tolist()}
        return checks, curves

    def _pgd(self, eps: float, steps: int) -> PGD:
        """PGD with the step size of Madry et al.: any number of steps can cross the ball."""
        step_size = min(self.largest, 2.5 * eps / steps)
        norm = self.data.threat_model.norm
        return PGD(self.model, eps=eps, norm=norm, step_size=step_size, steps=steps, seed=self.seed)

    def _outcome(self, attack: Callable[..., Tensor] | None) -> tuple[Tensor, float]:
        """Which images are still classified correctly, bool ``[n]`` on the CPU, and the mean CE.

        ``attack(x, y, index=index)`` gives the changed images.
        """
        correct, losses = [], []
        for x, y, index in self.data.batches(self.batch_size):
            images = x if attack is None else attack(x, y, index=index)
            with torch.no_grad():
                logits = decision(self.model, images).float()
            correct.append(logits.argmax(1) == y)
            losses.append(F.cross_entropy(logits, y, reduction="none"))
        return torch.cat(correct).cpu(), float(torch.cat(losses).double().mean())

    def _noise(self) -> Tensor:
        key, norm = rng.key("sanity noise", self.seed), geometry(self.data.threat_model.norm)
        return self._outcome(lambda x, y, index: norm.uniform(key, x, index, self.eps).clamp_(0, 1))[0]

    def _p_clean(self) -> np.ndarray[Any, Any] | None:
        """p_clean of clean images and of ``pgd_sat`` images; None without a type head."""
        if not has_router(self.model):
            return None
        attack = named_attack("pgd_sat", self.model, self.data.threat_model, self.seed, self.suite)
        values = []
        for x, y, index in self.data.batches(self.batch_size):
            for images in (x, attack(x, y, index=index)):
                with torch.no_grad():
                    routing = route(self.model, images)
                if routing.type_logits is None:
                    return None
                values.append(routing.p_clean.double())
        return np.asarray(torch.cat(values).cpu().numpy())

    def _steps(self, outcomes: Mapping[int, tuple[Tensor, float]]) -> Check:
        losses = [loss for _, loss in outcomes.values()]
        fell = any(b < a - 0.05 * abs(a) - 1e-3 for a, b in pairwise(losses))
        usual, most = _share(outcomes[20][0]), _share(outcomes[max(outcomes)][0])
        by_steps = ", ".join(f"{n}: {loss:.3g}" for n, (_, loss) in outcomes.items())
        return Check(
            "more steps of PGD do not help much beyond 20, and never hurt",
            "suspicious" if fell or usual - most > max(0.02, self.tolerance) else "pass",
            f"mean loss by steps {by_steps}; accuracy {_percent(usual)} at 20 steps and {_percent(most)} at "
            f"{max(outcomes)}",
        )

    def _grows(self, clean: Tensor, outcomes: Mapping[float, Tensor]) -> Check:
        shares = [_share(clean), *(_share(correct) for correct in outcomes.values())]
        rises = any(b > a + max(0.02, self.tolerance) for a, b in pairwise(shares))
        by_eps = ", ".join(f"{eps:.3g}: {_percent(_share(correct))}" for eps, correct in outcomes.items())
        return Check(
            "accuracy falls to 0 as eps grows",
            "suspicious" if rises or shares[-1] > max(0.02, self.tolerance) else "pass",
            f"accuracy under PGD by eps {by_eps}",
        )

    def _weaker(self, check: str, name: str, weak: Tensor, strong: Tensor) -> Check:
        a, b = _share(weak), _share(strong)
        return Check(
            check,
            "suspicious" if b - a > self.tolerance else "pass",
            f"accuracy {_percent(a)} under {name}, {_percent(b)} under 20 steps of PGD",
        )

    def _gradients(self, clean: Tensor) -> Check:
        zero, pixels = [], []
        for x, y, _ in self.data.batches(self.batch_size):
            point = x.clone().requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(self.model(point).float(), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, point)
            zero.append((gradient == 0).flatten(1).all(1))
            pixels.append((gradient == 0).flatten(1).double().mean(1))
        share = float((torch.cat(zero).cpu() & clean).double().mean())
        return Check(
            "the loss has a gradient",
            "suspicious" if share > self.tolerance else "pass",
            f"the gradient of the cross-entropy is 0 in every pixel for {_percent(share)} of the images, and "
            f"in {_percent(float(torch.cat(pixels).mean()))} of all pixels",
        )

    def _black_box(self, white: Tensor, black: Mapping[str, Tensor]) -> Check:
        missed = {name: _share(white & ~correct) for name, correct in black.items()}
        by_attack = ", ".join(f"{name} {_percent(share)}" for name, share in missed.items())
        return Check(
            "white-box attacks are no weaker than black-box ones",
            "suspicious" if max(missed.values()) > self.tolerance else "pass",
            f"accuracy {_percent(_share(white))} under PGD on cross-entropy and margin; images that "
            f"withstand these but not the black-box attack: {by_attack}",
        )

    def _coupling(self) -> Check:
        x = next(self.data.batches(min(8, len(self.data)))).x
        with torch.no_grad():
            whole, again = self.model(x), self.model(x)
            alone = torch.cat([self.model(image[None]) for image in x])
        scale = float(whole.abs().max()) or 1.0
        coupled, random = (float((whole - other).abs().max()) / scale for other in (alone, again))
        return Check(
            "an image's logits are the same each time and in any batch",
            # convolutions of other batch sizes sum in another order
            "suspicious" if random > 1e-6 or coupled > 1e-3 else "pass",
            f"largest relative difference {random:.1e} when repeated, {coupled:.1e} when alone",
        )

    def _saturated(self, p_clean: np.ndarray[Any, Any]) -> Check:
        share = float((p_clean * (1 - p_clean) < 1e-6).mean())
        counts, _ = np.histogram(p_clean, bins=5, range=(0, 1))
        by_fifth = ", ".join(_percent(count / p_clean.size) for count in counts)
        return Check(
            "the router's p lets gradients through",
            "suspicious" if share > max(0.1, self.tolerance) else "pass",
            f"p (1 - p) is below 1e-6 for {_percent(share)} of clean and attacked images; p by fifths of "
            f"[0, 1]: {by_fifth}",
        )


def _share(correct: Tensor) -> float:
    return float(correct.double().mean())
