"""The layer's functions: one convolution shared by the batch, one affine map per sample and channel.

``docs/equations.md`` derives them, ``awnet/reference.py`` states what they must equal.
"""

from awnet.ops.backends import Explanation, available_backends, use_backend
from awnet.ops.functional import aw_conv2d, explain, filter_scaled_conv2d, mix_batch_norm

__all__ = [
    "Explanation",
    "available_backends",
    "aw_conv2d",
    "explain",
    "filter_scaled_conv2d",
    "mix_batch_norm",
    "use_backend",
]
