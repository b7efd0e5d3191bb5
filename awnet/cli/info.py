"""``awnet info``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(kw_only=True)
class Info:
    """Print versions, devices, backends, models, data sets, attacks and recipes."""

    prints_its_result: ClassVar[bool] = True

    json: bool = False
    """Print JSON, for programs."""

    self_check: bool = False
    """Check the kernels on this machine's devices again, and ignore stored results."""

    def run(self, console: Console) -> None:
        from awnet.info import collect, render

        facts = collect(renew_self_check=self.self_check)
        if self.json:
            print(json.dumps(facts, indent=2))
        else:
            console.print(render(facts))
