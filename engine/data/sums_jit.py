"""sums.sum_plainly, compiled by numba.

Shapes: R images of a block, P pixels.
"""

import numpy as np

from engine.data.compiled import SEED, U, jit, load8, mix


@jit
def _sum(image_RP, seed, sum_R, squares_R, hash_R):  # type: ignore[no-untyped-def]
    num_pixels = image_RP.shape[1]
    whole = num_pixels - num_pixels % 8
    for row in range(len(image_RP)):
        image_P = image_RP[row]
        total = np.int64(0)
        squares = np.int64(0)
        for p in range(num_pixels):
            value = np.int64(image_P[p])
            total += value
            squares += value * value
        code = seed
        for p in range(0, whole, 8):
            code = mix(code, load8(image_P, p))
        for p in range(whole, num_pixels):
            code = mix(code, U(image_P[p]))
        sum_R[row] = total
        squares_R[row] = squares
        hash_R[row] = code


def sum_compiled(image_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As sums.sum_rows."""
    num = len(image_RP)
    sum_R = np.empty(num, np.int64)
    squares_R = np.empty(num, np.int64)
    hash_R = np.empty(num, U)
    _sum(image_RP, SEED, sum_R, squares_R, hash_R)
    return sum_R, squares_R, hash_R
