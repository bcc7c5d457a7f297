"""The study's network.

Shapes: B samples, C channels, H x W pixels, K classes.
"""

from typing import Any, ClassVar, Self, cast

import torch
from torch import nn
from torch.nn import functional

from engine.config import ModelConfig
from engine.models.columns import Columns
from engine.models.network import HeadNetwork
from engine.models.pixels import with_channel
from engine.models.whitening import whitening_filters

CONV1_CHANNELS, CONV2_CHANNELS, HIDDEN = 32, 64, 128


class GlyphNet(HeadNetwork):
    """The study's network: two 3x3 convolutions with ReLU and 2x2 max-pool, two linear layers.

    432,478 parameters at 28x28 and 94 classes.
    """

    min_side = 4  # two 2x2 max-pools leave a quarter, and the linear layers need a pixel of it
    kernels = HeadNetwork.kernels | {"conv_pool_relu", "bias_pool_relu", "conv2_pool_relu"}
    last = "fc2"
    scaling = "pixel / 255"
    relu_bias = "fc1.bias"
    can_whiten = True
    relu_after_pool: ClassVar[bool] = False

    def __init__(self, height: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, CONV1_CHANNELS, 3, padding=1)
        self.conv2 = nn.Conv2d(CONV1_CHANNELS, CONV2_CHANNELS, 3, padding=1)
        self.fc1 = Columns((CONV2_CHANNELS, height // 4, width // 4), HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, num_classes)

    @classmethod
    def of(cls, config: ModelConfig, height: int, width: int, num_classes: int) -> Self:
        network = cls(height, width, num_classes)
        network.conv1.requires_grad_(config.first_layer == "trained")
        return network

    @property
    def wants_images(self) -> bool:
        return not self.conv1.weight.requires_grad

    def prepare(self, image_NHW: Any) -> None:
        """Fill a first layer that is frozen: it whitens the images' patches."""
        if self.wants_images:
            weight_C133, bias_C = whitening_filters(image_NHW, CONV1_CHANNELS)
            self.conv1.weight.copy_(weight_C133)
            cast(torch.Tensor, self.conv1.bias).copy_(bias_C)

    def rounded(self) -> frozenset[str]:
        """But those that a fused layer takes in fp32 and rounds itself."""
        taken = {
            "conv_pool_relu": {"conv1.weight", "conv1.bias"},
            "bias_pool_relu": {"conv2.bias"},
            "conv2_pool_relu": {"conv2.weight", "conv2.bias"},
        }
        return super().rounded() - {p for name in self.fused & taken.keys() for p in taken[name]}

    def hidden(self, image_BHW: torch.Tensor) -> torch.Tensor:
        """[B, 128] of uint8 pixels, of the type of the arithmetic."""
        x_BCHW = self._second(self._first(image_BHW))
        if "linear_cross_entropy" not in self.fused:
            return functional.relu(self.fc1(x_BCHW))
        from kernels.linear_relu import linear_relu

        sides = self.fc1.sides(x_BCHW)
        return linear_relu(*sides, self.fc1.bias, masked=bool(self.relu_bias))

    def _first(self, image_BHW: torch.Tensor) -> torch.Tensor:
        if "conv_pool_relu" not in self.fused:
            return self._relu_pool(self.conv1(self._scaled(image_BHW)))
        from kernels.conv_pool_relu import conv_pool_relu

        device, dtype = image_BHW.device.type, torch.float32
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        bias = cast(torch.Tensor, self.conv1.bias)
        return conv_pool_relu(image_BHW, self.conv1.weight, bias, dtype)

    def _scaled(self, image_BHW: torch.Tensor) -> torch.Tensor:
        """image_B1HW, fp32 in 0..1."""
        return with_channel(image_BHW, self.channels_last).to(torch.float32).mul_(1 / 255)

    def _second(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if "conv2_pool_relu" in self.fused:
            from kernels.conv2_pool_relu import conv2_pool_relu

            return conv2_pool_relu(x_BCHW, self.conv2.weight, cast(torch.Tensor, self.conv2.bias))
        if "bias_pool_relu" not in self.fused:
            return self._relu_pool(self.conv2(x_BCHW))
        from kernels.bias_pool_relu import bias_pool_relu

        x_BCHW = functional.conv2d(x_BCHW, self.conv2.weight, padding=1)
        return bias_pool_relu(x_BCHW, cast(torch.Tensor, self.conv2.bias))

    def _relu_pool(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if self.relu_after_pool:
            return functional.relu(functional.max_pool2d(x_BCHW, 2))
        return functional.max_pool2d(functional.relu(x_BCHW), 2)


class FastGlyphNet(GlyphNet):
    """The same function of the same parameters, the ReLU after the pool, where it reads a quarter.

    The maximum of four and the ReLU commute: forward and gradient are bit-identical.
    """

    relu_after_pool = True
