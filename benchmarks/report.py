"""Tables and figures of the measurements; the tables in the documentation are generated here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from awnet.files import write_text, written_atomically
from awnet.terminal import safe_console

from .goals import evaluate_goals, speedups
from .results import FOLDER, Row, read_results

_MARKED = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)
_ORDER = (
    *("literal", "unfused", "compile", "compile_frozen", "eager", "cpp", "cuda", "triton"),
    *("static", "static_compile"),
)


@dataclass(frozen=True)
class TableOptions:
    """Which documents to update."""

    files: Positional[tuple[Path, ...]] = (Path("README.md"), Path("docs/benchmarks.md"))
    """Documents with markers such as <!-- bench:goals --> … <!-- /bench:goals -->."""
    results: Path = FOLDER
    """Folder of the CSV files."""


@dataclass(frozen=True)
class PlotOptions:
    """What to read and where to write."""

    results: Path = FOLDER
    """Folder of the CSV files."""
    out: Path = FOLDER / "figures"
    """Folder of the PNG files."""


# --- tables


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first ``left`` columns are words."""
    lines = ["| " + " | ".join(heads) + " |"]
    lines.append("|" + "|".join("---" if i < left else "---:" for i in range(len(heads))) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _goals(folder: Path) -> str:
    rows = []
    for outcome in evaluate_goals(folder):
        goal = outcome.goal
        name = f"{goal.name} (stretch)" if goal.stretch else goal.name
        source = "; ".join(outcome.sources)
        rows.append([name, goal.where, source, outcome.text, goal.target, outcome.figure or "–"])
    return _markdown(("goal", "where", "measured on, at commit", "result", "target", "measured"), rows, 4)


def _speed(folder: Path) -> str:
    """The README's table: four ratios on the newest CPU, each with the command that measures it."""
    rows = []
    devices: dict[str, None] = {}
    for one, measured in speedups(folder):
        speedup = "not measured" if measured is None else f"{measured.value:.2g}×"
        rows.append([one.against, one.where, speedup, f"`{one.command}`"])
        devices |= {} if measured is None else {row["device"]: None for row in measured.rows}
    where = f"On {', '.join(devices)}, " if devices else "On a CPU, "
    return f"{where}2 threads, float32, backend `cpp`:\n\n" + _markdown(
        ("compared with", "what", "speedup", "command"), rows, 2
    ).replace("|---:|---:|", "|---:|---|")


def _provider_order(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


def _groups(rows: Sequence[Row], on_gpu: bool) -> dict[tuple[str, ...], list[Row]]:
    """The layers' rows of CPUs or GPUs by device, dtype, layout and timing."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if bool(row["driver"]) == on_gpu and row["mode"] != "ceiling":
            key = (row["device"], row["dtype"], row["layout"], row["timing"])
            groups.setdefault(key, []).append(row)
    return groups


# what the cells of a table are, by timing
_MILLISECONDS = {
    "": "Median milliseconds",
    "graph": "Median milliseconds of a step in a CUDA graph / of a single call, host time included",
    "eager": "Median milliseconds of single calls, host time included (not used for goals)",
}


def _milliseconds(folder: Path, on_gpu: bool) -> str:
    """One table per device: the median time of each case, mode and batch by each provider."""
    parts = []
    rows = read_results(folder)
    for (device, dtype, layout, timing), group in sorted(_groups(rows, on_gpu).items()):
        names = _provider_order({row["provider"] for row in group})
        lines: dict[tuple[str, ...], dict[str, str]] = {}
        for row in group:
            key = (row["case"], row["mode"], row["batch"])
            cell = f"{float(row['ms_median']):.3g}" if row["ms_median"] else "wrong"
            if row["ms_eager"]:
                replay = cell if row["ms_median"] else "–"
                cell = f"{replay} / {float(row['ms_eager']):.3g}"
            lines.setdefault(key, {})[row["provider"]] = cell
        table = [[*key, *(times.get(name, "–") for name in names)] for key, times in lines.items()]
        ceilings = {
            row["case"]: row
            for row in rows
            if row["mode"] == "ceiling" and (row["device"], row["dtype"]) == (device, dtype)
        }
        roof = (
            f"; a copy {float(ceilings['copy']['gb_s']):.0f} GB/s, a matrix product "
            f"{float(ceilings['matmul']['tflop_s']):.3g} TFLOP/s"
            if {"copy", "matmul"} <= ceilings.keys()
            else ""
        )
        commits = ", ".join(dict.fromkeys(row["commit"] for row in group if row["commit"]))
        parts.append(
            f"{device}, {dtype}, {layout}, torch {group[-1]['torch']}, commit {commits}{roof}. "
            f"{_MILLISECONDS[timing if on_gpu else '']}:\n\n"
            + _markdown(("case", "mode", "batch", *names), table, 2)
        )
    return "\n".join(parts) or "Not measured yet.\n"


TABLES: dict[str, Callable[[Path], str]] = {
    "goals": _goals,
    "speed": _speed,
    "cpu": lambda folder: _milliseconds(folder, on_gpu=False),
    "gpu": lambda folder: _milliseconds(folder, on_gpu=True),
}


def filled(text: str, folder: Path) -> str:
    """A document with the tables between its markers regenerated from the CSV files in ``folder``."""

    def table(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in TABLES:
            raise ValueError(f"unknown table bench:{name}; available: {', '.join(TABLES)}")
        return match.group(1) + TABLES[name](folder) + match.group(3)

    result = _MARKED.sub(table, text)
    opened, closed = (text.count(f"<!-- {word}") for word in ("bench:", "/bench:"))
    if not opened == closed == len(_MARKED.findall(text)):
        raise ValueError(
            "a marker <!-- bench:NAME --> is not followed by <!-- /bench:NAME --> on a separate line"
        )
    return result


def tables(options: TableOptions) -> None:
    """Writes the tables into the documents."""
    console = safe_console()
    for path in options.files:
        text = path.read_text(encoding="utf-8")
        try:
            new = filled(text, options.results)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if new != text:
            write_text(path, new)
        count = len(_MARKED.findall(text))
        console.print(f"{path}: {count} tables{', changed' if new != text else ''}", soft_wrap=True)


# --- figures


def plot(options: PlotOptions) -> list[Path]:
    """Draws each device's bars, its roofline, and its batches if there are several; returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    rows = [row for row in read_results(options.results) if row["mode"] == "ceiling" or row["ms_median"]]
    written: list[Path] = []
    for on_gpu in (False, True):
        for (device, dtype, layout, timing), group in sorted(_groups(rows, on_gpu).items()):
            single = " eager" if on_gpu and timing == "eager" else ""
            stem = re.sub(r"[^a-z0-9]+", "-", f"{device} {dtype} {layout}{single}".lower()).strip("-")
            title = f"{device}, {dtype}, {layout}{single}"
            figures = {"bars": _bars(group, title)}
            ceilings = {
                row["case"]: row
                for row in rows
                if row["mode"] == "ceiling" and (row["device"], row["dtype"]) == (device, dtype)
            }
            if {"copy", "matmul"} <= ceilings.keys():
                figures["roofline"] = _roofline(group, ceilings, title)
            if len({row["batch"] for row in group if row["case"] != "network"}) > 1:
                figures["batches"] = _batches(group, title)
            for name, figure in figures.items():
                path = options.out / f"{stem}-{name}.png"
                with written_atomically(path) as temporary:
                    figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
                written.append(path)
    if not written:
        raise ValueError(f"{options.results} has no row with a time: run `awnet bench run` first")
    console = safe_console()
    for path in written:
        console.print(str(path), soft_wrap=True)
    return written


def _axes(count: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0], size[1] * count), layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def _plain_ticks(axis: Any, *, x: bool = False, y: bool = True) -> None:
    """Numbers such as 0.5, 1, 2, 5 on a log axis, in place of powers of ten; a light grid."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for plain, one in ((x, axis.xaxis), (y, axis.yaxis)):
        if plain:
            low, high = sorted(one.get_view_interval())
            few = high / max(low, 1e-12) < 200
            one.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
            one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            one.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", which="major", color="#E4E4E4", linewidth=0.8)
    axis.set_axisbelow(True)


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Places the legend below the panels."""
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)


