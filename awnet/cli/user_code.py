"""``--import``: the user's Python code on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg


@dataclass(kw_only=True)
class ImportOption:
    user_module: Annotated[str | None, arg(name="import", metavar="CODE", help_behavior_hint="")] = None
    """Python file or module to import first: its code may register models (awnet.models.register_model)."""

    def import_user_module(self) -> None:
        """Imports what ``--import`` names, if anything."""
        if self.user_module is not None:
            from awnet.models.user_code import import_code

            import_code(self.user_module)
