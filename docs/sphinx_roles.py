"""Shows Sphinx roles of the docstrings, such as :func:`name`, as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([\w.]+)`")


def _plain(found: re.Match[str]) -> str:
    short = found[2].rpartition(".")[2] if found[1] else found[2]
    return f"`{short}`"


class SphinxRoles(griffe.Extension):
    """Replaces the roles before the docstrings are parsed."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(_plain, obj.docstring.value)
