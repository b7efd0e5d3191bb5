"""A small evaluation that a test can kill, and the comparison of two evaluations' files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from awnet.evaluation import Report, evaluate

from .broken_defenses import Gated, images

OPTIONS = {
    "attacks": ["fgsm", "square", "union"],
    "budget": "smoke",
    "queries": 50,
    "batch_size": 4,
    "sanity": False,
    "seed": 3,
}


def evaluate_gated(out: str | Path) -> None:
    evaluate(Gated(), images(8), out=out, **OPTIONS)  # type: ignore[arg-type]


def assert_same_evaluation(first: Path, second: Path) -> None:
    """Reports and arrays of two run folders; there is nothing in a report that tells the time."""
    folders = [place / "evaluations" / "default" for place in (first, second)]
    found = [json.loads((folder / "report.json").read_text()) for folder in folders]
    assert found[0] == found[1]
    arrays = [Report.load(folder).per_sample for folder in folders]
    assert arrays[0].keys() == arrays[1].keys()
    for name, values in arrays[0].items():
        assert np.array_equal(values, arrays[1][name]), name
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
