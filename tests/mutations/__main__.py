"""``PYTHONPATH=tests python -m mutations [part of a name or file]``: runs faults, writes docs/mutations.md."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from .faults import FAULTS
from .runner import LANES, PAGE, Outcome, outcomes, page


def main(part: str) -> int:
    chosen = [fault for fault in FAULTS if part in f"{fault.file}: {fault.name}"]

    def drive(lane: str) -> list[Outcome]:
        found = []
        for one in outcomes(lane, chosen):
            how = one.caught_by or f"NOT CAUGHT: {one.why}"
            print(f"{one.fault.file}: {one.fault.name}: {how}", flush=True)
            found.append(one)
        return found

    with ThreadPoolExecutor(len(LANES)) as pool:
        found = [one for lane in pool.map(drive, LANES) for one in lane]
    PAGE.write_text(page(found), encoding="utf-8")
    missed = sum(one.caught_by is None for one in found)
    print(f"{len(found) - missed} of {len(found)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(" ".join(sys.argv[1:])))
