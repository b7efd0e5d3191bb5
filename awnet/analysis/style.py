"""The common style of all figures: colors, fonts and the canvas that writes the PNG file.

The colors are those of Okabe and Ito, which are distinct with any color vision: blue is clean, vermilion is
adversarial, gray is a control.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from awnet.files import written_atomically

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


@contextmanager
def figure_file(path: str | Path, width: float, height: float) -> Iterator[Any]:
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
