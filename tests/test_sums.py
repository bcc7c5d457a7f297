"""Sums and hashes of images, compiled and plain."""

import numpy as np
import pytest

from engine.data.sums import sum_plainly, sum_rows
from engine.data.sums_jit import sum_compiled


@pytest.mark.parametrize("side", [1, 3, 8, 300])
def test_compiled_and_plain_sums_agree(side: int) -> None:
    image_RP = np.random.default_rng(side).integers(0, 256, (9, side * side), np.uint8)
    image_RP[3] = 255
    image_RP[7:] = image_RP[1]
    for sums in (sum_plainly, sum_rows, sum_compiled):
        sum_R, squares_R, hash_R = sums(image_RP)
        assert sum_R.tolist() == [int(row.sum(dtype=int)) for row in image_RP]
        assert squares_R.tolist() == [int((row.astype(int) ** 2).sum()) for row in image_RP]
        assert (sum_R.dtype, squares_R.dtype, hash_R.dtype) == (np.int64, np.int64, np.uint64)
        equal = (image_RP[:, None] == image_RP[None]).all(2)
        assert np.array_equal(hash_R[:, None] == hash_R[None], equal)


def test_a_hash_sees_every_pixel() -> None:
    image_RP = np.zeros((26, 25), np.uint8)
    image_RP[np.arange(25), np.arange(25)] = 1
    assert len(set(sum_rows(image_RP)[2].tolist())) == 26
