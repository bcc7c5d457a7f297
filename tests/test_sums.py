"""Sums and hashes of images."""

import numpy as np
import pytest

from engine.data.sums import sum_rows


@pytest.mark.parametrize("side", [1, 3, 8, 28, 300])
def test_sums_are_exact_and_hashes_equal_for_equal_images_alone(side: int) -> None:
    """300 x 300 white pixels: their squares need more than 32 bits."""
    image_RP = np.random.default_rng(side).integers(0, 256, (200, side * side), np.uint8)
    image_RP[3] = 255
    image_RP[190:] = image_RP[1]
    sum_R, squares_R, hash_R = sum_rows(image_RP)
    assert sum_R.tolist() == [int(row.sum(dtype=int)) for row in image_RP]
    assert squares_R.tolist() == [int((row.astype(int) ** 2).sum()) for row in image_RP]
    assert (sum_R.dtype, squares_R.dtype, hash_R.dtype) == (np.int64, np.int64, np.uint64)
    equal = (image_RP[:, None] == image_RP[None]).all(2)
    assert np.array_equal(hash_R[:, None] == hash_R[None], equal)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_images_that_differ_little_collide_no_more_than_others(place: int) -> None:
    """In single bits of two pixels: where bits of a product are lost, these collide first."""
    image_RP = np.zeros((16 * 8 * 8, 128), np.uint8)
    row = 0
    for word in range(16):
        for low in range(8):
            for high in range(8):
                image_RP[row, 8 * word + place] = 1 << low
                image_RP[row, (8 * word + 11) % 128] = 1 << high
                row += 1
    assert len(set(sum_rows(image_RP)[2].tolist())) == len(np.unique(image_RP, axis=0))


def test_a_block_without_images_has_no_sums() -> None:
    assert [len(part) for part in sum_rows(np.empty((0, 784), np.uint8))] == [0, 0, 0]


def test_a_hash_sees_every_pixel() -> None:
    image_RP = np.zeros((26, 25), np.uint8)
    image_RP[np.arange(25), np.arange(25)] = 1
    assert len(set(sum_rows(image_RP)[2].tolist())) == 26
