"""Stochastic models: how they are detected, seeded, attacked and classified."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from awnet import rng
from awnet.nn.freezing import frozen
from awnet.scalars import check_integer

EOT, PASSES = 20, 20
"""Forward passes per gradient (that of AutoAttack's rand version) and per classified image."""

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest difference between two forward passes, relative to the largest logit, that counts as rounding."""
_LOW_PRECISION = 2e-2


class Stochastic(nn.Module):
    """A model whose forward pass is random, with the rules by which attacks and evaluations use it.

    Attacks average the gradient of their loss over ``eot`` forward passes (expectation over transformation,
    Athalye et al. 2018). The predicted class is that with the largest mean probability over ``passes``
    forward passes. All random numbers that the model draws from the generators of torch, NumPy and Python
    are seeded by ``seed`` and the images of the batch, and the state of these generators is restored.

    A call is one forward pass of ``model``.

    Args:
        model: images ``[B, C, H, W]`` in [0, 1] → logits ``[B, K]``.
        eot: forward passes per gradient.
        passes: forward passes that classify an image.
        seed: seed of the model's random numbers.
    """

    def __init__(self, model: nn.Module, *, eot: int = EOT, passes: int = PASSES, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.eot, self.passes = check_integer("eot", eot, 1), check_integer("passes", passes, 1)
        self.seed = check_integer("seed", seed)
        self.model = model
        self.training = model.training

    def extra_repr(self) -> str:
        return f"eot={self.eot}, passes={self.passes}, seed={self.seed}"

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules or "model" not in modules:
            return super().__getattr__(name)
        inner = modules["model"]
        if name == "route" and "routing" not in inspect.signature(type(inner).forward).parameters:
            raise AttributeError(name)  # it is not the other half of the forward pass
        return getattr(inner, name)

    def forward(self, x: Tensor, *, routing: Any = None) -> Tensor:
        """The logits ``[B, K]`` of one forward pass."""
        logits: Tensor = self.model(x) if routing is None else self.model(x, routing=routing)
        return logits

    def classify(self, one_pass: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The outcome of ``passes`` forward passes ``one_pass``, each of which returns logits ``[B, K]``.

        Returns the logarithm of the mean probabilities, and the share of the passes that predict each class;
        both ``[B, K]``.
        """
        logits = one_pass()
        probabilities, votes = torch.zeros_like(logits), torch.zeros_like(logits)
        for number in range(self.passes):
            logits = one_pass() if number else logits
            probabilities += logits.softmax(1)
            votes += F.one_hot(logits.argmax(1), logits.shape[1])
        return (probabilities / self.passes).clamp(min=1e-30).log(), votes / self.passes


def decision(model: nn.Module, x: Tensor) -> Tensor:
    """Values ``[B, K]`` of which the largest is the predicted class.

    They are the model's logits, or for a :class:`Stochastic` model the logarithm of the mean probabilities.
    """
    if isinstance(model, Stochastic):
        return model.classify(lambda: model(x))[0]
    logits: Tensor = model(x)
    return logits


def eot_passes(model: nn.Module) -> int:
    """Forward passes over which an attack on ``model`` averages its gradient; 1 for a deterministic one."""
    return model.eot if isinstance(model, Stochastic) else 1


@contextmanager
def seeded(model: nn.Module, purpose: str, index: Tensor) -> Iterator[None]:
    """Seeds the random numbers of a :class:`Stochastic` model for a block of code; else does nothing.

    The seed depends on the model's, ``purpose`` and ``index``, the indices ``[B]`` of the batch's images.
    Afterwards the generators of torch, NumPy and Python have their former state.
    """
    if not isinstance(model, Stochastic):
        yield
        return
    seed = rng.torch_seed("stochastic model", model.seed, purpose, repr(index.tolist()))
    with _generators_seeded(seed, index.device):
        yield


@contextmanager
def _generators_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the generators of torch, NumPy and Python; their former states are restored afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  the model's code may use it
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class _TrainModeCalls(TorchFunctionMode):
    """Records the functions that run in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _TRAINING_ARGUMENT:
            position, default = _TRAINING_ARGUMENT[name]
            given = args[position] if len(args) > position else kwargs.get("training", default)
            if given is True:
                self.names[name] = None
        return func(*args, **kwargs)


# function of torch.nn.functional → position and default of its argument `training`
_TRAINING_ARGUMENT = {
    name: (list(parameters).index("training"), parameters["training"].default)
    for name, parameters in (
        (name, inspect.signature(getattr(F, name)).parameters)
        for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "batch_norm", "rrelu")
    )
}


class Randomness(NamedTuple):
    """What two forward passes of the same images in eval mode tell of a model."""

    difference: float
    """Largest difference of their logits, relative to the largest logit; 0 if it is no more than rounding."""
    train_mode: tuple[str, ...]
    """Functions of torch.nn.functional, such as ``dropout`` and ``batch_norm``, that ran in train mode all
    the same: a ``forward`` or ``train`` method of the model's own sets it. With batch statistics an image's
    logits depend on the other images of its batch."""


@torch.no_grad()
def randomness(model: nn.Module, x: Tensor) -> Randomness:
    """Runs ``model`` twice on the images ``x`` [B, C, H, W].

    Differences of up to 1e-5 of the largest logit in float32, 1e-9 in float64 and 2e-2 in lower precision
    count as rounding. The model's buffers and the generators of torch, NumPy and Python keep their states.
    """
    with _untouched(model, x.device), _TrainModeCalls() as calls:
        first, second = model(x), model(x)
    tolerance = ROUNDING.get(first.dtype, _LOW_PRECISION)
    first, second = first.double().nan_to_num(), second.double().nan_to_num()
    difference = float((first - second).abs().max()) / max(float(first.abs().max()), 1e-30)
    return Randomness(difference if difference > tolerance else 0.0, tuple(calls.names))


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Freezes ``model`` and seeds all generators; they and the model's buffers are restored afterwards."""
    before = [buffer.clone() for buffer in model.buffers()]
    with frozen(model), _generators_seeded(0, device):
        try:
            yield
        finally:
            for buffer, values in zip(model.buffers(), before, strict=True):
                expanded = any(s == 0 and n > 1 for s, n in zip(buffer.stride(), buffer.shape, strict=True))
                if not expanded:  # an expanded buffer cannot be written to
                    buffer.copy_(values)
