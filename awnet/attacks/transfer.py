"""Transfer attacks: adversarial images made on one model and replayed on another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awnet.attacks.base import Attack, check_ball
from awnet.attacks.saved import Saved, digest, model_fingerprint
from awnet.data.threat_model import Norm, check_norm
from awnet.files import expanded, read_json


@dataclass(frozen=True)
class Crafted:
    """Adversarial images made on a surrogate by :func:`awnet.attacks.craft`.

    Attributes:
        x_adv: float32 ``[N, C, H, W]`` in [0, 1].
        index: int64 ``[N]``, each image's position in its data set's published order.
        labels: int64 ``[N]``, the true labels.
        provenance: how they were made: ``surrogate`` and ``data`` (fingerprints), ``settings`` of the
            attack, ``dataset``, ``split``, ``eps``, versions.
    """

    x_adv: Tensor
    index: Tensor
    labels: Tensor
    provenance: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Crafted:
        """Reads a ``.safetensors`` file that :func:`craft` wrote, and the ``.json`` next to it."""
        path = expanded(path)
        for part in (path, path.with_suffix(".json")):
            if not part.is_file():
                raise FileNotFoundError(f"{part} does not exist: craft the images first")
        stored = Saved(path.parent, "").load(path.stem)
        tensors = {} if stored is None else stored[0]
        provenance = read_json(path.with_suffix(".json"))
        try:
            crafted = cls(tensors["x_adv"], tensors["index"], tensors["labels"], provenance)
        except KeyError as error:
            raise ValueError(f"{path} holds no crafted images: {error} is missing") from error
        if not isinstance(provenance, dict) or provenance.get("content") != crafted.content():
            raise ValueError(f"{path} and its .json do not belong together: craft the images again")
        return crafted

    @property
    def eps(self) -> float:
        """The radius of the ball that the images are in."""
        return float(self.provenance["eps"])

    @property
    def norm(self) -> Norm:
        """The norm of the ball; files without one are of L-infinity."""
        return check_norm(self.provenance["settings"].get("norm", "Linf"))

    def content(self) -> str:
        """Digest of the tensors, which ``provenance`` stores."""
        return digest(self.x_adv, self.index, self.labels)


class TransferAttack(Attack):
    """Replays adversarial images of a surrogate on any model.

    Args:
        model: the model to attack; it is not used to make the images.
        source: an attack on the surrogate, run for each batch, or images made by
            :func:`awnet.attacks.craft`, which are looked up by index.
    """

    def __init__(self, model: nn.Module, source: Attack | Crafted) -> None:
        if not isinstance(source, Attack | Crafted):
            raise TypeError(f"source must be an Attack or Crafted, got {type(source).__name__}")
        super().__init__(
            model, eps=source.eps, norm=source.norm, seed=source.seed if isinstance(source, Attack) else 0
        )
        self.source = source
        if isinstance(source, Crafted):
            order = source.index.argsort()
            self._order, self._sorted = order, source.index[order]

    @property
    def settings(self) -> dict[str, Any]:
        if isinstance(self.source, Attack):
            origin = {"surrogate": model_fingerprint(self.source.model), "settings": self.source.settings}
        else:
            origin = {key: self.source.provenance[key] for key in ("surrogate", "settings", "data")}
        return super().settings | origin

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        if isinstance(self.source, Attack):
            return self.source(x, y, index=index)
        index = index.cpu()
        position = torch.searchsorted(self._sorted, index).clamp(max=len(self._sorted) - 1)
        if not torch.equal(self._sorted[position], index):
            raise ValueError("index has images without adversarial images: craft them on the same data set")
        rows = self._order[position]
        x_adv = self.source.x_adv[rows].to(x)
        if not torch.equal(self.source.labels[rows], y.cpu()):
            raise ValueError("x and y are not the images that were attacked: use the same data set")
        check_ball(x_adv, x, self.eps, self.norm, "x are not the images that were attacked")
        return x_adv


def replay(model: nn.Module, crafted: Crafted | str | Path) -> TransferAttack:
    """The attack on ``model`` with images of :func:`craft`, or of the file that it wrote."""
    return TransferAttack(model, crafted if isinstance(crafted, Crafted) else Crafted.load(crafted))
