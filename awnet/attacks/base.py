"""The base class of all attacks: checks arguments, freezes the model, keeps images in the ball."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from awnet import rng
from awnet.attacks.norms import geometry
from awnet.attacks.saved import digest
from awnet.attacks.stochastic import Stochastic, eot_passes, seeded
from awnet.data.checks import check_images, check_labels
from awnet.data.threat_model import Norm, check_norm
from awnet.defaults import standard_defaults
from awnet.devices import check_has_values
from awnet.nn.freezing import frozen
from awnet.scalars import check_integer, check_number

Target = Literal["random", "least_likely"] | int | Tensor
"""The classes that a targeted attack tries to reach, see :class:`Attack`."""


def device_of(model: nn.Module) -> torch.device | None:
    """The device of the model's first parameter or buffer; None for a model without either."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return None


def _device(value: object) -> torch.device | None:
    return value.device if isinstance(value, Tensor) else None


def check_model(model: nn.Module) -> None:
    """Raises TypeError unless ``model`` is an ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_values(model: nn.Module) -> None:
    """Raises ValueError if a parameter or buffer is on the meta device, and so has no values."""
    check_model(model)
    check_has_values(model)


def check_size(name: str, value: float, high: float = math.inf) -> float:
    """A finite number from 0 to ``high``, as a float."""
    value = check_number(name, value, 0)
    if value > high:
        raise ValueError(
            f"{name} must be at most {high:g}, got {value:g}: images are in [0, 1], so write {value:g}/255 "
            "if you count in 8-bit levels"
        )
    return value


def check_count(name: str, value: int) -> int:
    """An integer of at least 0."""
    return check_integer(name, value, 0)


def check_eps(eps: float, norm: Norm) -> float:
    """The radius of a ball, at least 0; in L-infinity at most 1."""
    return check_size("eps", eps, 1.0 if norm == "Linf" else math.inf)


def check_ball(x_adv: Tensor, x: Tensor, eps: float, norm: Norm, what: str) -> None:
    """Raises ValueError unless ``x_adv`` is in [0, 1] and within ``eps`` of the images ``x``, up to rounding.

    ``what`` names ``x_adv`` in the message.
    """
    if x_adv.shape != x.shape or x_adv.dtype != x.dtype:
        raise ValueError(f"{what}: expected {x.dtype} {list(x.shape)}, got {x_adv.dtype} {list(x_adv.shape)}")
    broken = int((~geometry(norm).inside(x_adv, x, eps)).sum())
    if broken:
        within = f"within eps = {eps:.6g} of the clean images in {norm}"
        raise ValueError(f"{what}: {broken} of {len(x)} are not in [0, 1] and {within}")


def _check_target(target: Any) -> Target | None:
    if target is None or (isinstance(target, str) and target in ("random", "least_likely")):
        return cast("Target | None", target)
    if isinstance(target, str):
        raise ValueError(f"target must be 'random', 'least_likely', a class or classes, got {target!r}")
    if isinstance(target, Tensor) and target.dim() > 0:
        if target.dtype != torch.int64 or target.dim() != 1 or len(target) == 0 or int(target.min()) < 0:
            raise ValueError(
                f"target must be int64 [N] of classes from 0, got {target.dtype} {list(target.shape)}"
            )
        return target
    return check_integer("target", target, 0)


class Attack(ABC):
    """An attack within a ball around each image, on a classifier from [0, 1] to logits ``[B, K]``.

    A subclass implements :meth:`perturb`; calling the attack checks the arguments, freezes the model, runs
    ``perturb`` and checks the result.

    Args:
        model: any ``nn.Module``, in train or eval mode; it is not changed.
        eps: radius of the ball in image units; in L-infinity at most 1.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``, see :class:`awnet.data.ThreatModel`.
        seed: noise is keyed by the seed and each sample's index, so that an image's noise does not depend on
            its batch.
        target: for attacks with targeted modes, the class that each image shall be classified as; None for
            any wrong class. ``"random"``: a wrong class, drawn by seed and index. ``"least_likely"``: the
            wrong class with the smallest logit for ``x``. A class for all images. Or classes int64 ``[N]``
            by index. An image whose target is its label is returned unchanged.
    """

    filterable = True
    """Whether the attack may run in low precision first, and then only on images that are not broken."""

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        seed: int = 0,
        target: Target | None = None,
    ) -> None:
        check_model(model)
        self.model = model
        self.norm = check_norm(norm)
        self.geometry = geometry(self.norm)
        self.eps = check_eps(eps, self.norm)
        self.seed = check_integer("seed", seed)
        self.target = _check_target(target)
        if target is not None:
            self.filterable = False

    @property
    def settings(self) -> dict[str, Any]:
        """The parameters of the attack, for reports: plain values, JSON-ready; no norm means L-infinity."""
        norm = {} if self.norm == "Linf" else {"norm": self.norm}
        eot = {"eot": self.model.eot} if isinstance(self.model, Stochastic) else {}
        target: dict[str, Any] = {} if self.target is None else {"target": self.target}
        if isinstance(self.target, Tensor):
            target = {"target": f"given, {digest(self.target)}"}
        return {"attack": type(self).__name__, "eps": self.eps, "seed": self.seed} | norm | eot | target

    @abstractmethod
    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        """The attack, on checked arguments and a frozen model.

        ``largest_label`` is ``y.max()`` as a Python number. Call the model through :meth:`logits`, which
        compares it with K. If a gradient is not finite the result must be NaN.
        """

    @standard_defaults()
    def __call__(self, x: Tensor, y: Tensor, *, index: Tensor | None = None) -> Tensor:
        """Adversarial images for ``x``.

        Args:
            x: images in [0, 1], float32 or float64 ``[B, C, H, W]``, on the model's device.
            y: true labels, int64 ``[B]``.
            index: each sample's index in its data set, int64 ``[B]``, which keys the noise; 0 … B-1 if None.

        Returns:
            ``x_adv`` like ``x``, a new tensor within eps of ``x`` and in [0, 1] (up to rounding), without
            gradient.

        Raises:
            TypeError, ValueError: an argument is not as described, a label exceeds the model's classes, or
                the loss has no gradient with respect to the image.
            FloatingPointError: that gradient is NaN or infinite.
        """
        check_images(x)
        if x.dtype not in (torch.float32, torch.float64):
            # a step of 0.003 would vanish in the rounding of a half-precision pixel
            raise TypeError(f"x must be float32 or float64, got {x.dtype}; use torch.autocast for speed")
        for name, device in (
            ("y", _device(y)),
            ("index", _device(index)),
            ("the model", device_of(self.model)),
        ):
            if device is not None and device != x.device:
                raise ValueError(f"{name} must be on x's device, {x.device}, got {device}")
        check_labels(y)
        if len(y) != len(x):
            raise ValueError(f"y must hold one label for each of the {len(x)} images, got {len(y)}")
        if index is None:
            index = torch.arange(len(x), device=x.device)
        elif not isinstance(index, Tensor):
            raise TypeError(f"index must be a torch.Tensor, int64 [{len(x)}], got {type(index).__name__}")
        elif index.dtype != torch.int64 or index.shape != y.shape:
            raise ValueError(f"index must be int64 [{len(x)}], got {index.dtype} {list(index.shape)}")
        if len(x) == 0:
            return x.detach().clone()
        # inference tensors cannot enter a graph, so they are copied outside inference mode
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            frozen(self.model),
            seeded(self.model, type(self).__name__, index),
        ):
            x_adv = self.perturb(x.detach().clone(), y.clone(), index.clone(), int(y.max()))
        if not bool(torch.isfinite(x_adv).all()):
            broken = int((~torch.isfinite(x_adv)).flatten(1).any(1).sum())
            raise FloatingPointError(
                f"the gradient of the loss with respect to x is not finite for {broken} of {len(x)} images, "
                "so an attack cannot follow it: look for NaN in the model's weights and outputs"
            )
        return x_adv

    def logits(self, x: Tensor, largest_label: int) -> Tensor:
        """The model's logits ``[B, K]`` for ``x``, float32 or wider, with their shape checked."""
        logits = self.model(x)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must return logits [B, K] for {len(x)} images, got {got}")
        if logits.shape[1] <= largest_label:
            raise ValueError(
                f"y must hold labels below the model's {logits.shape[1]} classes, got {largest_label}"
            )
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def goals(self, x: Tensor, y: Tensor, *, index: Tensor) -> Tensor:
        """The class that each image shall be classified as, int64 ``[B]``, of a targeted attack.

        Arguments as for calling the attack. ``y`` where the target is the label.
        """
        with frozen(self.model), seeded(self.model, type(self).__name__, index):
            return self.goal(x, y, index, int(y.max()))

    def goal(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        """As :meth:`goals`, on checked arguments and a frozen model."""
        values = self.decision(x, largest_label)
        classes = values.shape[1]
        if self.target == "random":
            other = rng.integers(rng.key("target", self.seed), index, (), classes - 1)
            return other + (other >= y)  # any class but y
        if self.target == "least_likely":
            return values.scatter(1, y[:, None], torch.inf).argmin(1)
        if isinstance(self.target, Tensor):
            if int(index.max()) >= len(self.target):
                raise ValueError(
                    f"target must hold a class for every image: it has {len(self.target)} classes, and an "
                    f"image's index is {int(index.max())}"
                )
            goal = self.target.to(x.device)[index]
        else:
            assert isinstance(self.target, int)
            goal = torch.full_like(y, self.target)
        if int(goal.max()) >= classes:
            raise ValueError(f"target must be below the model's {classes} classes, got {int(goal.max())}")
        return goal

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """``x_adv`` moved into the ball around ``x``; images in the ball, up to rounding, do not change."""
        return self.geometry.confine(x_adv, x, self.eps)

    def decision(self, x: Tensor, largest_label: int) -> Tensor:
        """Values ``[B, K]`` of which the largest is the predicted class, without gradient.

        They are the logits, or for a :class:`Stochastic` model the logarithm of the mean probabilities.
        """
        with torch.no_grad():
            if isinstance(self.model, Stochastic):
                return self.model.classify(lambda: self.logits(x, largest_label))[0]
            return self.logits(x, largest_label)

    def correct(self, x: Tensor, y: Tensor, largest_label: int) -> Tensor:
        """Whether the model classifies each image as ``y``, bool ``[B]``."""
        return self.decision(x, largest_label).argmax(1) == y

    def gradient(self, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The gradient of ``loss(x)``, a function of images that returns ``[B]``, summed over the images.

        For a :class:`Stochastic` model it is the mean over ``eot`` evaluations of ``loss``.
        """
        passes, total = eot_passes(self.model), None
        for _ in range(passes):
            point = x.detach().requires_grad_(True)
            value = loss(point)
            if value.shape != (len(x),):
                raise ValueError(f"loss must return one value per image, [{len(x)}], got {list(value.shape)}")
            if not value.requires_grad:
                raise ValueError("the loss has no gradient with respect to x: does the model detach it?")
            (gradient,) = torch.autograd.grad(value.sum(), point)
            total = gradient if total is None else total + gradient
        assert total is not None
        return total if passes == 1 else total / passes
