"""The CSV files of measurements. Rows are appended, and readers use the newest row of a key."""

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
    *("ms_median", "ms_p20", "ms_p80", "ms_best", "peak_mib", "gb_s", "tflop_s", "roofline_share"),
    *("switches", "steal", "disturbed", "verified", "command", "timing", "ms_eager", "reason"),
]
TRAIN_COLUMNS = [
    *("date", "commit", "device", "driver", "torch", "triton"),
    *("recipe", "model", "teachers", "data", "provider", "batch", "size", "attack_steps", "precision"),
    *("layout", "threads", "steps", "images_per_second", "images_per_second_best", "epoch_seconds_50000"),
    *("gflop_per_image", "matmul_tflop_s", "amx_tflop_s", "mfu", "peak_mib", "share_attack"),
    *("share_training", "share_teachers", "share_data", "switches", "steal", "disturbed", "verified"),
    *("command", "backend", "captured"),
]
AMX_COLUMNS = [
    *("date", "commit", "device", "driver", "torch", "triton"),
    *("case", "provider", "batch", "threads", "unit"),
    *("rate_best", "rate_median", "amx_tflop_s", "share_of_peak", "switches", "steal", "disturbed"),
]
# columns that files of earlier versions lack
ADDED = (
    *("ms_best", "images_per_second_best", "amx_tflop_s", "switches", "steal", "disturbed"),
    *("timing", "ms_eager", "reason", "backend", "captured"),
)
# values of missing columns; all others are empty
_BEFORE = {"timing": "eager"}

Row = dict[str, str]


def read_rows(path: Path, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """All rows of one file, oldest first; none if there is no file.

    Columns in ``ADDED`` may be missing. ``timing`` is ``graph`` where the times are those of a step in the
    replay of a CUDA graph, and ``eager``, also in older files, where they are those of single calls.

    Raises:
        ValueError: the file is not a CSV file of these columns.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names = set(reader.fieldnames or ())
            if not set(columns) - set(ADDED) <= names <= set(columns):
                raise ValueError(
                    f"{path} has other columns than this version writes; move it away, or name another "
                    "folder with --out"
                )
            before = {name: _BEFORE.get(name, "") for name in columns}
            rows = [{name: row.get(name) or before[name] for name in columns} for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from None
    return rows


def add_rows(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Appends rows to a file, which is replaced as a whole: an interruption leaves no partial row."""
    _write(path, [*read_rows(path, columns), *rows], columns)


def replace_rows(path: Path, old: Sequence[Row], new: Sequence[Row]) -> None:
    """Puts ``new`` at the end of a file, in place of the rows ``old`` that an earlier call wrote."""
    rows = read_rows(path)
    for row in map(_cells, old):
        if row in rows:
            rows.reverse()
            rows.remove(row)  # its last occurrence
            rows.reverse()
    _write(path, [*rows, *new], COLUMNS)


def _cells(row: Row) -> Row:
    return {name: csv_cell(value) for name, value in row.items()}


def _write(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_cells, rows))
    write_text(path, text.getvalue())


def threads(row: Row) -> int:
    """CPU threads of a row, from its command; 0 if it does not state them."""
    match = re.search(r"--threads (\d+)", row["command"])
    return int(match.group(1)) if match else 0


def key(row: Row) -> tuple[str | int, ...]:
    """The subject and the place of a measurement: a later row with the same key replaces an earlier one."""
    names = ("device", "case", "mode", "provider", "batch", "channels", "size", "dtype", "layout")
    # on a GPU the number of CPU threads does not matter
    return (*(row[name] for name in names), 0 if row["driver"] else threads(row))


def newest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each key: by date, and on one day the later in the file."""
    by_key = {key(row): row for row in sorted(rows, key=lambda row: row["date"])}
    return list(by_key.values())


def read_results(folder: Path = FOLDER) -> list[Row]:
    """The newest rows of all devices in ``folder``, without smoke, training and AMX runs."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: `awnet bench run` makes it, or name another")
    rows: list[Row] = []
    for path in sorted(folder.glob("*.csv")):
        if not path.stem.endswith(("-smoke", "-train", "-amx")):
            rows += read_rows(path)
    return newest(rows)


def read_training(folder: Path = FOLDER) -> list[Row]:
    """The rows of `awnet bench train`, oldest first."""
    return _of_kind(folder, "train", TRAIN_COLUMNS)


def read_amx(folder: Path = FOLDER) -> list[Row]:
    """The rows of `python -m awnet.benchmarks.amx`, oldest first."""
    return _of_kind(folder, "amx", AMX_COLUMNS)


def _of_kind(folder: Path, kind: str, columns: Sequence[str]) -> list[Row]:
    rows = [row for path in sorted(folder.glob(f"*-{kind}.csv")) for row in read_rows(path, columns)]
    return sorted(rows, key=lambda row: row["date"])
