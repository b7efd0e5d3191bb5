"""What the families of networks share: a width factor, and the configuration that rebuilds a model."""

from __future__ import annotations

import math
from typing import Any


def scaled(channels: int, width: float) -> int:
    """``channels`` times the factor ``width``, rounded, at least 1; ValueError unless ``width`` > 0."""
    if isinstance(width, bool) or not isinstance(width, int | float):
        raise TypeError(f"width must be a number (1 is the full network), got {width!r}")
    if not (width > 0 and math.isfinite(width)):
        raise ValueError(f"width must be finite and above 0 (1 is the full network), got {width}")
    return max(1, round(channels * width))


def config(name: str, num_classes: int, in_channels: int, **options: Any) -> dict[str, Any]:
    """What :func:`~awnet.models.create_model` needs to build the same network again."""
    return {"name": name, "num_classes": num_classes, "in_channels": in_channels, "options": options}