def _color(name: str) -> str:
    """The color of a provider, the same in every figure."""
    return f"C{_ORDER.index(name)}" if name in _ORDER else "black"


def _shown_batch(rows: Sequence[Row], case: str) -> str:
    """The largest batch up to 512, which the goals use."""
    batches = {int(row["batch"]) for row in rows if row["case"] == case}
    return str(max((b for b in batches if b <= 512), default=min(batches)))


def _bars(rows: Sequence[Row], title: str) -> Any:
    """One panel per mode: the time of each provider over that of unfused, by case."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = _provider_order({row["provider"] for row in rows})
    figure, axes = _axes(len(modes), (1.2 * len(cases) + 3, 3))
    shown = {case: _shown_batch(rows, case) for case in cases}
    times = {
        (row["case"], row["mode"], row["provider"]): float(row["ms_median"])
        for row in rows
        if row["batch"] == shown[row["case"]]
    }
    width = 0.8 / len(names)
    for axis, mode in zip(axes, modes, strict=True):
        for i, name in enumerate(names):
            positions, heights = [], []
            for j, case in enumerate(cases):
                time, plain = times.get((case, mode, name)), times.get((case, mode, "unfused"))
                if time and plain:
                    positions.append(j + (i - (len(names) - 1) / 2) * width)
                    heights.append(time / plain)
            axis.bar(positions, heights, width, color=_color(name))
        axis.axhline(1, color="black", linewidth=0.6)
        axis.set_yscale("log")
        _plain_ticks(axis)
        axis.set_ylabel(f"{mode}: time / unfused's")
        axis.set_xticks(range(len(cases)), [f"{case}\nB = {shown[case]}" for case in cases], fontsize=8)
    axes[0].set_title(f"{title}: below 1 is faster than plain torch, unfused")
    from matplotlib.patches import Patch

    _legend(figure, [Patch(color=_color(name)) for name in names], names)
    return figure


def _roofline(rows: Sequence[Row], ceilings: dict[str, Row], title: str) -> Any:
    """The arithmetic rate of each row over its operations per byte, below the device's ceilings."""
    bandwidth, peak = float(ceilings["copy"]["gb_s"]), float(ceilings["matmul"]["tflop_s"])
    figure, (axis,) = _axes(1, (8, 5))
    for name in _provider_order({row["provider"] for row in rows}):
        points = [
            (1000 * float(row["tflop_s"]) / float(row["gb_s"]), float(row["tflop_s"]))
            for row in rows
            if row["provider"] == name and float(row["gb_s"]) > 0 and float(row["tflop_s"]) > 0
        ]
        axis.scatter([x for x, _ in points], [y for _, y in points], s=10, color=_color(name), label=name)
    low, high = axis.get_xlim()
    intensities = [max(low, 1.0) * (max(high, 1000.0) / max(low, 1.0)) ** (i / 100) for i in range(101)]
    axis.plot(intensities, [min(peak, bandwidth * x / 1000) for x in intensities], color="black", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="FLOP per compulsory byte", ylabel="TFLOP/s", title=title)
    _plain_ticks(axis, x=True)
    _legend(figure, *axis.get_legend_handles_labels())
    return figure


