"""What a network is to the engine: uint8 pixels in, logits out.

A network of one's own is a class with `__init__` and `forward`; README.md here shows one. All else
below has a default.

Shapes: B samples, N images, H x W pixels, D numbers of the last hidden layer, K classes.
"""

from typing import Any, ClassVar, Self, cast

import torch
from torch import nn

from engine.config import ModelConfig
from engine.errors import UserError
from engine.models.columns import Columns
from engine.models.pixels import Pixels

FIT_ALL = frozenset({"gather_warp", "softmax_cross_entropy", "adamw"})
"""Those of kernels.NAMES that work around a network, whatever it is."""


class Network(nn.Module):
    """The base of every network; made as `kind(height, width, num_classes)`.

    `forward` takes uint8 image_BHW on the network's device and gives logits_BK of any float type.
    It reads nothing on the host, and takes the same way at each call: a captured graph repeats it.
    Buffers that training changes must be those of torch's BatchNorm; train/statistics.py says how
    several ranks agree on them.
    """

    min_side: ClassVar[int] = 1
    """Pixels that images must have at least, in height and width."""
    kernels: ClassVar[frozenset[str]] = FIT_ALL
    """Those of kernels.NAMES that it can use; others are left out with a note."""
    undecayed: ClassVar[frozenset[str]] = frozenset()
    """Parameters of two and more dimensions that weight decay leaves alone, by name; it leaves
    alone all of one dimension (biases, norms) anyway."""

    scaling: ClassVar[str] = "the network's own"
    """How grey values become numbers, for whoever uses the weights elsewhere."""

    can_whiten: ClassVar[bool] = False
    """Whether `model.first_layer = "whitened"` means anything to it."""

    channels_last: bool = False
    """Whether activations are NHWC."""
    fused: frozenset[str] = frozenset()
    """Those of `kernels` that compute layers in this run."""

    @classmethod
    def of(cls, config: ModelConfig, height: int, width: int, num_classes: int) -> Self:
        """The network that `config` means. Override it where a setting says more than the name."""
        return cls(height, width, num_classes)

    def use_channels_last(self, *, weights: bool = True) -> None:
        """Lay out activations from the pixels on, and `weights`, as NHWC."""
        if weights:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.channels_last = True
        for module in self.modules():
            if isinstance(module, Pixels):
                module.channels_last = True

    def rounded(self) -> frozenset[str]:
        """Names of the parameters that reach nothing but operations which autocast runs in bf16.

        Those of plain convolutions and linear layers; override it where `forward` uses one
        otherwise.
        """
        kinds = (nn.Conv2d, nn.Linear, Columns)
        layers = [(name, m) for name, m in self.named_modules() if type(m) in kinds]
        return frozenset(f"{name}.{own}" for name, m in layers for own, _ in m.named_parameters())

    @property
    def wants_images(self) -> bool:
        """Whether `prepare` has anything to take from training images."""
        return any(isinstance(module, Pixels) for module in self.modules())

    def prepare(self, image_NHW: Any) -> None:
        """See training images (uint8, undistorted) once, before the first step of a new run.

        Standardises the pixels, where the network has `Pixels`. Every rank gets the same images
        and must make the same of them. A resumed run loads what is left in buffers.
        """
        for module in self.modules():
            if isinstance(module, Pixels):
                module.fill(image_NHW)


class HeadNetwork(Network):
    """A network whose last layer is linear: that layer and the loss can be one kernel."""

    kernels = FIT_ALL | {"linear_cross_entropy"}
    last: ClassVar[str]
    """The name of the last layer, an nn.Linear with a bias."""
    relu_bias: ClassVar[str] = ""
    """The bias of the linear layer in whose ReLU `hidden` ends, if that layer, where
    linear_cross_entropy is in `fused`, leaves its mask and its bias's gradient to that kernel."""

    def __init_subclass__(cls) -> None:
        """What a class computes in its own way has not what is promised of its parent's."""
        super().__init_subclass__()
        if "hidden" in vars(cls) and "relu_bias" not in vars(cls):
            cls.relu_bias = ""
        if "forward" in vars(cls):
            cls.kernels = cls.kernels - {"linear_cross_entropy"}

    def rounded(self) -> frozenset[str]:
        """But those of the last layer, where the kernel takes them in fp32."""
        names = super().rounded()
        if "linear_cross_entropy" not in self.fused:
            return names
        return names - {f"{self.last}.weight", f"{self.last}.bias"}

    def hidden(self, image_BHW: torch.Tensor) -> torch.Tensor:
        """What the last layer reads of uint8 pixels, [B, D]."""
        raise NotImplementedError

    @property
    def last_layer(self) -> nn.Linear:
        return cast(nn.Linear, getattr(self, self.last))

    def forward(self, image_BHW: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] of uint8 pixels, of the type of the arithmetic."""
        logits_BK: torch.Tensor = self.last_layer(self.hidden(image_BHW))
        return logits_BK


def check_image_size(kind: type[Network], height: int, width: int) -> None:
    """UserError if images are too small for the network: nothing would be left of them."""
    if min(height, width) < kind.min_side:
        raise UserError(
            f"images of {height} x {width} pixels are too small for the network {kind.__name__}; "
            f"give records of images of at least {kind.min_side} x {kind.min_side}"
        )
