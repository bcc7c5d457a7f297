"""What a network answers to images, batch by batch. Shapes: N images of H x W pixels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

BATCH = 2048


@torch.no_grad()
def answers(
    logits: Callable[[torch.Tensor], torch.Tensor], image_NHW: Any, device: torch.device
) -> np.ndarray:
    """answer_N: the class index that `logits` (of uint8 images on `device`) gives each image."""
    parts = [image_NHW[start : start + BATCH] for start in range(0, len(image_NHW), BATCH)]
    return np.concatenate(
        [logits(torch.from_numpy(part).to(device)).argmax(1).cpu().numpy() for part in parts]
    )
