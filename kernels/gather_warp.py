"""Batches of some steps of an epoch, gathered by the device's table of ids, and warped if asked to.

One kernel does all of it, from the resident pixels into the caller's tensors, at their addresses:

    id = table[step[k], b]
    row = max(id, 0)
    out[k B + b] = image[row], or image[row] through the sample's 2x3 matrix

A matrix maps output to input in pixels, a pixel's centre at its index + 0.5; bilinear, black
outside. Pixels stay uint8, rounded to nearest. CPU tensors are warped by cpu.py where numba can be
imported.

Bytes a sample (28x28): reads 784 + 8 + 1 (with a matrix 24 more), writes 784 + 8 + 1.

Shapes: N images of the split, S steps of an epoch, K steps asked for, B samples of one step,
M = K B, H x W pixels.
"""

import torch
import triton
from torch.nn import functional
from triton import language as tl

from kernels import cpu
from kernels.launch import check, check_contiguous, on_triton, start

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it to a float32 below 2^22 and taking it away again rounds to the nearest
whole number, ties to even."""


def gather_warp_reference(
    image_NHW: torch.Tensor,
    label_N: torch.Tensor,
    table_SB: torch.Tensor,
    step_K: torch.Tensor,
    matrix_M23: torch.Tensor | None,
    out_MHW: torch.Tensor,
    label_M: torch.Tensor,
    id_M: torch.Tensor,
) -> None:
    """As gather_warp."""
    id_M.copy_(table_SB[step_K].flatten())
    row_M = id_M.clamp(min=0)
    label_M.copy_(label_N[row_M])
    gathered_MHW = image_NHW[row_M]
    if matrix_M23 is None:
        out_MHW.copy_(gathered_MHW)
    else:
        out_MHW.copy_(_warp_reference(gathered_MHW.float(), matrix_M23).round())


def _warp_reference(x_MHW: torch.Tensor, matrix_M23: torch.Tensor) -> torch.Tensor:
    _, height, width = x_MHW.shape
    y_H1 = torch.arange(height, device=x_MHW.device)[:, None] + 0.5
    x_W = torch.arange(width, device=x_MHW.device) + 0.5
    ones_HW = torch.ones_like(x_MHW[0])
    at_HW3 = torch.stack([x_W * ones_HW, y_H1 * ones_HW, ones_HW], 2)
    u_MHW, v_MHW = (at_HW3 @ matrix_M23[:, None].transpose(2, 3)).unbind(3)
    grid_MHW2 = torch.stack([2 * u_MHW / width - 1, 2 * v_MHW / height - 1], 3)
    return functional.grid_sample(x_MHW[:, None], grid_MHW2, align_corners=False)[:, 0]


@triton.jit
def _tap(image_ptr, row, y, x, weight, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A neighbour's part of a warped pixel: its value times its weight, 0 outside the image."""
    inside = (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    place = y.to(tl.int32) * WIDTH + x.to(tl.int32)
    value = tl.load(image_ptr + row * (HEIGHT * WIDTH) + place, mask=inside, other=0)
    return weight * value.to(tl.float32)


@triton.jit
def gather_warp_forward(
    image_ptr,
    label_ptr,
    table_ptr,
    step_ptr,
    matrix_ptr,
    out_ptr,
    out_label_ptr,
    out_id_ptr,
    batch_size,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPED: tl.constexpr,
):
    """One program a sample."""
    sample = tl.program_id(0)
    step = tl.load(step_ptr + sample // batch_size)
    number = tl.load(table_ptr + step * batch_size + sample % batch_size)
    row = tl.maximum(number, 0)
    tl.store(out_id_ptr + sample, number)
    tl.store(out_label_ptr + sample, tl.load(label_ptr + row))
    place = tl.arange(0, BLOCK)
    mask = place < HEIGHT * WIDTH
    if WARPED:
        x = (place % WIDTH).to(tl.float32) + 0.5
        y = (place // WIDTH).to(tl.float32) + 0.5
        m = matrix_ptr + sample * 6
        u = tl.load(m) * x + tl.load(m + 1) * y + tl.load(m + 2) - 0.5
        v = tl.load(m + 3) * x + tl.load(m + 4) * y + tl.load(m + 5) - 0.5
        left = tl.floor(tl.minimum(tl.maximum(u, -2.0), WIDTH))
        top = tl.floor(tl.minimum(tl.maximum(v, -2.0), HEIGHT))
        right = u - left
        below = v - top
        value = _tap(image_ptr, row, top, left, (1 - below) * (1 - right), HEIGHT, WIDTH)
        value += _tap(image_ptr, row, top, left + 1, (1 - below) * right, HEIGHT, WIDTH)
        value += _tap(image_ptr, row, top + 1, left, below * (1 - right), HEIGHT, WIDTH)
        value += _tap(image_ptr, row, top + 1, left + 1, below * right, HEIGHT, WIDTH)
        value = (value + ROUND) - ROUND
    else:
        value = tl.load(image_ptr + row * (HEIGHT * WIDTH) + place, mask=mask, other=0)
    tl.store(
        out_ptr + sample.to(tl.int64) * (HEIGHT * WIDTH) + place, value.to(tl.uint8), mask=mask
    )


@torch.library.custom_op("tmnist::gather_warp", mutates_args=("out_MHW", "label_M", "id_M"))
def gather_warp(
    image_NHW: torch.Tensor,
    label_N: torch.Tensor,
    table_SB: torch.Tensor,
    step_K: torch.Tensor,
    matrix_M23: torch.Tensor | None,
    out_MHW: torch.Tensor,
    label_M: torch.Tensor,
    id_M: torch.Tensor,
) -> None:
    """Fill `out`, `label` and `id` with the M samples of steps `step_K`; no host synchronisation.

    Args:
        image_NHW, label_N: uint8, the split.
        table_SB: int64 ids of the epoch; a negative one is padding and gathers row 0. Ids and steps
            are trusted.
        matrix_M23: fp32 warps, or None.
        out_MHW: uint8. label_M: uint8. id_M: int64.
    Raises:
        ValueError: a shape, type, layout or device does not fit.
    """
    tensors = (image_NHW, label_N, table_SB, step_K, matrix_M23, out_MHW, label_M, id_M)
    _check(*tensors)
    if not on_triton(out_MHW):
        _on_cpu(*tensors)
        return
    num_samples, height, width = out_MHW.shape
    sizes = {"HEIGHT": height, "WIDTH": width, "BLOCK": triton.next_power_of_2(height * width)}
    matrix = image_NHW if matrix_M23 is None else matrix_M23  # one that is not there is not read
    inputs = (image_NHW, label_N, table_SB, step_K, matrix)
    outputs = (out_MHW, label_M, id_M)
    constants = {**sizes, "WARPED": matrix_M23 is not None}
    start(gather_warp_forward, (num_samples,), *inputs, *outputs, table_SB.shape[1], **constants)


def _on_cpu(
    image_NHW: torch.Tensor,
    label_N: torch.Tensor,
    table_SB: torch.Tensor,
    step_K: torch.Tensor,
    matrix_M23: torch.Tensor | None,
    out_MHW: torch.Tensor,
    label_M: torch.Tensor,
    id_M: torch.Tensor,
) -> None:
    """The same without Triton: by the reference, or warped by what is compiled for a CPU."""
    if matrix_M23 is None or not cpu.warps(image_NHW):
        tensors = (image_NHW, label_N, table_SB, step_K, matrix_M23, out_MHW, label_M, id_M)
        gather_warp_reference(*tensors)
        return
    id_M.copy_(table_SB[step_K].flatten())
    row_M = id_M.clamp(min=0)
    torch.index_select(label_N, 0, row_M, out=label_M)
    cpu.warp(image_NHW, row_M, matrix_M23, out_MHW)


def _check(
    image_NHW: torch.Tensor,
    label_N: torch.Tensor,
    table_SB: torch.Tensor,
    step_K: torch.Tensor,
    matrix_M23: torch.Tensor | None,
    out_MHW: torch.Tensor,
    label_M: torch.Tensor,
    id_M: torch.Tensor,
) -> None:
    """Raise ValueError with a sentence unless the kernel may start."""
    byte = (torch.uint8,)
    index = (torch.int64,)
    check("image", image_NHW, byte, (None, None, None), out_MHW, any_size=True)
    num_images, height, width = image_NHW.shape
    check("label", label_N, byte, (num_images,), out_MHW)
    check("table", table_SB, index, (None, None), out_MHW)
    check("step", step_K, index, (None,), out_MHW)
    num_samples = len(step_K) * table_SB.shape[1]
    check("out", out_MHW, byte, (num_samples, height, width), out_MHW)
    check("out label", label_M, byte, (num_samples,), out_MHW)
    check("out id", id_M, index, (num_samples,), out_MHW)
    tensors = {"image": image_NHW, "label": label_N, "table": table_SB, "step": step_K}
    tensors |= {"out": out_MHW, "out label": label_M, "out id": id_M}
    if matrix_M23 is not None:
        check("matrix", matrix_M23, (torch.float32,), (num_samples, 2, 3), out_MHW)
        tensors["matrix"] = matrix_M23
    for name, tensor in tensors.items():
        check_contiguous(name, tensor)


@gather_warp.register_fake
def _fake(*tensors: torch.Tensor | None) -> None:
    """Only what is given is changed."""