def _batches(rows: Sequence[Row], title: str) -> Any:
    """One panel per case: microseconds per image in an attack step, or in the first mode, over the batch."""
    modes = {row["mode"] for row in rows}
    mode = "attack" if "attack" in modes else sorted(modes)[0]
    cases = list(dict.fromkeys(row["case"] for row in rows if row["mode"] == mode))
    figure, axes = _axes(len(cases), (7, 2.6))
    for axis, case in zip(axes, cases, strict=True):
        selected = [row for row in rows if (row["case"], row["mode"]) == (case, mode)]
        for name in _provider_order({row["provider"] for row in selected}):
            points = sorted(
                (int(row["batch"]), 1000 * float(row["ms_median"]) / int(row["batch"]))
                for row in selected
                if row["provider"] == name
            )
            axis.plot(
                [b for b, _ in points], [us for _, us in points], marker=".", color=_color(name), label=name
            )
        axis.set(xscale="log", yscale="log", ylabel=f"{case}, {mode}: µs per image")
        _plain_ticks(axis)
        batches = sorted({int(row["batch"]) for row in selected})
        axis.set_xticks(batches, [str(batch) for batch in batches], minor=False)
        axis.set_xticks([], minor=True)
    axes[0].set_title(title)
    _legend(figure, *axes[0].get_legend_handles_labels())
    axes[-1].set_xlabel("batch")
    return figure
