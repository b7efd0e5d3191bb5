"""Draws the distributions of filters' mean weights, and the weight gap, into the PNG file ``path``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from awnet.analysis.style import ADVERSARIAL, CLEAN, CONTROL, CYCLE, figure_file
from awnet.text import figure_text


def filter_means(
    layers: Mapping[str, Mapping[str, ArrayLike]],
    path: str | Path,
    *,
    title: str = "Mean weight of each filter",
) -> None:
    """Distribution of the filters' mean weights in each layer (Fig. 1 and 3).

    Each panel shows the density with a histogram, or with a tick per filter if it has several series.

    Args:
        layers: layer → series → means ``[C_out]``, one panel per layer; series of the same name share a
            color: "clean…" is blue, "adv…" vermilion, others start with gray.
    """
    if not layers:
        raise ValueError("layers is empty: nothing to draw")
    names = list(dict.fromkeys(name for series in layers.values() for name in series))
    spare = iter((CONTROL, *CYCLE[2:]) * (1 + len(names)))
    colors = {
        name: CLEAN if name.startswith("clean") else ADVERSARIAL if name.startswith("adv") else next(spare)
        for name in names
    }
    columns = min(len(layers), 2)
    rows = -(-len(layers) // columns)
    with figure_file(path, 4.4 * columns + 0.4, 2.5 * rows + 0.8 + 0.1 * len(names)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (layer, series) in zip(panels, layers.items(), strict=False):
            arrays = {name: np.asarray(values, dtype=np.float64) for name, values in series.items()}
            whole = np.concatenate(list(arrays.values()))
            low, high = float(whole.min()), float(whole.max())
            pad = 0.12 * (high - low) or 1e-3
            grid = np.linspace(low - pad, high + pad, 300)
            for row, (name, values) in enumerate(arrays.items()):
                density, color = _density(values, grid), colors[name]
                axes.plot(grid, density, color=color, label=figure_text(name))
                if len(arrays) == 1:
                    bins = round(min(max(1.5 * values.size**0.5, 6), 40))
                    axes.hist(values, bins=bins, density=True, histtype="stepfilled", color=color, alpha=0.3)
                else:  # overlapping histograms hide each other, so each filter gets a tick
                    axes.fill_between(grid, density, color=color, alpha=0.12, lw=0)
                    height = np.full(values.size, -0.03 - 0.05 * row)
                    transform = axes.get_xaxis_transform()
                    axes.plot(
                        values, height, "|", ms=5, mew=0.9, color=color, transform=transform, clip_on=False
                    )
            count = len(next(iter(arrays.values())))
            axes.set_title(f"{figure_text(layer)}, {count} filters", fontweight="normal")
            axes.set(
                xlabel="mean over (C_in, k, k)", ylabel="density", xlim=(grid[0], grid[-1]), ylim=(0, None)
            )
            if len(arrays) > 1:
                axes.tick_params(axis="x", pad=4 + 6 * len(arrays), length=0)
            axes.locator_params(axis="x", nbins=5)
        for axes in panels[len(layers) :]:
            axes.set_axis_off()
        figure.suptitle(figure_text(title), x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        if len(names) > 1:
            lines = {
                line.get_label(): line for panel in panels for line in panel.get_legend_handles_labels()[0]
            }
            labels, handles = list(lines), list(lines.values())
            across = int(15 * columns * 4.4 / (max(len(name) for name in names) + 8))  # 15 letters per inch
            ncols = min(max(across, 1), len(names))
            figure.legend(handles, labels, loc="outside lower center", ncols=ncols)


def weight_gap_curves(gaps: Sequence[Any], path: str | Path, *, title: str) -> None:
    """The gap against ε for each α: measurements as points, Eq. 8 as lines; and their cosine.

    Args:
        gaps: the result of :func:`awnet.analysis.weight_gaps`; α = 0, which has no gap, is not drawn.
    """
    alphas = sorted({gap.adv_weight for gap in gaps} - {0.0})
    if not alphas:
        raise ValueError("gaps has no α above 0: nothing to draw")
    with figure_file(path, 8.4, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        for number, alpha in enumerate(alphas):
            curve = sorted((gap for gap in gaps if gap.adv_weight == alpha), key=lambda gap: gap.eps)
            eps = [gap.eps for gap in curve]
            color = CYCLE[number % len(CYCLE)]
            left.plot(eps, [gap.predicted for gap in curve], color=color, lw=1.2)
            left.plot(eps, [gap.measured for gap in curve], "o", color=color, label=f"α = {alpha:g}")
        right.plot(
            eps[1:] or eps, [gap.cosine for gap in curve][1:] or [curve[0].cosine], "o-", color="#333333"
        )
        lowest = min(gap.cosine for gap in curve)
        left.set(title=figure_text(title), xlabel="ε", ylabel="norm of the gap", ylim=(0, None))
        left.legend(title="points: measured, lines: Eq. 8")
        right.set(
            title="Cosine of measured and predicted", xlabel="ε", ylim=(-1.05 if lowest < 0 else -0.05, 1.05)
        )


def _density(values: NDArray[Any], grid: NDArray[Any]) -> NDArray[Any]:
    """Gaussian kernel density with Silverman's bandwidth."""
    spread = (
        min(values.std(), (np.quantile(values, 0.75) - np.quantile(values, 0.25)) / 1.349) or values.std()
    )
    width = max(0.9 * spread * values.size**-0.2, 1e-3 * (grid[-1] - grid[0]))
    z = (grid[:, None] - values[None, :]) / width
    return np.asarray(np.exp(-0.5 * z * z).mean(1) / (width * np.sqrt(2 * np.pi)))
