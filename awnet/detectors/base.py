"""What every detector of adversarial images offers: ``fit``, then ``score``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
    """Tells adversarial images from clean ones for one classifier.

    Args:
        model: maps images [B, C, H, W] in [0, 1] to logits [B, K]; used in eval mode, left as it was found.
        batch_size: images a forward pass.
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
        """Learns from the classifier's training set and from images of both kinds; returns itself.

        Args:
            x_train, y_train: images [N, C, H, W] and labels int64 [N] that the classifier was trained on.
            clean, adversarial: images [M, C, H, W] and [M', C, H, W] that it was not trained on, each of the
                kind that its name says.

        Raises TypeError or ValueError for images outside [0, 1], labels that do not fit, or nothing to learn
        from.
        """
        for name, images in (("x_train", x_train), ("clean", clean), ("adversarial", adversarial)):
            check_images(images, name)
            if len(images) == 0:
                raise ValueError(f"{name} is empty: the detector has nothing to learn from")
        check_labels(y_train)
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
            raise RuntimeError(f"{type(self).__name__} has learnt nothing yet: call fit first")
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
    """AW-Net's own type head: the logit of "adversarial" minus that of "clean". ``fit`` has nothing to learn.

    The difference of the logits orders images as p_clean does, without the softmax's rounding to 0 or 1.
    """

    def __init__(self, model: nn.Module, *, batch_size: int = 256) -> None:
        super().__init__(model, batch_size=batch_size)
        if not has_router(model):
            raise ValueError("the model has no router: this detector needs an AW-Net")

    def _fit(self, x_train: Tensor, y_train: Tensor, clean: Tensor, adversarial: Tensor) -> None:
        if route(self.model, x_train[:1]).type_logits is None:
            raise ValueError("the model's router has no type head: this detector needs one")

    def _score(self, x: Tensor) -> Tensor:
        found = []
        for part in x.split(self.batch_size):
            logits = route(self.model, part).type_logits
            assert logits is not None
            found.append(logits[:, 0] - logits[:, 1])
        return torch.cat(found)


class Embedding:
    """What the other detectors look at: pooled outputs of a model's convolutions, and its last linear layer.

    Args:
        model: any network with convolutions that ends in a linear layer.
        x: an image [1, C, H, W], run once to see the order of the layers.
        layers: names of convolutions (of ``model.named_modules()``); by default five, evenly spaced from the
            first to the last that the images pass, the router's left out.
    """

    def __init__(self, model: nn.Module, x: Tensor, layers: Sequence[str] | None = None) -> None:
        self.model = model
        order: list[str] = []
        linear: list[nn.Linear] = []
        handles = []
        of_routers = {id(module) for router in routers(model) for module in router.modules()}
        for name, module in model.named_modules():
            if id(module) in of_routers:
                continue
            if isinstance(module, nn.Conv2d):
                handles.append(module.register_forward_hook(lambda *_, name=name: order.append(name)))
            elif isinstance(module, nn.Linear):
                handles.append(module.register_forward_hook(lambda m, *_: linear.append(m)))
        try:
            with torch.no_grad():
                model(x)
        finally:
            for handle in handles:
                handle.remove()
        if not linear or not order:
            raise ValueError(
                f"{type(model).__name__} must have convolutions and end in a linear layer for this detector"
            )
        self.linear = linear[-1]
        if layers is None:
            count = min(5, len(order))
            places = [round(i * (len(order) - 1) / max(count - 1, 1)) for i in range(count)]
            layers = list(dict.fromkeys(order[place] for place in places))
        unknown = [name for name in layers if name not in order]
        if unknown:
            raise ValueError(f"layers names {', '.join(unknown)}; the model's convolutions are {order}")
        self.layers = list(layers)

    def __call__(self, x: Tensor, batch_size: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """Each layer's pooled outputs [N, C_l], the last linear layer's inputs [N, d], and logits [N, K]."""
        modules = dict(self.model.named_modules())
        seen: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        features: list[Tensor] = []
        logits: list[Tensor] = []

        def pool(name: str) -> object:
            return lambda module, args, output: seen[name].append(output.mean((2, 3)).double())

        handles = [modules[name].register_forward_hook(pool(name)) for name in self.layers]
        handles.append(
            self.linear.register_forward_pre_hook(lambda module, args: features.append(args[0].double()))
        )
        try:
            with torch.no_grad():
                logits += [self.model(part).double() for part in x.split(batch_size)]
        finally:
            for handle in handles:
                handle.remove()
        return [torch.cat(seen[name]) for name in self.layers], torch.cat(features), torch.cat(logits)
