"""Attacks made on one model and replayed on another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awnet._version import __version__
from awnet.attacks.base import Attack, check_ball, check_model, device_of
from awnet.attacks.saved import Saved, digest, model_fingerprint
from awnet.data.dataset import Dataset
from awnet.files import expanded, read_json, write_json
from awnet.models import load_model
from awnet.models.registry import config_of
from awnet.precision import full_precision


@dataclass(frozen=True)
class Crafted:
    """Adversarial images of a surrogate.

    Attributes:
        x_adv: float32 ``[N, C, H, W]`` in [0, 1].
        index: int64 ``[N]``, each image's place in its data set's published order.
        labels: int64 ``[N]``, the true ones.
        provenance: what they were made with: ``surrogate`` and ``data`` (fingerprints), ``settings`` of the
            attack, ``dataset``, ``split``, ``eps``, versions.
    """

    x_adv: Tensor
    index: Tensor
    labels: Tensor
    provenance: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Crafted:
        """What :func:`craft` wrote: the ``.safetensors`` file, with its ``.json`` beside it."""
        path = expanded(path)
        for part in (path, path.with_suffix(".json")):
            if not part.is_file():
                raise FileNotFoundError(f"{part} does not exist: craft the images first")
        found = Saved(path.parent, "").load(path.stem)
        tensors = {} if found is None else found[0]
        provenance = read_json(path.with_suffix(".json"))
        try:
            whole = cls(tensors["x_adv"], tensors["index"], tensors["labels"], provenance)
        except KeyError as error:
            raise ValueError(f"{path} holds no crafted images: {error} is missing") from error
        if not isinstance(provenance, dict) or provenance.get("content") != _content(whole):
            raise ValueError(f"{path} and its .json do not belong together: craft the images again")
        return whole


@full_precision()
def craft(
    surrogate: nn.Module | str | Path,
    dataset: Dataset,
    attack: str | Callable[[nn.Module], Attack] = "pgd_sat",
    *,
    folder: str | Path | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Crafted:
    """Attacks ``surrogate`` on every image of ``dataset``, once: a second call reads what the first wrote.

    Runs in full float32, see :func:`awnet.precision.full_precision`.

    Args:
        surrogate: a model, or a run folder or ``.safetensors`` file to load one from.
        dataset: whose threat model gives eps and step sizes.
        attack: a name that :func:`awnet.attacks.named_attack` knows, or a function that makes an attack on
            the model it is given.
        folder: where to keep the images, as ``<key>.safetensors`` with ``<key>.json``; an interrupted call
            goes on there. None keeps nothing.
        progress: called with (images done, images in all).
    """
    from awnet.attacks.registry import named_attack

    model = surrogate if isinstance(surrogate, nn.Module) else load_model(surrogate)
    check_model(model)
    device = device_of(model)
    dataset = dataset if device is None else dataset.to(device)
    if isinstance(attack, str):
        made = named_attack(attack, model, dataset.threat_model, seed=seed)
    else:
        made = attack(model)
        if not isinstance(made, Attack):
            raise TypeError(f"attack must make an Attack, got {type(made).__name__}")
    provenance = {
        "surrogate": model_fingerprint(model),
        "surrogate_config": config_of(model),
        "settings": made.settings,
        "eps": made.eps,
        "dataset": dataset.name,
        "split": dataset.split,
        "data": dataset.fingerprint(),
        "batch_size": batch_size,
    }
    key = digest(provenance)
    path = None if folder is None else expanded(folder) / f"{key}.safetensors"
    if path is not None and path.is_file() and path.with_suffix(".json").is_file():
        return Crafted.load(path)
    parts = None if folder is None else Saved(folder, f"{key}.parts")
    batches: list[Tensor] = []
    for number, (x, y, index) in enumerate(dataset.batches(batch_size)):
        kept = None if parts is None else parts.load(str(number))
        x_adv = made(x, y, index=index).cpu() if kept is None else kept[0]["x_adv"]
        check_ball(x_adv, x.cpu(), made.eps, f"images of {type(made).__name__}, batch {number}")
        if parts is not None and kept is None:
            parts.save(str(number), {"x_adv": x_adv})
        batches.append(x_adv)
        if progress is not None:
            progress(min((number + 1) * batch_size, len(dataset)), len(dataset))
    whole = Crafted(torch.cat(batches), dataset.index.cpu(), dataset.labels.cpu(), provenance)
    provenance |= {"awnet": __version__, "torch": torch.__version__, "content": _content(whole)}
    if path is not None and parts is not None:
        tensors = {"x_adv": whole.x_adv, "index": whole.index, "labels": whole.labels}
        Saved(path.parent, "").save(path.stem, tensors)
        write_json(path.with_suffix(".json"), provenance)
        parts.remove()
    return whole


class TransferAttack(Attack):
    """Images made on a surrogate, for any model.

    Args:
        model: the model that faces them; it plays no part in making them.
        source: an attack on the surrogate, run when images are asked for, or what :func:`craft` made, from
            which images are taken by their index.
    """

    def __init__(self, model: nn.Module, source: Attack | Crafted) -> None:
        if not isinstance(source, Attack | Crafted):
            raise TypeError(f"source must be an Attack or Crafted, got {type(source).__name__}")
        eps = source.eps if isinstance(source, Attack) else float(source.provenance["eps"])
        super().__init__(model, eps=eps, seed=source.seed if isinstance(source, Attack) else 0)
        self.source = source
        if isinstance(source, Crafted):
            order = source.index.argsort()
            self._order, self._sorted = order, source.index[order]

    @property
    def settings(self) -> dict[str, Any]:
        if isinstance(self.source, Attack):
            made = {"surrogate": model_fingerprint(self.source.model), "settings": self.source.settings}
        else:
            made = {key: self.source.provenance[key] for key in ("surrogate", "settings", "data")}
        return super().settings | made

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        if isinstance(self.source, Attack):
            return self.source(x, y, index=index)
        wanted = index.cpu()
        place = torch.searchsorted(self._sorted, wanted).clamp(max=len(self._sorted) - 1)
        if not torch.equal(self._sorted[place], wanted):
            raise ValueError("index has images that were not crafted: craft those of the same data set")
        rows = self._order[place]
        x_adv = self.source.x_adv[rows].to(x)
        if not torch.equal(self.source.labels[rows], y.cpu()):
            raise ValueError("x and y are not the images that were crafted from: use the same data set")
        check_ball(x_adv, x, self.eps, "x are not the images that were crafted from")
        return x_adv


def replay(model: nn.Module, crafted: Crafted | str | Path) -> TransferAttack:
    """The attack on ``model`` with images of :func:`craft`, or of the file that it wrote."""
    return TransferAttack(model, crafted if isinstance(crafted, Crafted) else Crafted.load(crafted))


def _content(crafted: Crafted) -> str:
    return digest(crafted.x_adv, crafted.index, crafted.labels)
