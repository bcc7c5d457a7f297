"""A vision transformer: patches, a learned position embedding, pre-norm blocks, mean of the tokens.

Images of any size are read: zeros (the mean grey) fill up to whole patches at the right and below.
There is no dropout and no class token.

Shapes: B samples, H x W pixels, p pixels of a patch's side, T patches, D numbers of a token, A
attention heads, K classes.
"""

from typing import NamedTuple, Self

import torch
from torch import nn
from torch.nn import functional

from engine.config import ModelConfig
from engine.models.network import HeadNetwork
from engine.models.pixels import SCALING, Pixels

MLP_FACTOR = 4
INIT_STD = 0.02


class Size(NamedTuple):
    width: int
    depth: int
    num_heads: int


SIZES = {"tiny": Size(96, 5, 3), "small": Size(256, 6, 4), "base": Size(512, 8, 8)}
"""By ModelConfig.vit_size: 0.6, 4.8 and 25.3 M parameters at 28 x 28 and 94 classes."""


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm and added to its input."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, MLP_FACTOR * width)
        self.down = nn.Linear(MLP_FACTOR * width, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.out(self._attention(self.qkv(self.norm1(x_BTD))))
        sum_BTD: torch.Tensor = x_BTD + self.down(functional.gelu(self.up(self.norm2(x_BTD))))
        return sum_BTD

    def _attention(self, qkv_BT: torch.Tensor) -> torch.Tensor:
        num_samples, num_tokens, width = qkv_BT.shape
        each = (num_samples, num_tokens, 3, self.num_heads, width // 3 // self.num_heads)
        query_BAT, key_BAT, value_BAT = qkv_BT.view(each).permute(2, 0, 3, 1, 4).unbind(0)
        seen_BAT = functional.scaled_dot_product_attention(query_BAT, key_BAT, value_BAT)
        return seen_BAT.transpose(1, 2).flatten(2)


class VitNet(HeadNetwork):
    """A transformer over an image's patches, of p x p pixels each."""

    undecayed = frozenset({"position_TD"})
    last = "head"
    scaling = SCALING

    def __init__(
        self, height: int, width: int, num_classes: int, *, size: str = "tiny", patch: int = 4
    ) -> None:
        super().__init__()
        tokens, depth, num_heads = SIZES[size]
        self.patch = patch
        self.padding = (0, -width % patch, 0, -height % patch)
        num_patches = -(-height // patch) * -(-width // patch)
        self.pixels = Pixels()
        self.embed = nn.Linear(patch * patch, tokens)
        self.position_TD = nn.Parameter(torch.zeros(num_patches, tokens))
        self.blocks = nn.ModuleList(Block(tokens, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(tokens)
        self.head = nn.Linear(tokens, num_classes)
        nn.init.normal_(self.position_TD, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed.weight, std=1 / patch)

    @classmethod
    def of(cls, config: ModelConfig, height: int, width: int, num_classes: int) -> Self:
        return cls(height, width, num_classes, size=config.vit_size, patch=config.vit_patch_pixels)

    def hidden(self, image_BHW: torch.Tensor) -> torch.Tensor:
        """The mean of the tokens [B, D]."""
        x_BTD = self.embed(self._patches(self.pixels(image_BHW))) + self.position_TD
        for block in self.blocks:
            x_BTD = block(x_BTD)
        mean_BD: torch.Tensor = self.norm(x_BTD).mean(1)
        return mean_BD

    def _patches(self, image_B1HW: torch.Tensor) -> torch.Tensor:
        """The pixels of each patch, row by row: [B, T, p * p]."""
        if any(self.padding):
            image_B1HW = functional.pad(image_B1HW, self.padding)
        num_samples, _, height, width = image_B1HW.shape
        side = self.patch
        grid = image_B1HW.reshape(num_samples, height // side, side, width // side, side)
        return grid.transpose(2, 3).flatten(3).flatten(1, 2)
