"""A residual network that is cheap on a CPU: 0.84 M parameters, 47 MFLOP forward at 28 x 28.

Every stage is convolution, max-pool, BatchNorm, ReLU in this order, so that the norm and the ReLU
read a quarter of what the convolution wrote. The last pool rounds up: images of any size from 4 x 4
on are read, 28 x 28 as 14 x 14, 7 x 7 and 4 x 4.

In training BatchNorm normalises each part of a batch (a rank's, a part of --accumulate, a shard of
--canonical) by its own mean and variance; nothing is exchanged for it between ranks. Its running
statistics, by which it normalises in evaluation, are the same on all ranks: train/statistics.py.

Shapes: B samples, C channels, H x W pixels, K classes.
"""

import torch
from torch import nn
from torch.nn import functional

from engine.models.columns import Columns
from engine.models.network import HeadNetwork
from engine.models.pixels import SCALING, Pixels

CHANNELS = (32, 64, 128)
HIDDEN = 256


class Block(nn.Module):
    """Two 3x3 convolutions, a norm and ReLU between, added to a 1x1 convolution of the input."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(num_in, num_out, 1, bias=False)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        inner_BCHW = functional.relu(self.norm(self.conv1(x_BCHW)))
        sum_BCHW: torch.Tensor = self.conv2(inner_BCHW) + self.skip(x_BCHW)
        return sum_BCHW


class ResidualNet(HeadNetwork):
    """A 3x3 convolution, residual blocks of 64 and 128 channels, two linear layers."""

    min_side = 4
    last = "fc2"
    scaling = SCALING

    def __init__(self, height: int, width: int, num_classes: int) -> None:
        super().__init__()
        first, second, third = CHANNELS
        self.pixels = Pixels()
        self.conv = nn.Conv2d(1, first, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.block1 = Block(first, second)
        self.norm2 = nn.BatchNorm2d(second)
        self.block2 = Block(second, third)
        self.norm3 = nn.BatchNorm2d(third)
        self.fc1 = Columns((third, -(-(height // 4) // 2), -(-(width // 4) // 2)), HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, num_classes)

    def hidden(self, image_BHW: torch.Tensor) -> torch.Tensor:
        """[B, 256] of uint8 pixels, of the type of the arithmetic."""
        x_BCHW = self.conv(self.pixels(image_BHW))
        x_BCHW = functional.relu(self.norm1(functional.max_pool2d(x_BCHW, 2)))
        x_BCHW = self.block1(x_BCHW)
        x_BCHW = functional.relu(self.norm2(functional.max_pool2d(x_BCHW, 2)))
        x_BCHW = self.block2(x_BCHW)
        x_BCHW = functional.relu(self.norm3(functional.max_pool2d(x_BCHW, 2, ceil_mode=True)))
        return functional.relu(self.fc1(x_BCHW))
