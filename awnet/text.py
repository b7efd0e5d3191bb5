"""Text from outside (names of folders, classes, models) for terminals, CSV files and figures."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, direction marks, halves of surrogate pairs …
_FORMULA = "=+-@\uff1d\uff0b\uff0d\uff20"  # what a spreadsheet takes for the beginning of a formula


def visible(text: str) -> str:
    """``text`` on one line, with each character that is not printed as an escape such as ``\\x1b``.

    Among these are terminals' control sequences, line breaks and marks that reverse the direction of writing.
    """
    if text.isprintable():
        return text
    return "".join(
        one if unicodedata.category(one) not in _HIDDEN else one.encode("unicode_escape").decode("ascii")
        for one in text
    )


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """``rows`` as CSV that no spreadsheet runs: a text that looks like a formula begins with an apostrophe.

    Numbers stay as they are, None is an empty cell, floats have eight significant digits.
    """
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([csv_cell(value) for value in row] for row in rows)
    return file.getvalue()


def csv_cell(value: Any) -> str:
    """One cell of :func:`csv_text`."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.8g}"
    text = visible(str(value))
    return f"'{text}" if text.lstrip()[:1] in _FORMULA and text.strip() and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def figure_text(text: str) -> str:
    """``text`` for matplotlib: without mathematics, and not hidden from legends as labels with ``_`` are."""
    text = visible(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
