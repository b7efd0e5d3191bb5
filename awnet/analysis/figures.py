"""Draws the figures of an evaluation from arrays into the PNG file ``path``, without models or reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from awnet.analysis.style import ADVERSARIAL, CLEAN, CONTROL, CYCLE, figure_file
from awnet.text import figure_text

#: accuracy and its 95 % interval, as fractions
Measured = tuple[float, tuple[float, float]]


def w_robust_bars(
    systems: Mapping[str, Mapping[str, Measured]],
    path: str | Path,
    *,
    clean: Mapping[str, float] | None = None,
    title: str = "W-Robust accuracy",
) -> None:
    """A_w (Eq. 23) of each system under each attack, with 95 % intervals.

    Args:
        systems: system → attack → (A_w, (low, high)), fractions.
        clean: A_nat of each system, a fraction, shown in the legend.
    """
    attacks = list(dict.fromkeys(attack for measured in systems.values() for attack in measured))
    if not attacks:
        raise ValueError("systems holds no attack: nothing to draw")
    count = len(systems)
    width = min(0.8 / count, 0.34)
    inches = min(max(7.5, 1.2 + len(attacks) * (0.7 + 0.55 * count)), 13.0)
    label_inches = 0.7 + 0.085 * max(
        len(system) + (0 if clean is None else len(" (clean 00.0 %)")) for system in systems
    )
    with figure_file(path, inches, 3.9) as figure:
        axes = figure.subplots()
        top = 0.0
        for number, (system, measured) in enumerate(systems.items()):
            columns = [i for i, attack in enumerate(attacks) if attack in measured]
            values = 100 * np.array([measured[attacks[i]][0] for i in columns])
            ends = 100 * np.array([measured[attacks[i]][1] for i in columns], dtype=np.float64)
            offset = (number - (count - 1) / 2) * width
            system_text = figure_text(system)
            label = system_text if clean is None else f"{system_text} (clean {100 * clean[system]:.1f} %)"
            positions = np.array(columns) + offset
            axes.bar(positions, values, 0.9 * width, color=CYCLE[number % len(CYCLE)], label=label)
            errors = np.abs(ends - values[:, None]).T
            axes.errorbar(positions, values, errors, fmt="none", ecolor="#222222", elinewidth=1.1, capsize=3)
            for x, value, end in zip(positions, values, ends[:, 1], strict=True):
                axes.text(x, end + 1.5, f"{value:.1f}", ha="center", va="bottom", fontsize=8.5)
            top = max(top, float(ends.max()))
        axes.set_xticks(range(len(attacks)), [figure_text(attack) for attack in attacks])
        axes.tick_params(axis="x", length=0)
        axes.set(title=figure_text(title), ylabel="$A_w$ in percent", ylim=(0, max(top + 9, 20)))
        axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])
        figure.legend(loc="outside lower center", ncols=max(1, min(count, 3, int(inches / label_inches))))


def p_clean_histogram(
    p_clean: Mapping[str, ArrayLike],
    path: str | Path,
    *,
    auc: Mapping[str, float] | None = None,
    controls: Sequence[str] = (),
    title: str = "The router's probability that an image is clean",
) -> None:
    """A histogram of the router's p_clean for each kind of image, one row each.

    Args:
        p_clean: kind → p ``[n]`` in [0, 1]; the first kind is clean, drawn in blue.
        auc: kind → area under the ROC curve against the first kind, shown next to the row.
        controls: kinds drawn in gray.
    """
    if not p_clean:
        raise ValueError("p_clean is empty: nothing to draw")
    bins = np.linspace(0, 1, 41)
    with figure_file(path, 7.0, 0.9 + 0.8 * len(p_clean)) as figure:
        rows = figure.subplots(len(p_clean), 1, sharex=True, squeeze=False)[:, 0]
        for number, (axes, (kind, values)) in enumerate(zip(rows, p_clean.items(), strict=True)):
            p = np.asarray(values, dtype=np.float64)
            color = CONTROL if kind in controls else (ADVERSARIAL if number else CLEAN)
            axes.stairs(100 * np.histogram(p, bins)[0] / p.size, bins, fill=True, color=color)
            axes.set(xlim=(-0.01, 1.01), ylim=(0, None))
            axes.locator_params(axis="y", nbins=3)
            axes.tick_params(axis="x", length=3 if axes is rows[-1] else 0)
            area = f"AUC {auc[kind]:.3f}" if auc is not None and kind in auc else ""
            axes.annotate(
                f"{figure_text(kind)}\nmean p {p.mean():.2f}\n{area}".rstrip(),
                (1.02, 0.5),
                xycoords="axes fraction",
                va="center",
                color=color,
                fontsize=9,
            )
        figure.suptitle(figure_text(title), x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        figure.supylabel("percent of the images", fontsize=9.5)
        rows[-1].set_xlabel("p")


def waterfall(
    n: int,
    wrong_clean: int,
    broken: Mapping[str, int],
    path: str | Path,
    *,
    title: str = "Images broken by each attack",
) -> None:
    """Accuracy in percent after each attack, and the part of it that each attack was the first to break.

    Args:
        n: number of images. wrong_clean: how many of them are misclassified before any attack.
        broken: attack → number of images that it was the first to break, in the order in which the attacks
            ran.
    """
    if n < 1 or wrong_clean + sum(broken.values()) > n:
        raise ValueError(f"{wrong_clean} + {sum(broken.values())} broken images do not fit into n = {n}")
    remaining = n - wrong_clean
    left = 100 * remaining / n
    with figure_file(path, 7.0, 1.1 + 0.3 * (len(broken) + 2)) as figure:
        axes = figure.subplots()
        axes.barh(0, left, color=CLEAN, height=0.7)
        axes.text(left + 1, 0, f"{left:.1f}", va="center", fontsize=8.5)
        names = ["clean"]
        for row, (name, count) in enumerate(broken.items(), start=1):
            step = 100 * count / n
            axes.barh(row, step, left=left - step, color=ADVERSARIAL, height=0.7)
            axes.barh(row, left - step, color="#E4E4E4", height=0.7)
            axes.text(left + 1, row, f"−{step:.1f}" if count else "0", va="center", fontsize=8.5)
            remaining -= count
            left = 100 * remaining / n
            names.append(figure_text(name))
        axes.barh(len(names), left, color="#333333", height=0.7)
        axes.text(left + 1, len(names), f"{left:.1f}", va="center", fontsize=8.5)
        names.append("robust to all")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(title=figure_text(title), xlabel="percent of the images", xlim=(0, 108))


def sanity_curves(
    steps: Sequence[int],
    loss: ArrayLike,
    accuracy: ArrayLike,
    eps: ArrayLike,
    accuracy_by_eps: ArrayLike,
    path: str | Path,
    *,
    own_eps: float,
) -> None:
    """Loss and accuracy against the attack's steps, and accuracy against the size of the perturbation.

    Args:
        steps, loss, accuracy: for the attack at ``own_eps``, ``[m]`` each; accuracies are fractions.
        eps, accuracy_by_eps: ``[k]`` each, in image units and as fractions.
        own_eps: the threat model's ε, which is marked.
    """
    with figure_file(path, 9.0, 3.2) as figure:
        left, middle, right = figure.subplots(1, 3)
        left.plot(steps, np.asarray(loss), "o-", color=ADVERSARIAL, ms=4)
        left.set(title="Loss against steps", xlabel="steps", ylabel="cross-entropy", xscale="log")
        middle.plot(steps, 100 * np.asarray(accuracy), "o-", color=ADVERSARIAL, ms=4)
        middle.set(title="Accuracy against steps", xlabel="steps", ylabel="percent", xscale="log")
        sizes = np.asarray(eps, dtype=np.float64)
        right.plot(sizes, 100 * np.asarray(accuracy_by_eps), "o-", color="#333333", ms=4)
        right.axvline(own_eps, color=CLEAN, lw=1.2, ls=(0, (4, 1.5)))
        right.set(title="Accuracy against ε", xlabel="ε", ylabel="percent")
        right.set_xscale("symlog", linthresh=max(own_eps, 1e-6))
        largest = float(sizes.max())
        right.set_xticks([0, own_eps, largest], ["0", f"{own_eps:.3g}", f"{largest:.3g}"], minor=False)
        right.minorticks_off()
        for axes in (middle, right):
            axes.set_ylim(-2, 102)


def accuracy_against_eps(
    curves: Mapping[str, Mapping[str, Any]],
    path: str | Path,
    *,
    own_eps: float,
    attacks: Mapping[str, Measured] | None = None,
    title: str = "",
) -> None:
    """Robust accuracy against the size of the perturbation, with intervals.

    Args:
        curves: attack → ``eps``, ``accuracy``, ``low`` and ``high`` ``[k]`` each, in image units and as
            fractions, and ``norm``, the name of the norm for the axis.
        own_eps: the threat model's ε, which is marked.
        attacks: robust accuracies at ``own_eps`` under other attacks, with intervals, as points.
    """
    with figure_file(path, 7.0, 4.0) as figure:
        axes = figure.subplots()
        for color, (name, curve) in zip(cycle((ADVERSARIAL, "#333333")), curves.items(), strict=False):
            sizes = np.asarray(curve["eps"], dtype=np.float64)
            accuracy, lower, upper = (100 * np.asarray(curve[key]) for key in ("accuracy", "low", "high"))
            axes.step(sizes, accuracy, where="post", color=color, label=figure_text(name))
            axes.fill_between(sizes, lower, upper, step="post", color=color, alpha=0.18, lw=0)
        for number, (name, (value, (low, high))) in enumerate((attacks or {}).items()):
            bars = [[100 * max(value - low, 0)], [100 * max(high - value, 0)]]
            marker = "osv^Dx+*"[number % 8]
            style = {"fmt": marker, "color": CLEAN, "ms": 5, "lw": 0.8, "label": figure_text(name)}
            axes.errorbar([own_eps], [100 * value], bars, **style)
        axes.axvline(own_eps, color=CLEAN, lw=1.0, ls=(0, (4, 1.5)))
        norm = next(iter(curves.values()))["norm"]
        axes.set(
            title=figure_text(title), xlabel=f"ε ({norm})", ylabel="robust accuracy, percent", ylim=(-2, 102)
        )
        axes.set_xlim(left=0)
        axes.legend(fontsize="small", ncols=1 + len(attacks or {}) // 8)


def roc_curves(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    path: str | Path,
    *,
    auc: Mapping[str, float],
    controls: Sequence[str] = (),
) -> None:
    """ROC curves of the router.

    Args:
        curves: kind → (fraction of that kind classified as clean, fraction of clean images classified as
            clean), ``[m]`` each.
        auc: kind → area under the curve, shown in the legend.
        controls: kinds drawn in gray.
    """
    if not curves:
        raise ValueError("curves is empty: nothing to draw")
    with figure_file(path, 4.6, 4.4) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#CCCCCC", lw=1)
        colors, dashes = iter(CYCLE[1:] * (1 + len(curves))), iter(("-", (0, (4, 1.5)), ":") * len(curves))
        for kind, (x, y) in curves.items():
            control = kind in controls
            axes.plot(
                np.asarray(x),
                np.asarray(y),
                color=CONTROL if control else next(colors),
                ls=next(dashes) if control else "-",
                label=f"{figure_text(kind)}, AUC {auc[kind]:.3f}",
            )
        axes.set(
            title="ROC of the router",
            xlabel="fraction of the other images classified as clean",
            ylabel="fraction of clean images classified as clean",
            xlim=(-0.01, 1.01),
            ylim=(-0.01, 1.01),
            aspect="equal",
        )
        axes.legend(loc="lower right", fontsize=8)


def example_images(
    clean: ArrayLike,
    adversarial: ArrayLike,
    captions: Sequence[tuple[str, str]],
    path: str | Path,
    *,
    eps: float,
) -> None:
    """Images before and after an attack, and the perturbation, magnified to the full range.

    Args:
        clean, adversarial: ``[k, C, H, W]`` in [0, 1], C = 1 or 3.
        captions: (before, after) for each image, for example the predicted classes.
        eps: largest change of a pixel; -eps is drawn black and +eps white, per channel.
    """
    first, second = np.asarray(clean, dtype=np.float64), np.asarray(adversarial, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 4 or first.shape[1] not in (1, 3) or not len(first):
        raise ValueError(
            f"clean and adversarial must have the same shape [k, 1 or 3, H, W], got {first.shape}, "
            f"{second.shape}"
        )
    rows = (first, np.clip(0.5 + (second - first) / (2 * max(eps, 1e-12)), 0, 1), second)
    with figure_file(path, 1.25 * len(first) + 1.0, 4.3) as figure:
        panels = figure.subplots(3, len(first), squeeze=False)
        for row, images in enumerate(rows):
            for column, image in enumerate(images):
                axes = panels[row, column]
                pixels = np.clip(np.moveaxis(image, 0, -1), 0, 1)
                axes.imshow(
                    pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1
                )
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(visible=False)
                if row != 1:
                    axes.set_xlabel(captions[column][row // 2], fontsize=8)
            panels[row, 0].set_ylabel(
                ("clean", f"difference\n× {0.5 / eps:.{0 if eps < 0.5 else 1}f}", "adversarial")[row],
                fontsize=8.5,
            )


def paired_differences(
    series: Mapping[str, Mapping[str, tuple[float, tuple[float, float], tuple[float, float] | None]]],
    path: str | Path,
    *,
    title: str = "Difference",
) -> None:
    """Differences to a baseline as marks, with their intervals as lines: a row for each quantity and system.

    Args:
        series: system → quantity → (difference, interval over images, interval over trainings or None), as
            fractions. The second interval is thin and has caps.
    """
    quantities = list(dict.fromkeys(quantity for by_quantity in series.values() for quantity in by_quantity))
    if not quantities:
        raise ValueError("series holds no difference: nothing to draw")
    step = 0.8 / len(series)
    with figure_file(path, 7.0, 1.3 + 0.22 * len(quantities) * (1 + len(series))) as figure:
        axes = figure.subplots()
        axes.axvline(0, color="#333333", lw=1)
        for number, (system, by_quantity) in enumerate(series.items()):
            color = CYCLE[number % len(CYCLE)]
            offset = (number - (len(series) - 1) / 2) * step
            label: str | None = figure_text(system)
            for quantity, (difference, images, trainings) in by_quantity.items():
                y = quantities.index(quantity) + offset
                axes.plot(100 * np.asarray(images), [y, y], color=color, lw=3.5, solid_capstyle="butt")
                if trainings is not None:
                    ends = 100 * np.abs(np.asarray(trainings) - difference)[:, None]
                    axes.errorbar(100 * difference, y, xerr=ends, color=color, lw=1, capsize=3)
                axes.plot(100 * difference, y, "o", ms=5, color=color, mec="#222222", label=label)
                label = None
        axes.set_yticks(range(len(quantities)), [figure_text(quantity) for quantity in quantities])
        axes.invert_yaxis()
        axes.grid(axis="x", visible=True)
        axes.grid(axis="y", visible=False)
        axes.set(title=figure_text(title), xlabel="points, with 95 % intervals")
        figure.legend(loc="outside lower center", ncols=max(1, min(len(series), 2)))
