"""Sums and hashes of images."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from engine.data import sums
from engine.data.sums import sum_rows
from engine.host import ROOT
from tests.glyph_files import glyphs


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


def test_threads_that_begin_together_hash_alike() -> None:
    """As the readers of a source do: equal images of two blocks have equal hashes."""
    image_RP = np.arange(784, dtype=np.uint8)[None]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            sums._weights.cache_clear()
            together = threading.Barrier(4)

            def hashed(together: threading.Barrier = together) -> int:
                together.wait()
                return int(sum_rows(image_RP)[2][0])

            assert len({job.result() for job in [pool.submit(hashed) for _ in range(4)]}) == 1


def test_packing_images_does_not_wait_for_numba(tmp_path: Path) -> None:
    """IDX, Parquet and PNGs, in a process of its own."""
    images = glyphs(60)
    images.png(tmp_path / "tree")
    images.idx(tmp_path)
    parquet.write_table(images.table(), tmp_path / "in.parquet")
    code = """
import sys
from pathlib import Path
from engine.data.pack import pack
here = Path(sys.argv[1])
pack([here / "idx-images", here / "idx-labels"], here / "first")
pack(here / "in.parquet", here / "second")
pack(here / "tree", here / "third")
print("numba" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_a_block_without_images_has_no_sums() -> None:
    assert [len(part) for part in sum_rows(np.empty((0, 784), np.uint8))] == [0, 0, 0]


def test_a_hash_sees_every_pixel() -> None:
    image_RP = np.zeros((26, 25), np.uint8)
    image_RP[np.arange(25), np.arange(25)] = 1
    assert len(set(sum_rows(image_RP)[2].tolist())) == 26
