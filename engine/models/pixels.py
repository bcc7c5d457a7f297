"""Pixels as a network reads them: uint8 to float, less a mean and over a standard deviation.

It does not measure: `Network.prepare` fills it, from training images. Both numbers are buffers, so
that they travel with the weights.

Shapes: B samples, N images, H x W pixels.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

SCALING = "(pixel - pixels.mean) / pixels.std, two tensors of the file"
"""Of a network whose `pixels` is such a layer."""
LEAST_STD = 1.0
"""Grey levels: images of one colour have no deviation to divide by."""
AT_ONCE = 1000
"""Images that are counted at once: 6 MB of 28 x 28 pixels as the integers that bincount wants."""


def with_channel(image_BHW: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """image_B1HW, a view, whose strides say NHWC or NCHW.

    The memory of one channel is the same either way, so that `contiguous` would change nothing; but
    convolutions go by the strides, and all layers after them by what those return.
    """
    if channels_last:
        return image_BHW.unsqueeze(-1).permute(0, 3, 1, 2)
    return image_BHW.unsqueeze(1)


class Pixels(nn.Module):
    """From uint8 [B, H, W] to float32 [B, 1, H, W]: (pixel - mean) / std, in grey levels.

    With the defaults a pixel becomes its share of 255.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: float = 0.0, std: float = 255.0) -> None:
        super().__init__()
        self.channels_last = False
        """Whether the result is NHWC; `Network.use_channels_last` sets it."""
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, image_BHW: torch.Tensor) -> torch.Tensor:
        """image_B1HW, float32."""
        image_B1HW = with_channel(image_BHW, self.channels_last)
        return (image_B1HW.to(torch.float32) - self.mean) / self.std

    def fill(self, image_NHW: Any) -> None:
        """Take the mean and standard deviation of all pixels of uint8 images.

        They are counted in whole numbers: the same images give the same bits on every machine.
        """
        count_V = np.zeros(256, np.int64)
        for start in range(0, len(image_NHW), AT_ONCE):
            part = np.asarray(image_NHW[start : start + AT_ONCE])
            count_V += np.bincount(part.ravel(), minlength=256)
        values = range(256)
        num, total, squares = (
            sum(int(count) * value**power for count, value in zip(count_V, values, strict=True))
            for power in (0, 1, 2)
        )
        if num:
            mean = total / num
            variance = (squares * num - total**2) / num**2
            self.mean.fill_(mean)
            self.std.fill_(max(variance**0.5, LEAST_STD))
