"""Attacks a whole data set and stores the adversarial images as one .npz file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from awnet._version import __version__
from awnet.attacks.base import Attack
from awnet.attacks.saved import digest
from awnet.attacks.stochastic import decision, seeded
from awnet.data.dataset import Dataset
from awnet.files import written_atomically
from awnet.models.registry import config_of
from awnet.precision import computed_in, full_precision


@dataclass(frozen=True)
class AdversarialImages:
    """The adversarial images of a data set; tensors on the host.

    x_adv: float32 ``[N, C, H, W]`` in [0, 1]. labels, index, prediction: int64 ``[N]``; ``index`` is each
    image's position in the published order, ``prediction`` the attacked model's class for ``x_adv``.
    provenance: model, data set, settings and versions, JSON-ready.
    """

    x_adv: Tensor
    labels: Tensor
    index: Tensor
    prediction: Tensor
    provenance: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Fraction of the adversarial images that are still classified correctly."""
        return float((self.prediction == self.labels).double().mean())


@full_precision()
def attack_dataset(attack: Attack, dataset: Dataset, batch_size: int) -> AdversarialImages:
    """Runs ``attack`` on all images of ``dataset``, which is on the model's device, in float32."""
    model = attack.model
    dtype = computed_in(model, next(dataset.batches(1)).x)
    batches, predictions = [], []
    for x, y, index in dataset.batches(batch_size):
        x_adv = attack(x, y, index=index)
        with torch.no_grad(), seeded(model, "prediction", index):
            predictions.append(decision(model, x_adv).argmax(1).cpu())
        batches.append(x_adv.cpu())
    x_adv, labels, index = torch.cat(batches), dataset.labels.cpu(), dataset.index.cpu()
    provenance = {
        "model_config": config_of(model),
        "dataset": dataset.name,
        "split": dataset.split,
        "source": dataset.source,
        "fingerprint": dataset.fingerprint(),
        "settings": attack.settings,
        "precision": str(dtype).removeprefix("torch."),
        "content": digest(x_adv, labels, index),
        "awnet": __version__,
        "torch": torch.__version__,
    }
    return AdversarialImages(x_adv, labels, index, torch.cat(predictions), provenance)


def save_npz(path: Path, images: AdversarialImages, provenance: Mapping[str, Any]) -> None:
    """Writes ``x_adv``, ``y``, ``index``, ``prediction`` and ``provenance`` (JSON text) atomically.

    ``provenance`` is added to that of the images.
    """
    with written_atomically(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            x_adv=images.x_adv.numpy(),
            y=images.labels.numpy(),
            index=images.index.numpy(),
            prediction=images.prediction.numpy(),
            provenance=np.array(json.dumps({**images.provenance, **provenance})),
        )
