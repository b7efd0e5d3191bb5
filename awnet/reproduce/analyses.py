"""What ``awnet analyse`` draws for any set of checkpoints, with the data behind each figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from awnet.analysis import WeightGap, weight_gap_curves, weight_gaps
from awnet.analysis import filter_means as draw_filter_means
from awnet.evaluation.filters import filter_means
from awnet.files import write_text
from awnet.ops import use_backend

_EPS_SCALES = (0.0, 0.25, 0.5, 1.0)
_ADV_WEIGHTS = (0.0, 0.5, 1.0)


def compare_filters(
    networks: Mapping[str, Mapping[str, nn.Module]],
    x: Tensor,
    out: Path,
    *,
    layers: int = 2,
    title: str = "Means of the filters' weights",
) -> list[Path]:
    """Fig. 1 and 3: distributions of the filters' mean weights, ``filter_means.{png,csv}`` in ``out``.

    Args:
        networks: network → (how it was trained → model): a panel for each network and layer, a curve for each
            model in it.
        x: an image [1, C, H, W] that the models take.
        layers: how many convolutions of each network, from the first.

    Raises ValueError where the models of a network differ in their convolutions.
    """
    panels: dict[str, dict[str, NDArray[np.float64]]] = {}
    rows = ["network,layer,model,filter,mean"]
    for network, models in networks.items():
        shapes: dict[str, int] = {}
        for label, model in models.items():
            means = filter_means(model, x, {})
            for number, (layer, values) in enumerate(list(means.items())[:layers], start=1):
                if shapes.setdefault(layer, len(values)) != len(values):
                    raise ValueError(
                        f"the models of {network} differ in {layer}: compare networks of one kind"
                    )
                panels.setdefault(f"{network}, convolution {number}", {})[label] = values
                rows += [f"{network},{layer},{label},{i},{value:.8g}" for i, value in enumerate(values)]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "filter_means.csv", "\n".join(rows) + "\n")
    draw_filter_means(panels, out / "filter_means.png", title=title)
    return [out / "filter_means.png", out / "filter_means.csv"]


def measure_weight_gap(model: nn.Module, x: Tensor, y: Tensor, eps: float, out: Path) -> list[Path]:
    """Section 3.2 at the model's weights, ε up to ``eps``: ``one_step.{png,csv}`` in ``out``.

    x [B, C, H, W] and y int64 [B] are the images over which Eq. 8 takes its expectation.
    """
    model.eval()
    with use_backend("reference"):  # Eq. 8 is a second derivative
        gaps = weight_gaps(model, x, y, [eps * scale for scale in _EPS_SCALES], _ADV_WEIGHTS)
    names = [field.name for field in fields(WeightGap)]
    rows = [",".join(names), *(",".join(f"{getattr(gap, n):.8g}" for n in names) for gap in gaps)]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "one_step.csv", "\n".join(rows) + "\n")
    weight_gap_curves(gaps, out / "one_step.png", title="One step of training")
    return [out / "one_step.png", out / "one_step.csv"]
