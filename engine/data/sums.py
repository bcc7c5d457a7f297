"""Sums, squares and a hash of each image's pixels: what a Table keeps of rows beside their pixels.

The lexer makes them while it reads a CSV; for images that come as arrays they are made here.

Shapes: R images of a block, P pixels.
"""

import numpy as np

Sums = tuple[np.ndarray, np.ndarray, np.ndarray]
"""sum_R and squares_R int64, hash_R uint64, as in lexer.Rows."""


def sum_plainly(image_RP: np.ndarray) -> Sums:
    """As `sum_rows`; where numba cannot be imported."""
    wide_RP = image_RP.astype(np.int64)
    hashes = [hash(image_P.tobytes()) for image_P in image_RP]
    return wide_RP.sum(1), (wide_RP**2).sum(1), np.array(hashes, np.int64).view(np.uint64)


def sum_rows(image_RP: np.ndarray) -> Sums:
    """Each image's sum of pixels, of their squares, and a hash that is equal for equal pixels.

    Args:
        image_RP: uint8, C-contiguous.
    """
    try:
        from engine.data.sums_jit import sum_compiled
    except ImportError:
        return sum_plainly(image_RP)
    return sum_compiled(image_RP)
