"""Batches of some steps of an epoch, gathered from the resident pixels by the device's table of ids, in one kernel.

    id = table[step[k], b];  row = max(id, 0);  out[k B + b] = image[row], or image[row] through its 2x3 matrix

A matrix maps output to input in pixels, a pixel's centre at its index + 0.5; bilinear, black outside. Pixels stay
uint8, rounded to nearest, or become the float type of `out`, scaled to 0..1. Everything is written into the caller's
tensors, at their addresses.

Bytes a sample (28x28): reads 784 + 8 + 1 (with a matrix 24 more), writes 784 + 8 + 1; normalised to bf16 1,568.

Shapes: N images of the split, S steps of an epoch, K steps asked for, B samples of one step, H x W pixels.
"""

import torch
import triton
from torch.nn import functional
from triton import language as tl

from kernels.launch import FLOATS, check, on_triton, start

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and taking it away rounds a float32 below 2^22 to the nearest whole number, ties to even."""


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
    x_MHW = image_NHW[row_M].float()
    if matrix_M23 is not None:
        height, width = image_NHW.shape[1:]
        y, x = (torch.arange(n, device=x_MHW.device) + 0.5 for n in (height, width))
        at_HW3 = torch.stack(
            [x.expand(height, -1), y[:, None].expand(-1, width), torch.ones_like(x_MHW[0])], 2
        )
        u_MHW, v_MHW = (at_HW3 @ matrix_M23[:, None].transpose(2, 3)).unbind(3)
        grid_MHW2 = torch.stack([2 * u_MHW / width - 1, 2 * v_MHW / height - 1], 3)
        x_MHW = functional.grid_sample(x_MHW[:, None], grid_MHW2, align_corners=False)[:, 0]
    out_MHW.copy_(x_MHW.round() if out_MHW.dtype == torch.uint8 else x_MHW / 255)


@triton.jit
def _tap(image_ptr, row, y, x, weight, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    inside = (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    place = y.to(tl.int32) * WIDTH + x.to(tl.int32)
    return weight * tl.load(image_ptr + row * (HEIGHT * WIDTH) + place, mask=inside, other=0).to(
        tl.float32
    )


@triton.jit
def _gather(
    image_ptr, label_ptr, table_ptr, step_ptr, matrix_ptr, out_ptr, out_label_ptr, out_id_ptr, batch_size,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WARPED: tl.constexpr,
):  # fmt: skip
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
        x, y = (place % WIDTH).to(tl.float32) + 0.5, (place // WIDTH).to(tl.float32) + 0.5
        m = matrix_ptr + sample * 6
        u = tl.load(m) * x + tl.load(m + 1) * y + tl.load(m + 2) - 0.5
        v = tl.load(m + 3) * x + tl.load(m + 4) * y + tl.load(m + 5) - 0.5
        left, top = (
            tl.floor(tl.minimum(tl.maximum(u, -2.0), WIDTH)),
            tl.floor(tl.minimum(tl.maximum(v, -2.0), HEIGHT)),
        )
        right, below = u - left, v - top
        value = _tap(image_ptr, row, top, left, (1 - below) * (1 - right), HEIGHT, WIDTH)
        value += _tap(image_ptr, row, top, left + 1, (1 - below) * right, HEIGHT, WIDTH)
        value += _tap(image_ptr, row, top + 1, left, below * (1 - right), HEIGHT, WIDTH)
        value += _tap(image_ptr, row, top + 1, left + 1, below * right, HEIGHT, WIDTH)
    else:
        value = tl.load(image_ptr + row * (HEIGHT * WIDTH) + place, mask=mask, other=0)
    dtype = out_ptr.dtype.element_ty
    if dtype != tl.uint8:
        value = value.to(tl.float32) / 255
    elif WARPED:
        value = (value + ROUND) - ROUND
    tl.store(out_ptr + sample.to(tl.int64) * (HEIGHT * WIDTH) + place, value.to(dtype), mask=mask)


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
    """Fill `out`, `label` and `id` with the M = K B samples of steps `step_K` of an epoch; no host synchronisation.

    Args:
        image_NHW, label_N: uint8, the split.
        table_SB: int64 ids of the epoch; a negative one is padding and gathers row 0. Ids and steps are trusted.
        matrix_M23: fp32 warps, or None.
        out_MHW: uint8, fp32, bf16 or fp16, contiguous. label_M: uint8. id_M: int64.
    Raises:
        ValueError: a shape, type, layout or device does not fit.
    """
    num, height, width = image_NHW.shape
    batch_size, num_samples = table_SB.shape[1], len(step_K) * table_SB.shape[1]
    check("out", out_MHW, (torch.uint8, *FLOATS), (num_samples, height, width), out_MHW)
    for name, tensor, dtype, shape in (
        ("image", image_NHW, torch.uint8, (None, None, None)),
        ("label", label_N, torch.uint8, (num,)),
        ("table", table_SB, torch.int64, (None, None)),
        ("step", step_K, torch.int64, (None,)),
        ("out label", label_M, torch.uint8, (num_samples,)),
        ("out id", id_M, torch.int64, (num_samples,)),
        *(
            []
            if matrix_M23 is None
            else [("matrix", matrix_M23, torch.float32, (num_samples, 2, 3))]
        ),
    ):
        check(name, tensor, (dtype,), shape, out_MHW, any_size=name == "image")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous; give .contiguous()")
    if not out_MHW.is_contiguous():
        raise ValueError("out is not contiguous; give a contiguous buffer")
    tensors = (image_NHW, label_N, table_SB, step_K, matrix_M23, out_MHW, label_M, id_M)
    if not on_triton(out_MHW):
        gather_warp_reference(*tensors)
        return
    sizes = {"HEIGHT": height, "WIDTH": width, "BLOCK": triton.next_power_of_2(height * width)}
    given = [
        image_NHW if t is None else t for t in tensors
    ]  # a matrix that is not there is not read
    start(_gather, (num_samples,), *given, batch_size, WARPED=matrix_M23 is not None, **sizes)


@gather_warp.register_fake
def _fake(*tensors: torch.Tensor | None) -> None:
    """Only what is given is changed."""
