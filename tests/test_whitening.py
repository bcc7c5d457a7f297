"""The whitened and frozen first layer, by real images.

Shapes: N images, M patches of 9 pixels, C filters.
"""

from contextlib import closing

import numpy as np
import pytest
import torch
from torch.nn import functional

from engine.config import RunConfig, override
from engine.data.records import Records
from engine.models.baseline import GlyphNet
from engine.models.whitening import whitening_filters
from engine.train.session import Session, open_session
from engine.world import World

FROZEN = {"model.first_layer": "whitened", "global_batch": 64, "data.feed": "resident"}


@pytest.mark.parametrize("num_filters", [18, 32, 7])
def test_filters_whiten_the_patches_of_real_images(small: Records, num_filters: int) -> None:
    image_NHW = small.split("train").image_NHW
    weight_C133, bias_C = whitening_filters(image_NHW, num_filters)
    assert weight_C133.shape == (num_filters, 1, 3, 3)
    pixels = torch.from_numpy(image_NHW).unsqueeze(1) / 255
    out_CM = functional.conv2d(pixels, weight_C133, bias_C).transpose(0, 1).flatten(1)
    assert out_CM.mean(1).abs().max() < 1e-3
    half = -(-num_filters // 2)
    assert torch.allclose(out_CM[half:], -out_CM[: num_filters - half], atol=1e-4)
    covariance = torch.cov(out_CM[: min(half, 9)])
    assert torch.allclose(covariance, torch.eye(len(covariance)), atol=0.1)


def test_flat_images_give_finite_filters() -> None:
    weight_C133, bias_C = whitening_filters(np.full((3, 8, 8), 7, np.uint8), 32)
    assert torch.isfinite(weight_C133).all() and torch.isfinite(bias_C).all()


@pytest.mark.parametrize("canonical", [0, 2])
def test_a_frozen_layer_is_never_trained(small: Records, world: World, canonical: int) -> None:
    config = override(RunConfig(), FROZEN | {"step.canonical": canonical}, "test")
    with closing(open_session(config, small, world)) as session:
        conv1, other = _convolutions(session)
        before = conv1.weight.clone()
        next(session.step.train_epoch(session.feed, 0))
        assert other.weight.grad is not None and conv1.weight.grad is None
        assert torch.equal(conv1.weight, before) and not torch.equal(before, torch.zeros(()))
        kept = session.step.state.optimizer_tensors()
        assert kept and not any(name.startswith("conv1") for name in kept)
    with closing(open_session(config, small, world)) as session:
        assert torch.equal(_convolutions(session)[0].weight, before)


def test_another_network_trains_its_first_layer_and_says_so(small: Records, world: World) -> None:
    config = override(RunConfig(), FROZEN | {"model.name": "residual"}, "test")
    with closing(open_session(config, small, world)) as session:
        assert all(p.requires_grad for p in session.step.model.parameters())
        assert any("first layer is trained" in note for note in session.notes)


def _convolutions(session: Session) -> tuple[torch.nn.Conv2d, torch.nn.Conv2d]:
    network = session.step.model
    assert isinstance(network, GlyphNet)
    return network.conv1, network.conv2
