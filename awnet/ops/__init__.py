"""The layer's functions: one convolution shared by the batch, one affine map per sample and channel.

``docs/equations.md`` derives them, ``awnet/reference.py`` states what they must equal.
"""

from awnet.ops.backends.amx import PackedWeights
from awnet.ops.dispatch import Explanation, available_backends, chosen_backend, use_backend
from awnet.ops.folding import fold_norms
from awnet.ops.functional import (
    AffineConvolution,
    NetworkLayer,
    affine_conv2d,
    aw_conv2d,
    explain,
    filter_scaled_conv2d,
    global_average,
    mix_batch_norm,
)
from awnet.ops.network import affine_network, folded_network, folds_norms, network_coefficients
from awnet.ops.sign_step import sign_step

__all__ = [
    "AffineConvolution",
    "Explanation",
    "NetworkLayer",
    "PackedWeights",
    "affine_conv2d",
    "affine_network",
    "available_backends",
    "aw_conv2d",
    "chosen_backend",
    "explain",
    "filter_scaled_conv2d",
    "fold_norms",
    "folded_network",
    "folds_norms",
    "global_average",
    "mix_batch_norm",
    "network_coefficients",
    "sign_step",
    "use_backend",
]
