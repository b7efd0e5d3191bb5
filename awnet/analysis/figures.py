"""Draws figures from arrays and records into PNG files, independently of models, attacks and reports.

The colors are those of Okabe and Ito, which are distinct with any color vision: blue is clean, vermilion is
adversarial, gray is a control.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from awnet.files import written_atomically
from awnet.text import figure_text

CLEAN, ADVERSARIAL, CONTROL = "#0072B2", "#D55E00", "#7F7F7F"
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelsize": 9.5,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}

#: accuracy and its 95 % interval, as fractions
Measured = tuple[float, tuple[float, float]]


@contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """Yields a figure of ``width`` × ``height`` inches; it is written to ``path`` at the end of the block."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with written_atomically(path) as temporary:
            figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})


def training_curves(records: Sequence[Mapping[str, Any]], path: str | Path, title: str = "Training") -> None:
    """Losses, validation accuracies and, if recorded, the norm of the gradient by epoch.

    Args:
        records: the epochs' records of a run's ``log.jsonl``: ``epoch``, losses (``total``, ``nat``, ``adv``,
            ``type`` and others by name), and fractions named ``…accuracy`` in the epochs with validation.
        path: the PNG file.
    """
    if not records:
        raise ValueError("records is empty: no epoch to draw")
    other = {"epoch", "step", "lr", "router_lr", "images_per_second", "seconds", "w_nat", "type_accuracy"}
    other |= {"grad_norm", "skipped_steps"}  # these are not losses
    norms = any("grad_norm" in record for record in records)
    names = list(dict.fromkeys(name for record in records for name in record))
    numeric = [
        n for n in names if n not in other and all(isinstance(r.get(n, 0.0), int | float) for r in records)
    ]
    scores = [name for name in numeric if name.endswith("accuracy")]
    losses = [name for name in numeric if not name.endswith("accuracy")]
    with _figure(path, 12.0 if norms else 9.0, 3.5) as figure:
        left, right, *further = figure.subplots(1, 3 if norms else 2)
        colors = {"total": "#333333", "nat": CLEAN, "adv": ADVERSARIAL}
        spare = iter(CYCLE[2:] * (1 + len(losses)))
        for name in losses:
            epochs, values = _column(records, name)
            style = {"ls": "-" if name != "type" else (0, (4, 1.5))}
            marker = "o" if len(values) == 1 else None  # a line through one point is invisible
            left.plot(
                epochs,
                values,
                label=figure_text(name),
                color=colors.get(name) or next(spare),
                marker=marker,
                **style,
            )
        for axes in further:
            epochs, values = _column(records, "grad_norm")
            axes.plot(epochs, values, color="#333333", marker="o" if len(values) == 1 else None)
            axes.set(
                title="Norm of the gradient", xlabel="epoch", ylabel="mean over the epoch", ylim=(0, None)
            )
            axes.xaxis.get_major_locator().set_params(integer=True)
        left.set(
            title=f"{figure_text(title)}: loss terms",
            xlabel="epoch",
            ylabel="mean over the epoch",
            ylim=(0, None),
        )
        styles = {
            "clean_accuracy": ("clean, $A_{nat}$", CLEAN),
            "w_robust_accuracy": ("W-Robust, $A_w$", "#333333"),
            "robust_accuracy": ("adversarial, $A_{adv}$", ADVERSARIAL),
        }
        for name in sorted(scores, key=lambda n: list(styles).index(n) if n in styles else len(styles)):
            epochs, values = _column(records, name)
            label, color = styles.get(name, (figure_text(name), CONTROL))
            right.plot(
                epochs, 100 * values, label=label, color=color, marker="o", ms=7 if len(values) == 1 else 3
            )
        chosen = "w_robust_accuracy" if "w_robust_accuracy" in scores else "clean_accuracy"
        if chosen in scores:
            epochs, values = _column(records, chosen)
            best = len(values) - 1 - int(np.argmax(values[::-1]))  # the later one of equals
            right.plot(epochs[best], 100 * values[best], "o", ms=10, mfc="none", mec="#333333", mew=1.4)
            right.annotate(
                f"best: epoch {epochs[best]:.0f}",
                (epochs[best], 100 * values[best]),
                xytext=(0, -16 if values[best] > 0.15 else 12),  # above a point next to the axis
                textcoords="offset points",
                ha="center"
                if 0 < best < len(values) - 1 or len(values) == 1
                else ("left", "right")[best > 0],
                fontsize=8.5,
                color="#333333",
            )
        right.set(title="Validation accuracy", xlabel="epoch", ylabel="percent", ylim=(0, 101))
        for axes, series in ((left, losses), (right, scores)):
            axes.xaxis.get_major_locator().set_params(integer=True)
            if series:
                axes.legend(loc="best", ncols=2 if len(series) > 3 else 1)
        if len(records) == 1:  # the axis would have ticks at fractions of an epoch
            for axes in (left, right, *further):
                axes.set_xticks([records[0]["epoch"]])


