"""What a network reads in images that it is given, without the records it was trained on.

Does not: find the network (trained.py), nor read images (engine/data/inputs.py).

Shapes: N images of H x W pixels, M of them in a batch, P pixels, T answers of each.
"""

from dataclasses import dataclass

import numpy as np
import torch

from engine.data.inputs import Inputs
from engine.errors import UserError
from engine.report import NetworkFacts
from engine.train.answers import Network, all_logits
from engine.train.backends import set_fp32_precision

BATCH = 256
"""Activations of more leave a CPU's caches."""
MOST_ANSWERS = 3
"""Of each image, the likeliest first."""
MIDDLE = 127.5
"""Of the grey values: means below it are of dark grounds."""


@dataclass(frozen=True)
class Predictions:
    """The answers to N images, as indices of the network's classes."""

    answer_NT: np.ndarray
    """The likeliest first; T is MOST_ANSWERS, or all classes where there are fewer."""
    probability_NT: np.ndarray
    """float32: the softmax of the logits; how far it may be believed, tools/evaluate says."""
    num_opposite: int
    """Images whose ground is dark where that of the training images is light, or the reverse."""


def predict(network: Network, facts: NetworkFacts, inputs: Inputs, *, invert: bool) -> Predictions:
    """Answer all images, on the CPU in fp32.

    Args:
        invert: take each pixel p as 255 - p.
    Raises:
        UserError: the images are of another size than the network's, or changed while they were
            read, or the network is broken.
    """
    size = (facts.height_pixels, facts.width_pixels)
    if (inputs.height, inputs.width) != size:
        raise UserError(
            f"{inputs.name}: holds images of {inputs.height} x {inputs.width} pixels, but the "
            f"network takes {size[0]} x {size[1]}; scale or pad them"
        )
    set_fp32_precision("fp32")
    num_answers = min(MOST_ANSWERS, len(facts.classes))
    answer_NT = np.empty((inputs.num_images, num_answers), np.int64)
    probability_NT = np.empty((inputs.num_images, num_answers), np.float32)
    num_opposite = 0
    for start in range(0, inputs.num_images, BATCH):
        row_M = np.arange(start, min(start + BATCH, inputs.num_images))
        image_MP = inputs.take(row_M)
        if invert:
            image_MP = 255 - image_MP
        num_opposite += _num_opposite(image_MP, facts.pixel_mean)
        logits_MK = all_logits(network, image_MP.reshape(-1, *size), torch.device("cpu"))
        if not logits_MK.isfinite().all():
            raise UserError("the network answers with numbers that are not finite; train it again")
        best = logits_MK.softmax(1).topk(num_answers, dim=1)
        answer_NT[row_M], probability_NT[row_M] = best.indices.numpy(), best.values.numpy()
    inputs.check_unchanged()
    return Predictions(answer_NT, probability_NT, num_opposite)


def _num_opposite(image_MP: np.ndarray, pixel_mean: float) -> int:
    """Images whose mean lies on the other side of the middle than that of the training images."""
    mean_M = image_MP.mean(1)
    is_opposite_M = mean_M > MIDDLE if pixel_mean < MIDDLE else mean_M < MIDDLE
    return int(np.count_nonzero(is_opposite_M))


def num_right(predictions: Predictions, facts: NetworkFacts, inputs: Inputs) -> int:
    """Images whose label is the first answer; labels that the network does not know never are."""
    number_of = {name: number for number, name in enumerate(facts.classes)}
    known_K = np.array([number_of.get(name, -1) for name in inputs.classes])
    return int(np.count_nonzero(known_K[inputs.label_N] == predictions.answer_NT[:, 0]))
