"""A stand-in for the capture of CUDA graphs on a machine without a GPU."""

from __future__ import annotations

from typing import Any


class Recorder:
    """Records by running the program, as a capture's warm-up does; a replay runs it again."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, program: Any) -> Any:
        self.recorded += 1
        output = program()

        def replay() -> None:
            self.replayed += 1
            output.copy_(program())

        return output, replay
