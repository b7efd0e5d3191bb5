"""The figures of ``awnet analyze`` for any set of checkpoints, with their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from awnet.analysis import WeightGap, weight_gap_curves, weight_gaps
from awnet.analysis import filter_means as draw_filter_means
from awnet.attacks import named_attack
from awnet.data import Dataset
from awnet.evaluation.filters import filter_means
from awnet.files import make_folder, write_text
from awnet.models.registry import name_of
from awnet.nn import has_router, route
from awnet.ops import use_backend
from awnet.precision import full_precision
from awnet.text import csv_text

_EPS_SCALES = (0.0, 0.25, 0.5, 1.0)
_ADV_WEIGHTS = (0.0, 0.5, 1.0)


def compare_filters(
    networks: Mapping[str, Mapping[str, nn.Module]],
    out: Path,
    *,
    layers: int = 2,
    title: str = "Means of the filters' weights",
) -> list[Path]:
    """Fig. 1 and 3: distributions of the filters' mean weights, ``filter_means.{png,csv}`` in ``out``.

    Args:
        networks: network → (training → model): a panel for each network and layer, a curve for each model.
        out: folder of the files.
        layers: number of convolutions of each network, from the first.
        title: of the figure.

    Raises:
        ValueError: the models of a network have different convolutions.
    """
    panels: dict[str, dict[str, NDArray[np.float64]]] = {}
    rows: list[tuple[Any, ...]] = [("network", "layer", "model", "filter", "mean")]
    for network, models in networks.items():
        shapes: dict[str, int] = {}
        for label, model in models.items():
            for key, values in list(filter_means(model).items())[:layers]:
                layer = key.removeprefix("weights/")
                if shapes.setdefault(layer, len(values)) != len(values):
                    raise ValueError(
                        f"the models of {network} differ in {layer}: compare networks of one kind"
                    )
                panels.setdefault(f"{network}: {layer}", {})[label] = values
                rows += [(network, layer, label, i, float(value)) for i, value in enumerate(values)]
    return _write(panels, rows, out, "filter_means", title)


def by_architecture(models: Mapping[str, nn.Module]) -> dict[str, dict[str, nn.Module]]:
    """Groups of models for :func:`compare_filters`, under the names of the architectures.

    The models of a group have convolutions with the same names and widths.
    """
    groups: dict[tuple[tuple[str, int], ...], dict[str, nn.Module]] = {}
    for label, model in models.items():
        key = tuple((layer, len(values)) for layer, values in filter_means(model).items())
        groups.setdefault(key, {})[label] = model
    named: dict[str, dict[str, nn.Module]] = {}
    for group in groups.values():
        name = " and ".join(dict.fromkeys(name_of(model) for model in group.values()))
        number = sum(known.split(", kind")[0] == name for known in named)  # groups of other widths
        named[f"{name}, kind {number + 1}" if number else name] = group
    return named


@full_precision()
def effective_filters(
    models: Mapping[str, tuple[nn.Module, Dataset]],
    out: Path,
    *,
    attack: str = "pgd_sat",
    layers: int = 2,
    title: str = "Means of the filters as the router scales them",
) -> list[Path]:
    """Fig. 3 for AW-Nets: means of the effective filters ω·𝒦 and of the weights.

    ω is averaged over clean images, and over their adversarial images. Writes
    ``effective_filters.{png,csv}`` in ``out``.

    Args:
        models: label → model and one batch of images. Models without filter scales are skipped.
        attack: name of the attack that makes the adversarial images, with the threat model of the data set.
        layers: number of dynamic convolutions that are drawn, from the first; the table contains all.

    Returns:
        The files; none if no model has filter scales.
    """
    panels: dict[str, dict[str, NDArray[np.float64]]] = {}
    rows: list[tuple[Any, ...]] = [("model", "layer", "images", "filter", "mean")]
    for label, (model, dataset) in models.items():
        model.eval()
        x, y, index = next(dataset.batches(len(dataset)))
        if not has_router(model) or not route(model, x[:1]).filter_scales:
            continue
        x_adv = named_attack(attack, model, dataset.threat_model)(x, y, index=index)
        with torch.no_grad():
            scales = {
                kind: [scale.mean(0) for scale in route(model, images).filter_scales]
                for kind, images in (("clean", x), ("adversarial", x_adv))
            }
        series: dict[str, dict[str, NDArray[np.float64]]] = {}
        for key, values in filter_means(model, x[:1], scales).items():
            kind, layer = key.split("/", 1)
            series.setdefault(layer, {})[kind] = values
        dynamic = {layer: kinds for layer, kinds in series.items() if len(kinds) == 3}
        for number, (layer, kinds) in enumerate(dynamic.items()):
            for kind, values in kinds.items():
                rows += [(label, layer, kind, i, float(value)) for i, value in enumerate(values)]
            if number < layers:
                panels[f"{label}: {layer}"] = {
                    "weights": kinds["weights"],
                    "clean images, ω·weights": kinds["clean"],
                    f"adversarial images ({attack}), ω·weights": kinds["adversarial"],
                }
    return _write(panels, rows, out, "effective_filters", title) if panels else []


def _write(
    panels: Mapping[str, Mapping[str, NDArray[np.float64]]],
    rows: Sequence[Sequence[Any]],
    out: Path,
    name: str,
    title: str,
) -> list[Path]:
    make_folder(out)
    write_text(out / f"{name}.csv", csv_text(rows))
    draw_filter_means(panels, out / f"{name}.png", title=title)
    return [out / f"{name}.png", out / f"{name}.csv"]


@full_precision()
def measure_weight_gap(model: nn.Module, x: Tensor, y: Tensor, eps: float, out: Path) -> list[Path]:
    """Section 3.2 at the model's weights, ε up to ``eps``: ``one_step.{png,csv}`` in ``out``.

    x [B, C, H, W] and y int64 [B] are the images over which Eq. 8 takes its expectation.
    """
    model.eval()
    with use_backend("reference"):  # Eq. 8 is a second derivative
        gaps = weight_gaps(model, x, y, [eps * scale for scale in _EPS_SCALES], _ADV_WEIGHTS)
    names = [field.name for field in fields(WeightGap)]
    rows = [names, *([getattr(gap, name) for name in names] for gap in gaps)]
    make_folder(out)
    write_text(out / "one_step.csv", csv_text(rows))
    weight_gap_curves(gaps, out / "one_step.png", title="One step of training")
    return [out / "one_step.png", out / "one_step.csv"]
