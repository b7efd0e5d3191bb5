"""The activations other than the ReLU, with their slopes, in float32.

``ACTIVATION`` is a position in ``awnet.ops.args.ACTIVATIONS``: 0 none, 1 ReLU, 2 SiLU, 3 GELU, 4 leaky ReLU.
It is a constant of each compiled kernel.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """act(z) and act'(z) for ``ACTIVATION`` above 1."""
    if ACTIVATION == 2:
        s = tl.sigmoid(z)
        y = z * s
        slope = s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == 3:
        distribution = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        y = z * distribution
        slope = distribution + z * (tl.exp(-0.5 * z * z) * 0.3989422804014327)
    else:
        slope = tl.where(z > 0, 1.0, 0.01)
        y = z * slope
    return y, slope
