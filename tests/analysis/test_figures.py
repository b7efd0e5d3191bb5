"""The text in the figures of an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes

from awnet.analysis import WeightGap, waterfall, weight_gap_curves


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


def test_weight_gaps_without_an_adversarial_weight_are_an_error(tmp_path: Path) -> None:
    for gaps in ([], [WeightGap(0.1, 0.0, 0.0, 0.0, 0.0, 0.0)]):
        with pytest.raises(ValueError, match="gaps has no α above 0"):
            weight_gap_curves(gaps, tmp_path / "gap.png", title="one step")
    weight_gap_curves([WeightGap(0.1, 0.5, 1.0, 1.1, 0.2, 0.9)], tmp_path / "gap.png", title="one step")
    assert (tmp_path / "gap.png").is_file()
