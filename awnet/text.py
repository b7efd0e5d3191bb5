"""Makes external text (names of folders, classes, models) safe for terminals, CSV files and figures."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, direction marks, halves of surrogate pairs …
_FORMULA = "=+-@\uff1d\uff0b\uff0d\uff20"  # first characters of a formula in spreadsheets


def visible(text: str) -> str:
    """``text`` on one line, with every non-printable character as an escape such as ``\\x1b``.

    These include control sequences of terminals, line breaks and marks that reverse the writing direction.
    """
    if text.isprintable():
        return text
    return "".join(
        one if unicodedata.category(one) not in _HIDDEN else one.encode("unicode_escape").decode("ascii")
        for one in text
    )


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """``rows`` as CSV without formulas: a text that looks like a formula is prefixed with an apostrophe.

    Numbers are not changed, None is an empty cell, floats have eight significant digits.
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
    """``text`` for matplotlib: ``$`` is escaped, and a leading ``_``, which hides labels, gets a space."""
    text = visible(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
