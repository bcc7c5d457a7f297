"""The networks by name: uint8 pixels in, logits out."""

from functools import partial

import torch

from engine.config import ModelConfig
from engine.models.baseline import GlyphNet, check_image_size

NETWORKS = {
    "baseline": partial(GlyphNet, relu_after_pool=False),
    "fast": partial(GlyphNet, relu_after_pool=True),
}
"""By ModelConfig.name: called with height, width and number of classes, and with `fused`."""


def make_model(
    config: ModelConfig,
    height: int,
    width: int,
    num_classes: int,
    seed: int,
    fused: frozenset[str] = frozenset(),
) -> GlyphNet:
    """The network on the CPU, its weights a function of `seed` alone.

    The global random state is not touched. `fused` are those of kernels.NAMES that compute layers.
    """
    check_image_size(height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[config.name](height, width, num_classes, fused=fused)
    if config.first_layer == "whitened":
        network.freeze_first_layer()
    return network
