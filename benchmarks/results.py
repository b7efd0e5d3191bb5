"""The CSV files of measurements: rows are only ever added, and the newest row of a key counts."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from awnet.files import write_text
from awnet.text import csv_cell

FOLDER = Path("benchmarks/results")
COLUMNS = [
    *("date", "commit", "device", "driver", "torch", "triton"),
    *("case", "mode", "provider", "batch", "channels", "size", "dtype", "layout"),
    *("ms_median", "ms_p20", "ms_p80", "peak_mib", "gb_s", "tflop_s", "roofline_share"),
    *("verified", "command"),
]

Row = dict[str, str]


def read_rows(path: Path, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """All rows of one file, oldest first; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(columns):
            raise ValueError(
                f"{path} has other columns than this version writes; move it away, or name another folder "
                "with --out"
            )
        return list(reader)


def add_rows(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Adds rows to a file; it is replaced as a whole, so that an interruption leaves no half row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: csv_cell(value) for name, value in row.items()} for row in [*read_rows(path, columns), *rows]
    )
    write_text(path, text.getvalue())


def threads(row: Row) -> int:
    """CPU threads of a row, which its command says; 0 where it does not."""
    found = re.search(r"--threads (\d+)", row["command"])
    return int(found.group(1)) if found else 0


def key(row: Row) -> tuple[str | int, ...]:
    """What was measured, and where: a later row of the same key replaces an earlier one for readers."""
    names = ("device", "case", "mode", "provider", "batch", "channels", "size", "dtype", "layout")
    # on a GPU the number of CPU threads decides nothing
    return (*(row[name] for name in names), 0 if row["driver"] else threads(row))


def newest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each key: by date, and on one day the later in the file."""
    found = {key(row): row for row in sorted(rows, key=lambda row: row["date"])}
    return list(found.values())


def read_results(folder: Path = FOLDER) -> list[Row]:
    """The newest rows of all devices in ``folder``; smoke runs and training runs are not among them."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: `awnet bench run` makes it, or name another")
    rows: list[Row] = []
    for path in sorted(folder.glob("*.csv")):
        if not path.stem.endswith(("-smoke", "-train")):
            rows += read_rows(path)
    return newest(rows)


def read_training(folder: Path = FOLDER) -> list[Row]:
    """The rows that `awnet bench train` wrote, oldest first; their columns are its own."""
    rows: list[Row] = []
    for path in sorted(folder.glob("*-train.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return sorted(rows, key=lambda row: row.get("date", ""))
