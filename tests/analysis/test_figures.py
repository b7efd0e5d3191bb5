"""What the figures of an evaluation say, as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes

from awnet.analysis import waterfall


def test_the_bars_of_the_waterfall_are_labeled_in_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, text = [], Axes.text

    def record(axes: Axes, x: float, y: float, label: str, **options: object) -> object:
        labels.append(label)
        return text(axes, x, y, label, **options)

    monkeypatch.setattr(Axes, "text", record)
    waterfall(40, 2, {"FGSM": 10, "CW": 0, "AA": 1}, tmp_path / "waterfall.png")
    assert labels == ["95.0", "−25.0", "0", "−2.5", "67.5"]
    labels.clear()
    waterfall(24, 0, {"L-infinity": 4, "L2": 9, "L1": 11}, tmp_path / "waterfall.png")
    assert labels == ["100.0", "−16.7", "−37.5", "−45.8", "0.0"]  # and not -0.0, by rounding
