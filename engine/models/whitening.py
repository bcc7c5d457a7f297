"""The filters of a first layer that whitens, computed from images and never trained.

The idea is tysam-code's hlb-CIFAR10 (2022), after Page, "How to Train Your ResNet 8: Bag of
Tricks" (2019): the principal components of the images' patches, each divided by its standard
deviation, in both signs, since a ReLU follows. Ours are of 3x3 patches of one channel, so that
there are 9 components; the filters that are left are random rotations of the whitened patch.

Shapes: N images, H x W pixels, M patches of P = 9 pixels, C filters.
"""

from typing import Any

import numpy as np
import torch

SIDE = 3
NUM_PIXELS = SIDE * SIDE
LEAST_VARIANCE = 1e-4
"""Added to each component's variance (of pixels in 0..1); without it flat images divide by zero."""
NUM_IMAGES = 1024
"""Of those given, evenly spaced: 700,000 patches of 28 x 28, 50 MB."""
SEED = 0
"""Of the rotations: the same filters for the same images, whatever the run's seed."""


def whitening_filters(image_NHW: Any, num_filters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight_C133, bias_C) fp32 of a convolution of pixels / 255.

    Over the images' patches each output has mean 0 and, as long as its component is above the
    noise, variance 1.
    """
    patch_MP = _patches(np.asarray(image_NHW)[:: -(-len(image_NHW) // NUM_IMAGES)])
    mean_P = patch_MP.mean(0)
    covariance_PP = np.cov(patch_MP, rowvar=False)
    variance_P, vector_PP = np.linalg.eigh(covariance_PP)
    vector_PP *= np.sign(vector_PP.sum(0) + 1e-12)  # eigh leaves the signs open
    whiten_PP = (vector_PP / np.sqrt(np.maximum(variance_P, 0) + LEAST_VARIANCE)).T[::-1]
    rows = [whiten_PP]
    random = np.random.default_rng(SEED)
    while 2 * NUM_PIXELS * len(rows) < num_filters:
        rotation_PP, _ = np.linalg.qr(random.standard_normal((NUM_PIXELS, NUM_PIXELS)))
        rows.append(rotation_PP @ whiten_PP)
    half = np.concatenate(rows)[: -(-num_filters // 2)]
    weight_CP = np.concatenate([half, -half])[:num_filters]
    bias_C = -weight_CP @ mean_P
    weight_C133 = weight_CP.reshape(num_filters, 1, SIDE, SIDE)
    return torch.from_numpy(weight_C133).float(), torch.from_numpy(bias_C).float()


def _patches(image_NHW: np.ndarray) -> np.ndarray:
    """All patches that lie in an image, as float64 in 0..1."""
    windows = np.lib.stride_tricks.sliding_window_view(image_NHW, (SIDE, SIDE), axis=(1, 2))
    return windows.reshape(-1, NUM_PIXELS) / 255
