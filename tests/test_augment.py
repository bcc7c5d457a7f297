"""The matrices do what they are named for; either warp is bilinear, exact for whole pixels."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.config import AugmentConfig
from engine.feeds.augment import matrices, warp, warp_by_torch

ID_B = torch.arange(20_000)


def warp_here(image_BHW: torch.Tensor, matrix_B23: torch.Tensor) -> torch.Tensor:
    """By what is compiled for a CPU."""
    out_BHW = torch.full_like(image_BHW, 77)
    warp(image_BHW, matrix_B23, out_BHW)
    return out_BHW


WARPS = pytest.mark.parametrize("warped", [warp_here, warp_by_torch])
Warp = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def drawn(size: tuple[int, int] = (28, 28), **amounts: float) -> np.ndarray:
    return matrices(AugmentConfig(**amounts), ID_B, 1, 0, size).numpy().astype(np.float64)


@WARPS
def test_nothing_asked_is_the_identity_to_the_bit(warped: Warp) -> None:
    matrix_B23 = torch.from_numpy(drawn()).float()
    assert torch.equal(matrix_B23, torch.eye(2, 3).expand(len(ID_B), 2, 3))
    image_BHW = torch.randint(256, (50, 28, 28), dtype=torch.uint8)
    assert torch.equal(warped(image_BHW, matrix_B23[:50]), image_BHW)


@WARPS
def test_a_shift_moves_whole_pixels_and_black_comes_in(warped: Warp) -> None:
    image_BHW = torch.randint(1, 256, (1, 20, 28), dtype=torch.uint8)
    matrix_B23 = torch.tensor(
        [[[1.0, 0, -3], [0, 1, 2]]]
    )  # output (x, y) shows input (x - 3, y + 2)
    warped_HW = warped(image_BHW, matrix_B23)[0]
    assert torch.equal(warped_HW[:-2, 3:], image_BHW[0, 2:, :-3])
    assert not warped_HW[-2:].any() and not warped_HW[:, :3].any()


@WARPS
def test_a_quarter_turn_is_exact(warped: Warp) -> None:
    image_BHW = torch.randint(256, (1, 28, 28), dtype=torch.uint8)
    matrix_B23 = torch.tensor([[[0.0, -1, 28], [1, 0, 0]]])
    assert torch.equal(warped(image_BHW, matrix_B23)[0], torch.rot90(image_BHW[0]))


@pytest.mark.parametrize("size", [(28, 28), (20, 32)])
def test_every_amount_stays_in_its_bounds_and_fills_them_evenly(size: tuple[int, int]) -> None:
    centre = np.array([size[1] / 2, size[0] / 2])
    shift = drawn(size, shift_pixels=3.0)
    assert np.allclose(shift[:, :, :2], np.eye(2)) and 2.99 < np.abs(shift[:, :, 2]).max() <= 3
    assert np.allclose(np.histogram(shift[:, 0, 2], 6, (-3, 3))[0] / len(ID_B), 1 / 6, atol=0.015)
    assert abs(np.corrcoef(shift[:, 0, 2], shift[:, 1, 2])[0, 1]) < 0.03
    turn = drawn(size, rotate_degrees=20.0)
    angle = np.degrees(np.arctan2(turn[:, 1, 0], turn[:, 0, 0]))
    assert 19.9 < np.abs(angle).max() <= 20.001 and abs(angle.mean()) < 0.3
    assert np.allclose(np.linalg.det(turn[:, :, :2]), 1, atol=1e-6)
    zoom = np.linalg.det(drawn(size, scale_fraction=0.2)[:, :, :2]) ** -0.5
    assert 0.8 <= zoom.min() < 0.801 and 1.199 < zoom.max() <= 1.2001
    shear = drawn(size, shear_degrees=10.0)
    assert 9.95 < np.degrees(np.abs(np.arctan(shear[:, 0, 1]))).max() <= 10.001 and np.allclose(
        shear[:, 1], [0, 1, 0], atol=1e-5
    )
    for matrix_B23 in (turn, shear):  # all about the centre
        assert np.allclose(matrix_B23[:, :, :2] @ centre + matrix_B23[:, :, 2], centre, atol=1e-4)


def test_a_matrix_depends_on_seed_epoch_and_id_alone() -> None:
    config = AugmentConfig(shift_pixels=1, rotate_degrees=5)
    whole = matrices(config, ID_B, 1, 0, (28, 28))
    assert torch.equal(matrices(config, ID_B[7:9], 1, 0, (28, 28)), whole[7:9])
    assert torch.equal(matrices(config, ID_B.flip(0), 1, 0, (28, 28)), whole.flip(0))
    for other in (matrices(config, ID_B, 2, 0, (28, 28)), matrices(config, ID_B, 1, 1, (28, 28)),
                  matrices(config, ID_B + 2**33, 1, 0, (28, 28))):  # fmt: skip
        assert not (other == whole).all((1, 2)).any()