def compared_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, title: str = "Training"
) -> None:
    """Loss and validation accuracies of several runs by epoch, one color per run.

    Args:
        runs: name → the epochs' records of each run's ``log.jsonl``, as for :func:`training_curves`.
        path: the PNG file.
    """
    if not any(runs.values()):
        raise ValueError("runs is empty: no epoch to draw")
    with _figure(path, 9.0, 3.5) as figure:
        left, right = figure.subplots(1, 2)
        styles = {"clean_accuracy": (":", "clean"), "w_robust_accuracy": ("-", "$A_w$")}
        for number, (name, records) in enumerate(runs.items()):
            color = CYCLE[number % len(CYCLE)]
            for axes, key, style, label in (
                (left, "total", "-", name),
                *((right, key, style, f"{name}, {text}") for key, (style, text) in styles.items()),
            ):
                if any(key in record for record in records):
                    epochs, values = _column(records, key)
                    factor = 1 if key == "total" else 100
                    axes.plot(epochs, factor * values, ls=style, color=color, label=label, marker="o", ms=3)
        left.set(title=f"{title}: loss", xlabel="epoch", ylabel="mean over the epoch", ylim=(0, None))
        right.set(title="Validation accuracy", xlabel="epoch", ylabel="percent", ylim=(0, 101))
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(loc="best")


