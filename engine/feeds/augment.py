"""Random affine distortion, defined once: a matrix for each sample, and the warp.

A matrix maps output to input in pixels, with a pixel's centre at its index + 0.5 (the convention of
DALI, and of torch with align_corners=False). It is a pure function of (seed, epoch, sample id), so
every feed and any number of ranks distort a sample alike. Images stay uint8, rounded to nearest.

On a CPU the warp is the one that is compiled for it (kernels/cpu.py), in every feed and whatever
kernels are named: it is the same function. On a GPU, and without numba, torch warps. Others warp by
these matrices to the same grey value, give or take one: DALI in the dali feed, and on a GPU the
kernel gather_warp in the resident feed, where it gathers anyway.

Shapes: B samples, N images, H x W pixels.
"""

import math
from collections.abc import Iterator

import torch
from torch.nn import functional

from engine.config import AugmentConfig
from engine.feeds.batch import Batch, Feed
from engine.order import MASK32, hash32, round_keys
from kernels import cpu


def matrices(
    config: AugmentConfig, id_B: torch.Tensor, seed: int, epoch: int, height_width: tuple[int, int]
) -> torch.Tensor:
    """matrix_B23 float32 on id_B's device, computed there in float64.

    There is no host synchronisation.
    """

    def draw(name: str) -> torch.Tensor:
        """Uniform in [-1, 1)."""
        low, high, *_ = round_keys(seed, epoch, "augment", name)
        hashed_B: torch.Tensor = hash32(hash32(id_B & MASK32, low) ^ (id_B >> 32 & MASK32), high)
        return hashed_B.double() / 2**31 - 1

    turn_B = math.radians(config.rotate_degrees) * draw("turn")
    shear_B = math.radians(config.shear_degrees) * draw("shear")
    zoom_B = 1 + config.scale_fraction * draw("zoom")
    right_B = config.shift_pixels * draw("right")
    down_B = config.shift_pixels * draw("down")
    slope_B = shear_B.tan()
    xx = turn_B.cos() / zoom_B
    yx = turn_B.sin() / zoom_B
    xy = xx * slope_B - yx
    yy = yx * slope_B + xx
    y, x = (size / 2 for size in height_width)  # the centre stays, but for the shift
    x_row = [xx, xy, x - right_B - xx * x - xy * y]
    y_row = [yx, yy, y - down_B - yx * x - yy * y]
    return torch.stack(x_row + y_row, 1).view(-1, 2, 3).float()


def warp(
    image_NHW: torch.Tensor,
    matrix_B23: torch.Tensor,
    out_BHW: torch.Tensor,
    row_B: torch.Tensor | None = None,
) -> None:
    """out[b] = image[row[b]], or image[b], through matrix[b]: bilinear, black outside; uint8."""
    if cpu.warps(image_NHW):
        row_B = torch.arange(len(out_BHW)) if row_B is None else row_B
        cpu.warp(image_NHW, row_B, matrix_B23, out_BHW)
        return
    image_BHW = image_NHW if row_B is None else image_NHW[row_B]
    out_BHW.copy_(warp_by_torch(image_BHW, matrix_B23))


def warp_by_torch(image_BHW: torch.Tensor, matrix_B23: torch.Tensor) -> torch.Tensor:
    """As `warp`, on any device, by torch's grid_sample; at most one grey value apart."""
    _, height, width = image_BHW.shape
    xx, xy, x, yx, yy, y = matrix_B23.view(-1, 6).unbind(1)
    # From pixels u to coordinates 2 u / size - 1, by Python numbers: a tensor would be uploaded.
    x = xx + (xy * height + 2 * x) / width - 1
    y = yy + (yx * width + 2 * y) / height - 1
    theta = torch.stack([xx, xy * (height / width), x, yx * (width / height), yy, y], 1)
    shape = [len(image_BHW), 1, height, width]
    grid_BHW2 = functional.affine_grid(theta.view(-1, 2, 3), shape, align_corners=False)
    image_B1HW = image_BHW[:, None].float()
    warped_B1HW = functional.grid_sample(image_B1HW, grid_BHW2, align_corners=False)
    return warped_B1HW[:, 0].round_().to(torch.uint8)


def make_ready(device: torch.device, height_width: tuple[int, int]) -> None:
    """Compile the warp for a CPU, or load it, before a clock runs."""
    if device.type == "cpu":
        image_BHW = torch.zeros(1, *height_width, dtype=torch.uint8)
        warp(image_BHW, torch.eye(2, 3)[None], image_BHW.clone())


class AugmentedFeed:
    """The batches of a feed that does not distort by itself, warped."""

    def __init__(self, feed: Feed, config: AugmentConfig) -> None:
        self.name = feed.name
        self.order = feed.order
        self._feed = feed
        self._config = config
        self._out: Batch | None = None

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for batch in self._feed.batches(epoch, first_step):
            if self._out is None:
                self._out = Batch(torch.empty_like(batch.image_BHW), batch.label_B, batch.id_B)
            _, height, width = batch.image_BHW.shape
            matrix_B23 = matrices(self._config, batch.id_B, self.order.seed, epoch, (height, width))
            warp(batch.image_BHW, matrix_B23, self._out.image_BHW)
            yield self._out

    def close(self) -> None:
        self._feed.close()
