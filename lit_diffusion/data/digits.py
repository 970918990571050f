"""Scikit-learn's handwritten digits, real data without a download."""

from __future__ import annotations

import numpy as np

from lit_diffusion.data.in_memory import InMemory


class Digits(InMemory):
    """Scikit-learn's 1,797 handwritten digits: uint8 ``[1, 8, 8]``, values 0 .. 16, ten classes.

    They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998): each value counts
    the ink in a 4 x 4 block of a 32 x 32 bitmap, so there are 17 grey levels, white ink on black paper.
    """

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        super().__init__(
            digits.images.astype(np.uint8)[:, None],
            digits.target,
            name="digits",
            num_grey_levels=17,
            num_classes=10,
        )
