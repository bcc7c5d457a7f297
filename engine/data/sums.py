"""Sums, squares and a hash of each image's pixels: what a Table keeps of rows beside their pixels.

The compiled lexer makes them while it reads a CSV; for images that come as arrays they are made
here, by NumPy: importing numba would take longer than summing 300,000 images.

Shapes: R images of a block, P pixels, W words of four pixels.
"""

import secrets
from functools import cache

import numpy as np

Sums = tuple[np.ndarray, np.ndarray, np.ndarray]
"""sum_R and squares_R int64, hash_R uint64, as in lexer.Rows."""
CHUNK_BYTES = 2**17
"""Pixels that are hashed at once: they stay in the cache, eight bytes to a word."""
SEED = secrets.randbits(128)
"""Of this process's hashes, so that nobody writes images that collide; no output depends on it."""


def sum_rows(image_RP: np.ndarray) -> Sums:
    """Each image's sum of pixels, of their squares, and a hash that is equal for equal pixels.

    Args:
        image_RP: uint8, C-contiguous, at most records.MAX_PIXELS wide.
    """
    wide = np.int32 if image_RP.shape[1] * 255**2 < 2**31 else np.int64
    sum_R = image_RP.sum(1, dtype=np.uint32)
    squares_R = np.einsum("rp,rp->r", image_RP, image_RP, dtype=wide, casting="unsafe")
    return sum_R.astype(np.int64), squares_R.astype(np.int64), _hash_rows(image_RP)


@cache
def _weights(num_words: int) -> np.ndarray:
    """Random weights (W, 2); drawn from SEED, since threads may ask for them at the same time."""
    largest = np.iinfo(np.uint64).max
    return np.random.default_rng(SEED).integers(
        largest, size=(num_words, 2), dtype=np.uint64, endpoint=True
    )


def _hash_rows(image_RP: np.ndarray) -> np.ndarray:
    """Two multilinear hashes of 32 bits, beside each other: different images collide by 2^-64.

    Source: Lemire and Kaser 2014, "Strongly universal string hashing is fast", section 3.
    """
    num, num_pixels = image_RP.shape
    weight_W2 = _weights(-(-num_pixels // 4))
    hash_R2 = np.empty((num, 2), np.uint64)
    step = max(CHUNK_BYTES // num_pixels, 1)
    for start in range(0, num, step):
        part_RP = image_RP[start : start + step]
        if num_pixels % 4:
            part_RP = np.pad(part_RP, ((0, 0), (0, -num_pixels % 4)))
        word_RW = part_RP.view(np.uint32).astype(np.uint64)
        hash_R2[start : start + step] = word_RW @ weight_W2
    high_R2 = hash_R2 >> np.uint64(32)
    hash_R: np.ndarray = high_R2[:, 0] << np.uint64(32) | high_R2[:, 1]
    return hash_R
