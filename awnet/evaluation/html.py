"""Renders a report as one self-contained HTML page, for a browser, a phone, or paper."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from awnet.data.threat_model import eps_text, norm_text
from awnet.evaluation.paper import PaperRow, paper_rows
from awnet.evaluation.results import AttackResult, Results
from awnet.evaluation.tables import attack_label, interval_text, p_text, parts_caption
from awnet.files import read_json

# awnet's names of the networks of Tables I, II and XI
_SYSTEMS = {
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "wrn34_8": "WideResNet-34-8",
    "vgg16_bn": "VGG-16-BN",
    "repvgg_a2": "RepVGG-A2",
    "awnet_resnet18": "AW-Net",
}
_TABLES = {"cifar10": "1", "cifar100": "2", "tiny_imagenet": "11"}
FIGURES = {
    "waterfall.png": "Accuracy after each attack; an image counts for the attack that broke it first",
    "w_robust.png": "W-Robust accuracy under each attack, with 95 % intervals",
    "accuracy_by_eps.png": "Robust accuracy at every size of the perturbation, with 95 % intervals: the "
    "fraction of images for which the minimum-norm attack found no smaller perturbation",
    "examples.png": "Images before and after the attack that broke them, and the magnified difference",
    "sanity.png": "Loss and accuracy against steps, accuracy against the size of the perturbation",
    "roc.png": "ROC of the router's type head",
    "p_clean.png": "The router's probability that an image is clean, for each kind of image",
    "filter_means.png": "Means of the filters' weights",
    "training.png": "Training",
}

_STYLE = """
:root { --ink: #1c1c1c; --soft: #5a5a5a; --line: #d9d9d9; --clean: #0072b2; --adv: #d55e00; --good: #00734f; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; } .soft, figcaption, caption { color: var(--soft); font-size: .875rem; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; padding: 0; }
.card { flex: 1 1 9rem; border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.2; } .card.head { border: 2px solid var(--ink); }
.flags { border-left: 4px solid var(--adv); padding: .1rem 1rem; background: #fdf4ee; }
.wide { overflow-x: auto; background: linear-gradient(90deg, #fff 2rem, #fff0) 0 / 3rem 100% no-repeat local,
  linear-gradient(-90deg, #fff 2rem, #fff0) 100% / 3rem 100% no-repeat local,
  linear-gradient(90deg, #bbb, #fff0) 0 / .5rem 100% no-repeat scroll,
  linear-gradient(-90deg, #bbb, #fff0) 100% / .5rem 100% no-repeat scroll; } /* a shadow where it scrolls */
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
caption { text-align: left; padding-bottom: .3rem; }
caption span { display: block; max-width: calc(100vw - 2rem); }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
thead th { border-bottom: 2px solid var(--ink); }
.suspicious { color: var(--adv); font-weight: bold; } .pass { color: var(--good); }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } .whole { white-space: nowrap; }
@media screen and (max-width: 640px) { table { font-size: .8rem; } th, td { padding: .25rem .3rem; } }
details { margin: 1rem 0; } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
@media print { body { font-size: 10.5pt; max-width: none; padding: 0; }
  .wide { overflow: visible; background: none; }
  figure, table, .cards, .flags { break-inside: avoid; } h2 { break-after: avoid; } }
"""


_DIFFERENCES = (
    "Differences in points, with 95 % intervals: thick lines over images, thin lines over trainings if there "
    "are several"
)
_INTERVAL = re.compile(r"\[[-+−–.\d]+, [-+−–.\d]+\]")


def page(report: Results, folder: Path, place: Path | None = None) -> str:
    """The page for ``report``; the PNG files in ``folder`` are embedded as figures.

    ``place`` is the folder where the page will be stored, if it is not ``folder``. If it is
    ``RUN/evaluations/NAME``, the page names the run.
    """
    place = place or folder
    run, started = _run(place)
    title = f"{report.model} on {report.dataset}" + (f" · {run}" if run else "")
    chosen = f"Checkpoint selected on {report.selected_on}. " if report.selected_on else ""
    trained = f"Run {run}, trained {started}. " if run and started else ""
    about = trained + chosen + _images(report)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(about)}. Percent, with 95 % intervals in brackets.</p>',
        _cards(report),
        _flags(report.flags, "Warnings"),
        _attacks(report),
        _norms(report, place.name),
        *_figures(folder, ("waterfall.png", "w_robust.png")),
        _minimum_norm(report),
        *_figures(folder, ("accuracy_by_eps.png", "examples.png")),
        _sanity(report.sanity),
        *_figures(folder, ("sanity.png",)),
        _detection(report),
        *_figures(folder, ("roc.png", "p_clean.png")),
        _parts(report),
        _compared(report),
        *_figures(folder, ("filter_means.png", "training.png")),
        _settings(report),
    ]
    return _document(title, parts)


def _document(title: str, parts: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def comparison_page(
    title: str,
    setting: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str,
    notes: Sequence[str],
    figure: Path,
) -> str:
    """The page for a comparison of several reports.

    Args:
        title, setting: the heading, and the line below it.
        headings, rows, caption: of the table, as text; the second column is aligned left.
        notes: what could not be compared.
        figure: the PNG file to embed.
    """
    cells = [[escape(cell) for cell in row] for row in rows]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_with_epsilon(setting))}.</p>',
        _table(headings, cells, caption, text=(1,)),
        _embedded(figure, _DIFFERENCES),
        _flags(notes, "Notes"),
    ]
    return _document(title, parts)


def summary(report: Results) -> str:
    """A table of the accuracies for a notebook: an HTML fragment."""
    rows = [["clean", _with_interval(report.clean_accuracy, report.clean_interval_95), ""]]
    rows += [_attack_cells(name, result) for name, result in report.results().items()]
    where = f"{report.model}, {_images(report)}; percent [95 %]"
    table = _table(("attack", "accuracy", "A_w = ½ clean + ½ robust"), rows, where)
    return table + (f"<p>Warnings:</p>{_list(report.flags)}" if report.flags else "")


def _images(report: Results) -> str:
    return f"{report.n} {report.split} images of {report.dataset}, {_with_epsilon(report.threat_text)}"


def _with_epsilon(text: str) -> str:
    return text.replace(" eps ", ", ε = ")


def _run(folder: Path) -> tuple[str, str]:
    """Name and start of the run whose ``evaluations/<name>`` is ``folder``; empty if it belongs to no run."""
    run = folder.resolve().parent.parent
    if folder.resolve().parent.name != "evaluations" or not (run / "config.json").is_file():
        return "", ""
    try:
        started = read_json(run / "config.json")["sessions"][-1]["started"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return run.name, ""
    return run.name, str(started)[:16].replace("T", " ")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{_percent(value)} [{_percent(interval[0])}, {_percent(interval[1])}]"


def _table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", text: Sequence[int] = ()
) -> str:
    """An HTML table. Cells are HTML already; the columns ``text`` are aligned left."""

    def line(cells: Sequence[str], tag: str) -> str:
        marked = (f'<{tag} class="text">' if i in text else f"<{tag}>" for i in range(len(cells)))
        return "<tr>" + "".join(f"{m}{c}</{tag}>" for m, c in zip(marked, cells, strict=True)) + "</tr>"

    title = f"<caption><span>{escape(caption)}</span></caption>" if caption else ""
    # no line breaks inside intervals
    body = _INTERVAL.sub(r'<span class="whole">\g<0></span>', "\n".join(line(row, "td") for row in rows))
    return (
        f'<div class="wide"><table>{title}<thead>{line([escape(h) for h in headings], "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cards(report: Results) -> str:
    """The clean accuracy, the headline and its A_w; only the first if the precision allows no headline."""
    cards = [("", "clean", report.clean_accuracy, report.clean_interval_95)]
    headline = None if report.approximate else report.headline()
    if headline is not None:
        kind, worst = headline
        name = "the worst case over the norms" if report.norms else "the worst case over all attacks"
        if report.missing:
            name = (
                f"the worst case over the attacks that could run, incomplete: {len(report.missing)} could not"
            )
        if kind != "union":
            count = len(report.attacks)
            name = f"{attack_label(kind)}, the strongest of {count} attacks (no union was measured)"
        cards.append((" head", f"robust: {name}", worst.robust_accuracy, worst.interval_95))
        cards.append(("", "W-Robust, ½ clean + ½ robust", worst.w_robust_accuracy, worst.w_interval_95))
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card{kind}"><b>{_percent(value)}</b>{escape(what)}<br>'
            f'<span class="soft whole">[{_percent(low)}, {_percent(high)}]</span></div>'
            for kind, what, value, (low, high) in cards
        )
        + "</div>"
    )


def _list(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def _flags(flags: Sequence[str], heading: str) -> str:
    return f'<div class="flags"><h2>{heading}</h2>{_list(flags)}</div>' if flags else ""


def _attack_cells(name: str, result: AttackResult) -> list[str]:
    robust = _with_interval(result.robust_accuracy, result.interval_95)
    w_robust = _with_interval(result.w_robust_accuracy, result.w_interval_95)
    return [escape(attack_label(name)), robust, w_robust]


def _paper_row(report: Results, attack: str) -> PaperRow | None:
    table, system = _TABLES.get(report.dataset), _SYSTEMS.get(report.model)
    rows = () if table is None else paper_rows(table)
    return next((row for row in rows if row.system == system and row.attack == attack), None)


def _attacks(report: Results) -> str:
    results = report.results()
    if not results:
        return ""
    paper = {name: _paper_row(report, name) for name in results}
    in_paper = any(row is not None for row in paper.values())
    # the mean accuracy of a single forward pass of a stochastic model
    one_pass = report.settings.get("stochastic", {}).get("single_pass_accuracy", {})
    targeted = any(result.target_success for result in results.values())
    rows = []
    for name, result in results.items():
        cells = _attack_cells(name, result)
        if one_pass:
            cells.append(_percent(one_pass.get(name)))
        if targeted:
            success = result.target_success
            cells.append(_with_interval(success["rate"], success["interval"]) if success.get("n") else "–")
        if in_paper:
            row = paper[name]
            cells += ["–", "–"] if row is None else [f"{row.adversarial:.2f}", f"{row.w_robust:.2f}"]
        rows.append(cells)
    headings = ["attack", "robust, A_adv", "W-Robust, A_w"] + ["one forward pass"] * bool(one_pass)
    headings += ["target reached"] * targeted
    caption = ""
    if in_paper:
        clean = next(row.clean for row in paper.values() if row is not None)
        headings += ["paper's A_adv", "paper's A_w"]
        caption = (
            f"For comparison, the paper's Table {_TABLES[report.dataset]} (clean {clean:.2f}): all test "
            "images as published, checkpoint selected on them. This report: images from "
            f"{report.settings.get('source', '?')}, checkpoint selected on {report.selected_on or '?'}."
        )
    return "<h2>Attacks</h2>" + _table(headings, rows, caption)


def _minimum_norm(report: Results) -> str:
    if not report.accuracy_by_eps:
        return ""
    rows = []
    for name, curve in report.accuracy_by_eps.items():
        values = np.asarray(curve["accuracy"])
        at = [int(np.argmin(np.abs(np.asarray(curve["eps"]) - f * report.eps))) for f in (0.5, 1, 2)]
        cells = [_with_interval(values[i], (curve["low"][i], curve["high"][i])) for i in at]
        median = "–" if curve["median"] is None else f"{curve['median']:.4g}"
        rows.append((escape(attack_label(name)), median, *cells, str(curve["not_found"])))
    text = eps_text(report.eps)
    return "<h2>Smallest perturbations</h2>" + _table(
        ("attack", "median size", "robust at ε/2", f"at ε = {text}", "at 2ε", "images without"), rows
    )


def _norms(report: Results, name: str) -> str:
    """Links to the reports of each norm, for a report over several that is stored as evaluation ``name``."""
    links = [f'<a href="../{escape(name)}-{norm}/report.html">{norm_text(norm)}</a>' for norm in report.norms]
    return f"<p>Attacks, sanity checks and settings of each norm: {', '.join(links)}.</p>" if links else ""


def _sanity(lines: Sequence[dict[str, str]]) -> str:
    if not lines:
        return ""
    rows = [
        (
            escape(line["check"]),
            f'<span class="{escape(line["result"])}">{escape(line["result"])}</span>',
            escape(line["evidence"]),
        )
        for line in lines
    ]
    return "<h2>Sanity checks</h2>" + _table(("check", "result", "evidence"), rows, text=(1, 2))


def _detection(report: Results) -> str:
    if not report.detection:
        return ""

    def area(values: dict[str, Any] | None) -> str:
        if values is None:
            return "–"
        low, high = values["interval_95"]
        return f"{values['auc']:.3f} [{low:.3f}, {high:.3f}]"

    rows = [
        (
            escape(attack_label(name)),
            area(values),
            area(values.get("successful"))
            + (f", n = {values['successful']['n']}" if "successful" in values else ""),
            area(values.get("rounded")),
        )
        for name, values in report.detection.items()
    ]
    return "<h2>What the router detects</h2>" + _table(
        ("clean images against", "AUC", "of broken images only", "rounded to the data's levels"),
        rows,
        "Area under the ROC curve of the type logits' difference; noise of size ε is the control.",
    )


def _parts(report: Results) -> str:
    if not report.parts:
        return ""
    heading = "<h2>The network in parts</h2>"
    if "not_applicable" in report.parts:
        return f"{heading}<p>{escape(parts_caption(report))}.</p>"
    rows = []
    for row in report.parts["rows"]:
        part, robust = escape(row["part"]), "–"
        if row["not_applicable"] is not None:
            part += f'<br><span class="soft">not applicable: {escape(row["not_applicable"])}</span>'
        else:
            robust = _with_interval(row["robust_accuracy"], row["interval_95"])
        rows.append((part, _percent(row["clean_accuracy"]), robust, _percent(row["changed"])))
    headings = ("part", "clean", "PGD", "changed")
    caption = parts_caption(report)
    return heading + _table(headings, rows, caption[0].upper() + caption[1:] + ".")


def _compared(report: Results) -> str:
    if not report.compared_with:
        return ""

    def cells(difference: float, interval: Sequence[float], p: float) -> list[str]:
        return [f"{100 * difference:+.1f}", interval_text(interval), escape(p_text(p))]

    rows = []
    for other, c in report.compared_with.items():
        clean = cells(c.clean_difference, c.clean_interval_95, c.clean_mcnemar_p)
        rows.append([escape(other), "clean", *clean])
        for name, attack in c.attacks.items():
            differences = cells(attack.difference, attack.interval_95, attack.mcnemar_p)
            rows.append(["", f"A_w, {escape(attack_label(name))}", *differences])
    return "<h2>Against other networks</h2>" + _table(
        (f"{report.model} minus", "", "points", "95 %", "p (McNemar)"), rows, "Paired by image.", text=(1,)
    )


def _figures(folder: Path, names: Sequence[str]) -> list[str]:
    return [_embedded(folder / name, FIGURES[name]) for name in names if (folder / name).is_file()]


def _embedded(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _settings(report: Results) -> str:
    plain = {
        "settings": report.settings,
        "norm": report.norm,
        "eps": report.eps,
        "attacks": {name: result.settings for name, result in report.attacks.items()},
        "selected_on": report.selected_on,
        "environment": report.environment,
    }
    return (
        "<details><summary>Settings and environment</summary><pre>"
        + escape(json.dumps(plain, indent=2, default=str))
        + "</pre></details>"
    )
