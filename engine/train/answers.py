"""What a network answers to images, batch by batch.

Shapes: N images of H x W pixels, B of them in a batch, K classes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

BATCH = 2048
SHIFTS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
"""Rows and columns: the image itself, and one pixel up, down, left and right."""
Network = Callable[[torch.Tensor], torch.Tensor]
"""uint8 image_BHW on a device -> logits_BK there."""


def answers(logits: Network, image_NHW: Any, device: torch.device) -> np.ndarray:
    """answer_N: the class index that `logits` (of uint8 images on `device`) gives each image."""
    answer_N: np.ndarray = all_logits(logits, image_NHW, device).argmax(1).numpy()
    return answer_N


@torch.no_grad()
def all_logits(
    logits: Network, image_NHW: Any, device: torch.device, *, shifts: bool = False
) -> torch.Tensor:
    """fp32 logits_NK on the CPU of at least one image.

    Args:
        shifts: give the mean of the logits over SHIFTS, in place of the image's own.
    """
    parts = []
    for start in range(0, len(image_NHW), BATCH):
        image_BHW = torch.from_numpy(image_NHW[start : start + BATCH]).to(device)
        moved = [shifted(image_BHW, *by) for by in SHIFTS] if shifts else [image_BHW]
        parts.append(torch.stack([logits(each).float() for each in moved]).mean(0).cpu())
    return torch.cat(parts)


def shifted(image_BHW: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """The images moved by whole pixels, down and right or (below 0) up and left; 0 moves in."""
    _, height, width = image_BHW.shape
    moved_BHW = torch.zeros_like(image_BHW)
    to_rows, from_rows = _overlap(height, down)
    to_columns, from_columns = _overlap(width, right)
    moved_BHW[:, to_rows, to_columns] = image_BHW[:, from_rows, from_columns]
    return moved_BHW


def _overlap(size: int, by: int) -> tuple[slice, slice]:
    """Where what stays in sight goes to, and comes from."""
    return slice(max(by, 0), size + min(by, 0)), slice(max(-by, 0), size - max(by, 0))
