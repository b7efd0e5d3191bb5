"""The interface of all detectors of adversarial images: ``fit``, then ``score``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from awnet.attacks import frozen
from awnet.data.checks import check_images, check_labels
from awnet.defaults import standard_defaults
from awnet.nn import has_router, route, routers
from awnet.precision import full_precision
from awnet.scalars import check_integer


class Detector(ABC):
    """Separates adversarial from clean images for one classifier.

    Args:
        model: maps images [B, C, H, W] in [0, 1] to logits [B, K]; used in eval mode and not changed.
        batch_size: images per forward pass.
    """

    def __init__(self, model: nn.Module, *, batch_size: int = 256) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self._fitted = False

    @full_precision()
    @standard_defaults()
    def fit(self, x_train: Tensor, y_train: Tensor, clean: Tensor, adversarial: Tensor) -> Self:
        """Fits the detector to the classifier's training set and to images of both kinds; returns itself.

        Args:
            x_train, y_train: images [N, C, H, W] and labels int64 [N] that the classifier was trained on.
            clean, adversarial: images [M, C, H, W] and [M', C, H, W] that it was not trained on.

        Raises:
            TypeError, ValueError: images are outside [0, 1], labels do not fit, or a set is empty.
        """
        for name, images in (("x_train", x_train), ("clean", clean), ("adversarial", adversarial)):
            check_images(images, name)
            if len(images) == 0:
                raise ValueError(f"{name} is empty: the detector needs images to fit")
        check_labels(y_train, name="y_train")
        if len(y_train) != len(x_train):
            raise ValueError(f"y_train must hold {len(x_train)} labels, got {len(y_train)}")
        with frozen(self.model):
            self._fit(x_train, y_train, clean, adversarial)
        self._fitted = True
        return self

    @full_precision()
    @standard_defaults()
    def score(self, x: Tensor) -> Tensor:
        """float64 [N] on the CPU for images [N, C, H, W]: the higher, the more likely adversarial.

        Raises RuntimeError before ``fit``.
        """
        if not self._fitted:
            raise RuntimeError(f"{type(self).__name__} is not fitted: call fit first")
        check_images(x)
        if len(x) == 0:
            return torch.empty(0, dtype=torch.float64)
        with frozen(self.model), torch.no_grad():
            return self._score(x).double().cpu()

    @abstractmethod
    def _fit(self, x_train: Tensor, y_train: Tensor, clean: Tensor, adversarial: Tensor) -> None: ...

    @abstractmethod
    def _score(self, x: Tensor) -> Tensor: ...


class RouterDetector(Detector):
    """AW-Net's type head: the logit of "adversarial" minus that of "clean". ``fit`` only checks the model.

    The difference of the logits orders images as p_clean does, without rounding to 0 or 1 in the softmax.
    """

    def __init__(self, model: nn.Module, *, batch_size: int = 256) -> None:
        super().__init__(model, batch_size=batch_size)
        if not has_router(model):
            raise ValueError("the model has no router: this detector needs an AW-Net")

    def _fit(self, x_train: Tensor, y_train: Tensor, clean: Tensor, adversarial: Tensor) -> None:
        if route(self.model, x_train[:1]).type_logits is None:
            raise ValueError("the model's router has no type head: this detector needs one")

    def _score(self, x: Tensor) -> Tensor:
        scores = []
        for part in x.split(self.batch_size):
            logits = route(self.model, part).type_logits
            assert logits is not None
            scores.append(logits[:, 0] - logits[:, 1])
        return torch.cat(scores)


class Embedding:
    """Features for the other detectors: pooled outputs of convolutions, and inputs of the last linear layer.

    Args:
        model: any network with convolutions that ends in a linear layer.
        x: an image [1, C, H, W], run once to find the order of the layers.
        layers: names of convolutions in ``model.named_modules()``; by default five, evenly spaced from the
            first to the last in the forward pass, without the router's.
    """

    def __init__(self, model: nn.Module, x: Tensor, layers: Sequence[str] | None = None) -> None:
        self.model = model
        order: list[str] = []
        linear: list[nn.Linear] = []
        router_modules = {id(module) for router in routers(model) for module in router.modules()}
        with ExitStack() as hooks, torch.no_grad():
            for name, module in model.named_modules():
                if id(module) in router_modules:
                    continue
                if isinstance(module, nn.Conv2d):
                    hook = module.register_forward_hook(lambda *_, name=name: order.append(name))
                    hooks.enter_context(hook)
                elif isinstance(module, nn.Linear):
                    hooks.enter_context(module.register_forward_hook(lambda m, *_: linear.append(m)))
            model(x)
        if not linear or not order:
            raise ValueError(
                f"{type(model).__name__} must have convolutions and end in a linear layer for this detector"
            )
        self.linear = linear[-1]
        if layers is None:
            count = min(5, len(order))
            positions = [round(i * (len(order) - 1) / max(count - 1, 1)) for i in range(count)]
            layers = list(dict.fromkeys(order[i] for i in positions))
        unknown = [name for name in layers if name not in order]
        if unknown:
            raise ValueError(
                f"layers has unknown names {', '.join(unknown)}; the model's convolutions are {order}"
            )
        self.layers = list(layers)

    def __call__(self, x: Tensor, batch_size: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """Each layer's pooled outputs [N, C_l], the last linear layer's inputs [N, d], and logits [N, K]."""
        modules = dict(self.model.named_modules())
        pooled: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        features: list[Tensor] = []

        def pool(name: str, module: nn.Module, args: object, output: Tensor) -> None:
            pooled[name].append(output.mean((2, 3)).double())

        with ExitStack() as hooks, torch.no_grad():
            for name in self.layers:
                hooks.enter_context(modules[name].register_forward_hook(partial(pool, name)))
            hooks.enter_context(
                self.linear.register_forward_pre_hook(lambda module, args: features.append(args[0].double()))
            )
            logits = [self.model(part).double() for part in x.split(batch_size)]
        return [torch.cat(pooled[name]) for name in self.layers], torch.cat(features), torch.cat(logits)
