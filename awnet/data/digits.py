"""Handwritten digits that ship inside scikit-learn: 1,797 images of 8×8 pixels with 17 grey levels."""

from __future__ import annotations

import numpy as np

from awnet import rng
from awnet.data.dataset import Splits, from_arrays, stratified

TEST, VALIDATION = 400, 200


def load_digits(seed: int = 0) -> Splits:
    """1,197 / 200 / 400 images, stratified. The test images are the same for every seed, so that a model
    trained with one seed is never tested on its training images by another; the seed draws the validation
    images from the rest."""
    from sklearn.datasets import load_digits as load

    digits = load()
    everything = from_arrays(
        digits.images[:, None].astype(np.uint8),
        digits.target,
        name="digits",
        max_value=16,
        eps=0.15,
        shift=1,
        source="scikit-learn's load_digits (UCI optical recognition of handwritten digits, test part)",
    )
    test, rest = stratified(everything.labels, everything.index, TEST, rng.key("digits", "test"))
    kept = everything.take(rest)
    held, train = stratified(kept.labels, kept.index, VALIDATION, rng.key(seed, "validation"))
    return Splits(kept.take(train), kept.take(held, "validation"), everything.take(test, "test"))
