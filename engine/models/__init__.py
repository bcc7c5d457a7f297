"""The networks by name: uint8 pixels in, logits out."""

import torch

from engine.config import ModelConfig
from engine.models.baseline import FastGlyphNet, GlyphNet
from engine.models.network import HeadNetwork, Network, check_image_size
from engine.models.own import own_network
from engine.models.residual import ResidualNet
from engine.models.vit import VitNet

__all__ = ["NETWORKS", "HeadNetwork", "Network", "make_model", "network_class"]

NETWORKS: dict[str, type[Network]] = {
    "baseline": GlyphNet,
    "fast": FastGlyphNet,
    "residual": ResidualNet,
    "vit": VitNet,
}
"""By ModelConfig.name."""


def network_class(config: ModelConfig) -> type[Network]:
    """The class that `config` names, of the table or of the user's own file.

    Raises:
        UserError: the file is not what it should be.
    """
    return NETWORKS.get(config.name) or own_network(config)


def make_model(
    config: ModelConfig,
    height: int,
    width: int,
    num_classes: int,
    seed: int,
    fused: frozenset[str] = frozenset(),
) -> Network:
    """The network on the CPU, in evaluation mode, its weights a function of `seed` alone.

    The global random state is not touched. `fused` are those of kernels.NAMES that compute layers.

    Raises:
        UserError: the images are too small for the network, or its file is not what it should be.
    """
    kind = network_class(config)
    check_image_size(kind, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.of(config, height, width, num_classes)
    model.fused = fused & kind.kernels
    return model.train(False)