def _column(records: Sequence[Mapping[str, Any]], name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    rows = [(record["epoch"], record[name]) for record in records if name in record]
    epochs, values = np.array(rows, dtype=np.float64).T
    return epochs, values


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
        path: the PNG file.
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
    with _figure(path, inches, 3.9) as figure:
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


def differences_by_training(
    differences: Mapping[str, Mapping[str, tuple[Sequence[float], tuple[float, float]]]],
    path: str | Path,
    *,
    title: str = "Differences between trainings",
) -> None:
    """The difference of each training as a mark, next to the mean and its interval.

    Args:
        differences: pair of systems → attack → (one value per training, (low, high) of the mean), fractions.
        path: the PNG file.
    """
    attacks = list(dict.fromkeys(attack for by_attack in differences.values() for attack in by_attack))
    if not attacks:
        raise ValueError("differences holds no attack: nothing to draw")
    width = 0.8 / len(differences)
    with _figure(path, min(max(6.0, 1.2 + 1.5 * len(attacks)), 13.0), 3.9) as figure:
        axes = figure.subplots()
        axes.axhline(0, color="#333333", lw=1)
        for number, (pair, by_attack) in enumerate(differences.items()):
            color = CYCLE[number % len(CYCLE)]
            offset = (number - (len(differences) - 1) / 2) * width
            positions = np.array([attacks.index(attack) for attack in by_attack]) + offset
            for position, (values, _) in zip(positions, by_attack.values(), strict=True):
                spread = np.linspace(-0.3, 0.1, len(values)) * width
                axes.plot(position + spread, 100 * np.asarray(values), "o", ms=4, mfc="none", color=color)
            means = 100 * np.array([np.mean(values) for values, _ in by_attack.values()])
            ends = 100 * np.array([interval for _, interval in by_attack.values()])
            errors = np.abs(ends - means[:, None]).T
            style = {"fmt": "s", "ms": 5, "color": color, "capsize": 3}
            axes.errorbar(positions + 0.25 * width, means, errors, label=figure_text(pair), **style)
        axes.set_xticks(range(len(attacks)), [figure_text(attack) for attack in attacks])
        axes.tick_params(axis="x", length=0)
        axes.set(title=figure_text(title), ylabel="difference in points", xlim=(-0.5, len(attacks) - 0.5))
        figure.legend(loc="outside lower center", ncols=len(differences))


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
        path: the PNG file.
        auc: kind → area under the ROC curve against the first kind, shown next to the row.
        controls: kinds drawn in gray.
    """
    if not p_clean:
        raise ValueError("p_clean is empty: nothing to draw")
    bins = np.linspace(0, 1, 41)
    with _figure(path, 7.0, 0.9 + 0.8 * len(p_clean)) as figure:
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
        path: the PNG file.
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
    with _figure(path, 4.4 * columns + 0.4, 2.5 * rows + 0.8 + 0.1 * len(names)) as figure:
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


def waterfall(
    n: int,
    wrong_clean: int,
    broken: Mapping[str, int],
    path: str | Path,
    *,
    title: str = "Images broken by each attack",
) -> None:
    """Accuracy after each attack; each attack removes the images that it was the first to break.

    Args:
        n: number of images. wrong_clean: how many of them are misclassified before any attack.
        broken: attack → number of images that it was the first to break, in the order in which the attacks
            ran.
        path: the PNG file.
    """
    if n < 1 or wrong_clean + sum(broken.values()) > n:
        raise ValueError(f"{wrong_clean} + {sum(broken.values())} broken images do not fit into n = {n}")
    left = 100 * (n - wrong_clean) / n
    with _figure(path, 7.0, 1.1 + 0.3 * (len(broken) + 2)) as figure:
        axes = figure.subplots()
        axes.barh(0, left, color=CLEAN, height=0.7)
        axes.text(left + 1, 0, f"{left:.1f}", va="center", fontsize=8.5)
        names = ["clean"]
        for row, (name, count) in enumerate(broken.items(), start=1):
            step = 100 * count / n
            axes.barh(row, step, left=left - step, color=ADVERSARIAL, height=0.7)
            axes.barh(row, left - step, color="#E4E4E4", height=0.7)
            axes.text(left + 1, row, f"−{count}" if count else "0", va="center", fontsize=8.5)
            left -= step
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
        path: the PNG file.
        own_eps: the threat model's ε, which is marked.
    """
    with _figure(path, 9.0, 3.2) as figure:
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
        right.set_xticks([0, own_eps, 1], ["0", f"{own_eps:.3g}", "1"], minor=False)
        right.minorticks_off()
        for axes in (middle, right):
            axes.set_ylim(-2, 102)


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
        path: the PNG file.
        auc: kind → area under the curve, shown in the legend.
        controls: kinds drawn in gray.
    """
    if not curves:
        raise ValueError("curves is empty: nothing to draw")
    with _figure(path, 4.6, 4.4) as figure:
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
        path: the PNG file.
        eps: size of the perturbation; -eps is drawn black and +eps white, per channel.
    """
    first, second = np.asarray(clean, dtype=np.float64), np.asarray(adversarial, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 4 or first.shape[1] not in (1, 3) or not len(first):
        raise ValueError(
            f"clean and adversarial must have the same shape [k, 1 or 3, H, W], got {first.shape}, "
            f"{second.shape}"
        )
    rows = (first, np.clip(0.5 + (second - first) / (2 * max(eps, 1e-12)), 0, 1), second)
    with _figure(path, 1.25 * len(first) + 1.0, 4.3) as figure:
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
                ("clean", f"difference\n× {0.5 / eps:.0f}", "adversarial")[row], fontsize=8.5
            )


def weight_gap_curves(gaps: Sequence[Any], path: str | Path, *, title: str) -> None:
    """The gap against ε for each α: measurements as points, Eq. 8 as lines; and their cosine.

    Args:
        gaps: the result of :func:`awnet.analysis.weight_gaps`.
        path: the PNG file.
    """
    if not gaps:
        raise ValueError("gaps is empty: nothing to draw")
    with _figure(path, 8.4, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        for number, alpha in enumerate(sorted({gap.adv_weight for gap in gaps} - {0.0})):
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
