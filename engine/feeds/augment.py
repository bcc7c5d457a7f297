"""Random affine distortion, defined once: a matrix for each sample, and the warp that torch does. DALI only warps, too.

A matrix maps output to input in pixels, with a pixel's centre at its index + 0.5 (the convention of DALI, and of torch
with align_corners=False). It is a pure function of (seed, epoch, sample id), so every feed and any number of ranks
distort a sample alike. Images stay uint8, rounded to nearest.

Shapes: B samples, H x W pixels.
"""

import math
from collections.abc import Iterator

import torch
from torch.nn import functional

from engine.config import AugmentConfig
from engine.feeds.batch import Batch, Feed
from engine.order import MASK32, hash32, round_keys


def matrices(
    config: AugmentConfig, id_B: torch.Tensor, seed: int, epoch: int, height_width: tuple[int, int]
) -> torch.Tensor:
    """matrix_B23 float32 on id_B's device; computed there in float64, without a host synchronisation."""

    def draw(name: str) -> torch.Tensor:
        """Uniform in [-1, 1)."""
        low, high, *_ = round_keys(seed, epoch, "augment", name)
        hashed_B: torch.Tensor = hash32(hash32(id_B & MASK32, low) ^ (id_B >> 32 & MASK32), high)
        return hashed_B.double() / 2**31 - 1

    turn, shear = (
        math.radians(config.rotate_degrees) * draw("turn"),
        math.radians(config.shear_degrees) * draw("shear"),
    )
    zoom = 1 + config.scale_fraction * draw("zoom")
    cos, sin, slope = turn.cos() / zoom, turn.sin() / zoom, shear.tan()
    y, x = (
        height_width[0] / 2,
        height_width[1] / 2,
    )  # the centre stays where it is, but for the shift
    xx, xy, yx, yy = cos, cos * slope - sin, sin, sin * slope + cos
    right, down = config.shift_pixels * draw("right"), config.shift_pixels * draw("down")
    rows = [xx, xy, x - right - xx * x - xy * y, yx, yy, y - down - yx * x - yy * y]
    return torch.stack(rows, 1).view(-1, 2, 3).float()


def warp(image_BHW: torch.Tensor, matrix_B23: torch.Tensor) -> torch.Tensor:
    """uint8 images through their matrices: bilinear, black outside."""
    _, height, width = image_BHW.shape
    xx, xy, x, yx, yy, y = matrix_B23.view(-1, 6).unbind(1)
    # From pixels u to coordinates 2 u / size - 1; by Python numbers, since a tensor of them would be uploaded.
    x, y = xx + (xy * height + 2 * x) / width - 1, yy + (yx * width + 2 * y) / height - 1
    theta_B23 = torch.stack([xx, xy * (height / width), x, yx * (width / height), yy, y], 1).view(
        -1, 2, 3
    )
    grid_BHW2 = functional.affine_grid(
        theta_B23, [len(image_BHW), 1, height, width], align_corners=False
    )
    warped_BHW = functional.grid_sample(image_BHW[:, None].float(), grid_BHW2, align_corners=False)[
        :, 0
    ]
    return warped_BHW.round_().to(torch.uint8)


def fused_warp(image_BHW: torch.Tensor, matrix_B23: torch.Tensor) -> torch.Tensor:
    """As `warp`, by the kernel that gathers: to the same grey value, give or take one."""
    from kernels.gather_warp import gather_warp

    row_1B = torch.arange(len(image_BHW), device=image_BHW.device)[None]
    label_B, step_1 = row_1B[0].to(torch.uint8), row_1B.new_zeros(1)
    out = Batch(torch.empty_like(image_BHW), label_B.clone(), row_1B[0].clone())
    gather_warp(
        image_BHW, label_B, row_1B, step_1, matrix_B23, out.image_BHW, out.label_B, out.id_B
    )
    return out.image_BHW


class AugmentedFeed:
    """Another feed's batches, warped where they lie."""

    def __init__(
        self, feed: Feed, config: AugmentConfig, fused: frozenset[str] = frozenset()
    ) -> None:
        """`fused`: names of kernels; with gather_warp, it warps."""
        self.name, self.order = feed.name, feed.order
        self._feed, self._config = feed, config
        self._warp = fused_warp if "gather_warp" in fused else warp
        self._out: Batch | None = None

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for batch in self._feed.batches(epoch, first_step):
            if self._out is None:
                self._out = Batch(torch.empty_like(batch.image_BHW), batch.label_B, batch.id_B)
            _, height, width = batch.image_BHW.shape
            matrix_B23 = matrices(self._config, batch.id_B, self.order.seed, epoch, (height, width))
            self._out.image_BHW.copy_(self._warp(batch.image_BHW, matrix_B23))
            yield self._out

    def close(self) -> None:
        self._feed.close()
