"""Attacks a surrogate on a whole data set, for transfer attacks; an interrupted call resumes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awnet._version import __version__
from awnet.attacks.base import Attack, check_ball, check_model, device_of
from awnet.attacks.registry import named_attack
from awnet.attacks.saved import Saved, digest, model_fingerprint
from awnet.attacks.transfer import Crafted
from awnet.data.dataset import Dataset
from awnet.files import expanded, make_folder, write_json
from awnet.models.files import load_model_file
from awnet.models.registry import config_of
from awnet.precision import full_precision
from awnet.run_folder import RunFolder

_LOG = logging.getLogger("awnet")


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
    """Attacks ``surrogate`` on every image of ``dataset``, or loads the result of an earlier call.

    Runs in full float32, see :func:`awnet.precision.full_precision`.

    Args:
        surrogate: a model, or a run folder or ``.safetensors`` file to load one from.
        dataset: the images; its threat model gives eps and step sizes.
        attack: a name that :func:`awnet.attacks.named_attack` knows, or a function that makes an attack on
            the model it is given.
        folder: where to store the images, as ``<key>.safetensors`` with ``<key>.json``; an interrupted call
            resumes from there. None stores nothing.
        progress: called with (images done, total number of images).
    """
    model = surrogate if isinstance(surrogate, nn.Module) else load_model_file(surrogate)
    check_model(model)
    device = device_of(model)
    dataset = dataset if device is None else dataset.to(device)
    if isinstance(attack, str):
        source = named_attack(attack, model, dataset.threat_model, seed=seed)
    else:
        source = attack(model)
        if not isinstance(source, Attack):
            raise TypeError(f"attack must return an Attack, got {type(source).__name__}")
    provenance = {
        "surrogate": model_fingerprint(model),
        "surrogate_config": config_of(model),
        "settings": source.settings,
        "eps": source.eps,
        "dataset": dataset.name,
        "split": dataset.split,
        "data": dataset.fingerprint(),
        "batch_size": batch_size,
    }
    key = digest(provenance)
    if folder is None:
        return _crafted(source, dataset, provenance, batch_size, progress)
    folder = expanded(folder)
    path = folder / f"{key}.safetensors"
    if path.is_file() and path.with_suffix(".json").is_file():
        return Crafted.load(path)
    make_folder(folder)
    with RunFolder(folder, _LOG.warning, "an attack", "attack again there to resume") as place:
        parts = Saved("", f"{key}.parts", place)
        crafted = _crafted(source, dataset, provenance, batch_size, progress, parts)

        def write() -> None:
            tensors = {"x_adv": crafted.x_adv, "index": crafted.index, "labels": crafted.labels}
            Saved(place.path, "").save(key, tensors)
            write_json(place.path / f"{key}.json", crafted.provenance)

        place.during(write)
        parts.remove()
    return crafted


def _crafted(
    source: Attack,
    dataset: Dataset,
    provenance: dict[str, Any],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    parts: Saved | None = None,
) -> Crafted:
    """The images. Batches in ``parts`` are loaded; all others are stored there."""
    batches: list[Tensor] = []
    for number, (x, y, index) in enumerate(dataset.batches(batch_size)):
        stored = None if parts is None else parts.load(str(number))
        x_adv = source(x, y, index=index).cpu() if stored is None else stored[0]["x_adv"]
        what = f"images of {type(source).__name__}, batch {number}"
        check_ball(x_adv, x.cpu(), source.eps, source.norm, what)
        if parts is not None and stored is None:
            parts.save(str(number), {"x_adv": x_adv})
        batches.append(x_adv)
        if progress is not None:
            progress(min((number + 1) * batch_size, len(dataset)), len(dataset))
    crafted = Crafted(torch.cat(batches), dataset.index.cpu(), dataset.labels.cpu(), provenance)
    provenance |= {"awnet": __version__, "torch": torch.__version__, "content": crafted.content()}
    return crafted
