"""`Columns`: the linear layer behind convolutions, which reads their NHWC result where it lies.

Flattening an NHWC tensor to the columns that an NCHW network has is a transposing copy, and its
gradient another. So the weight keeps its columns as [out, C, H, W]: `Network.use_channels_last`
lays it out in memory as it does a convolution's, and both sides of the product are then views. As a
number by its index it is the same in either layout. State dicts and files hold it as [out, C H W],
as torch's linear layer does.

It does not choose the layout: input and weight are NHWC together, or neither is. Where only the
input is (FSDP's weights are NCHW) the weight is copied in NHWC's order, so that sums are the same.

Shapes: B samples, C channels, H x W positions.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Columns(nn.Linear):
    """A linear layer of [B, C, H, W]; its initial weights are those of nn.Linear(C H W, out)."""

    def __init__(self, shape_CHW: tuple[int, int, int], num_out: int) -> None:
        channels, height, width = shape_CHW
        super().__init__(channels * height * width, num_out)
        self.weight = nn.Parameter(self.weight.detach().view(num_out, *shape_CHW))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, out]."""
        return functional.linear(*self.sides(x_BCHW), self.bias)

    def sides(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, D] and [out, D], D = C H W in the order of memory: the product's sides, as views."""
        weight = self.weight
        if not (weight.is_contiguous() and x_BCHW.is_contiguous()):  # NHWC
            weight, x_BCHW = weight.permute(0, 2, 3, 1), x_BCHW.permute(0, 2, 3, 1)
        return x_BCHW.flatten(1), weight.flatten(1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].flatten(1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}weight")
        if found is not None and found.shape == self.weight.flatten(1).shape:
            state_dict[f"{prefix}weight"] = found.view(self.weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def columns_of(model: nn.Module) -> frozenset[str]:
    """Names of the weights that are [out, C, H, W] here and [out, C H W] in files."""
    layers = (name for name, module in model.named_modules() if isinstance(module, Columns))
    return frozenset(f"{name}.weight" for name in layers)
