"""The handwritten digits of scikit-learn: 1,797 images of 8×8 pixels with 17 gray levels."""

from __future__ import annotations

import numpy as np

from awnet import rng
from awnet.data.dataset import Splits, from_arrays, stratified

TEST, VALIDATION = 400, 200


def load_digits(seed: int = 0) -> Splits:
    """Loads 1,197 training, 200 validation and 400 test images, stratified by class.

    The test images are the same for every seed, so that no model is tested on training images; the seed
    chooses the validation images among the others.
    """
    from sklearn.datasets import load_digits as load

    digits = load()
    dataset = from_arrays(
        digits.images[:, None].astype(np.uint8),
        digits.target,
        name="digits",
        max_value=16,
        eps=0.15,
        shift=1,
        source="scikit-learn's load_digits (UCI optical recognition of handwritten digits, test part)",
    )
    test, rest = stratified(dataset.labels, dataset.index, TEST, rng.key("digits", "test"))
    others = dataset.take(rest)
    held_out, train = stratified(others.labels, others.index, VALIDATION, rng.key(seed, "validation"))
    return Splits(others.take(train), others.take(held_out, "validation"), dataset.take(test, "test"))
