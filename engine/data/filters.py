"""The filters of PNG's scanlines, undone for many pictures at once.

Each scanline begins with the number of its filter, by which what its neighbours let expect was
taken from each pixel: the one to the left, the one above, or both and the one in the corner between
them. So all pixels of a diagonal, from below to above, can be restored together.

Source: https://www.w3.org/TR/png-3/#9Filters

Shapes: R pictures of H x W = P pixels, V = W + 1 bytes of a scanline, D pixels of a diagonal.
"""

from collections.abc import Sequence

import numpy as np

SUB, UP, AVERAGE, PAETH = 1, 2, 3, 4
"""Filters; 0 takes nothing."""


def unfiltered(raw: Sequence[bytes], side: int) -> tuple[np.ndarray, int]:
    """(Pixels (R, P) of square pictures, the first that has a filter that PNG lacks, or -1).

    Args:
        raw: each picture's scanlines, H x V.
    """
    raw_RHV = np.frombuffer(b"".join(raw), np.uint8).reshape(len(raw), side, side + 1)
    kind_HR = raw_RHV[..., 0].T
    if kind_HR.max(initial=0) > PAETH:
        return np.empty(0, np.uint8), int((kind_HR > PAETH).any(axis=0).argmax())
    mask_HR = {
        kind: _mask(np.ascontiguousarray(kind_HR == kind)) for kind in (SUB, UP, AVERAGE, PAETH)
    }
    # Pictures come last: what is done to a pixel is done to that of all of them.
    left_out_HWR = np.ascontiguousarray(raw_RHV[..., 1:].transpose(1, 2, 0))
    image_VVR = np.zeros((side + 1, side + 1, len(raw)), np.uint8)
    for number in range(2 * side - 1):
        first, stop = max(0, number - side + 1), min(number + 1, side)
        y_D = np.arange(first, stop)
        x_D = number - y_D
        left_DR, above_DR = image_VVR[y_D + 1, x_D], image_VVR[y_D, x_D + 1]
        expected_DR = left_DR & mask_HR[SUB][first:stop]
        expected_DR |= above_DR & mask_HR[UP][first:stop]
        expected_DR |= _average(left_DR, above_DR) & mask_HR[AVERAGE][first:stop]
        nearest_DR = _paeth(left_DR, above_DR, image_VVR[y_D, x_D])
        expected_DR |= nearest_DR & mask_HR[PAETH][first:stop]
        image_VVR[y_D + 1, x_D + 1] = left_out_HWR[y_D, x_D] + expected_DR
    return image_VVR[1:, 1:].transpose(2, 0, 1).reshape(len(raw), -1), -1


def _mask(is_DR: np.ndarray) -> np.ndarray:
    """255 where it is so, else 0."""
    mask_DR: np.ndarray = np.negative(is_DR.view(np.uint8))
    return mask_DR


def _average(left_DR: np.ndarray, above_DR: np.ndarray) -> np.ndarray:
    """Their mean, rounded down."""
    mean_DR: np.ndarray = (left_DR & above_DR) + ((left_DR ^ above_DR) >> 1)
    return mean_DR


def _paeth(left_DR: np.ndarray, above_DR: np.ndarray, corner_DR: np.ndarray) -> np.ndarray:
    """The one nearest to left + above - corner; of equally near ones the first.

    In bytes: where left and above lie on one side of the corner, the corner is not the nearest, as
    if it were 255 away; else its distance is the difference of the others'.
    """
    to_left_DR = _distance(above_DR, corner_DR)
    to_above_DR = _distance(left_DR, corner_DR)
    is_one_side_DR = (left_DR >= corner_DR) == (above_DR >= corner_DR)
    to_corner_DR = _distance(to_left_DR, to_above_DR) | _mask(is_one_side_DR)
    nearest_DR = _chosen(to_above_DR <= to_corner_DR, above_DR, corner_DR)
    is_left_DR = to_left_DR <= np.minimum(to_above_DR, to_corner_DR)
    return _chosen(is_left_DR, left_DR, nearest_DR)


def _distance(one_DR: np.ndarray, other_DR: np.ndarray) -> np.ndarray:
    distance_DR: np.ndarray = np.maximum(one_DR, other_DR) - np.minimum(one_DR, other_DR)
    return distance_DR


def _chosen(is_DR: np.ndarray, yes_DR: np.ndarray, no_DR: np.ndarray) -> np.ndarray:
    """As np.where, which takes some twenty times as long for bytes."""
    chosen_DR: np.ndarray = no_DR ^ ((no_DR ^ yes_DR) & _mask(is_DR))
    return chosen_DR
