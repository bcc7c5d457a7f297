"""First layer in one kernel, from uint8 pixels of one channel.

    y = relu(max_pool2d(conv2d(image / 255, weight, padding=1) + bias, 2))

A pooled position sees 4x4 pixels, which are 16, the smallest depth of a tensor-core product: its
four candidates are four products of those pixels with the 3x3 weights, put where each candidate's
window lies in the 4x4. Pixels enter as the integers 0..255, exact in bf16 and fp16, and the sum is
scaled by 1/255, so it is rounded less than PyTorch's.

Backward has the image, the pooled gradient and the code, and no input gradient: for each place in
the window the gradient of the positions won there, times their 4x4 pixels; the four 16 x C sums
fold into 9 x C weight gradients.

Bytes a sample (28x28, C = 32, bf16): forward reads 784 and writes 12,544 + 2,352 of code; backward
reads all three. Where there is no backward, as of a frozen first layer and in evaluation, no code
is written.

Shapes: B samples, H x W pixels, P = B (H // 2) (W // 2) pooled positions, C channels, G = C / 32
groups.
"""

from typing import Any

import torch
import triton
from torch.nn import functional
from torch.nn.grad import conv2d_weight
from triton import language as tl

from kernels import cpu
from kernels.launch import (
    FLOATS,
    check,
    check_channels,
    empty_pooled,
    on_triton,
    pool_reference,
    share,
    start,
    unpool_reference,
)
from kernels.pool import LANES, better, load_words, read_code, store_code

BLOCK = 64
"""Pooled positions that a program of the forward takes at once."""
BACKWARD_BLOCK = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
"""Of the backward: the most that leave registers for three programs a multiprocessor of an H100."""
SUM_BLOCK, SUM_WARPS = 256, 8
"""Partial sums that a program of their sum takes at once."""
SCALE = tl.constexpr(1 / 255)
PRECISION = tl.constexpr("tf32x3")
"""Of products of fp32 values: three products in TF32, which together are as good as one in fp32."""


def conv_pool_relu_reference(
    image_BHW: torch.Tensor, weight_C133: torch.Tensor, bias_C: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y_BCYX, code), computed in the weights' type."""
    x_B1HW = image_BHW[:, None].to(weight_C133.dtype) / 255
    y_BCYX, code_3PG = pool_reference(functional.conv2d(x_B1HW, weight_C133, padding=1), bias_C)
    return y_BCYX.to(dtype).contiguous(memory_format=torch.channels_last), code_3PG


def conv_pool_relu_backward_reference(
    grad_BCYX: torch.Tensor, code_3PG: torch.Tensor, image_BHW: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight [C, 1, 3, 3] and bias [C], computed and given in `dtype`."""
    x_B1HW = image_BHW[:, None].to(dtype) / 255
    grad_BCHW, grad_bias_C = unpool_reference(grad_BCYX.to(dtype), code_3PG, *image_BHW.shape[1:])
    grad_weight = conv2d_weight(x_B1HW, (grad_BCYX.shape[1], 1, 3, 3), grad_BCHW, padding=1)
    return grad_weight, grad_bias_C


@triton.jit
def _patches(image_ptr, position, real, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCK, 16]: the 4x4 pixels of each pooled position, 0 outside the image."""
    per_image: tl.constexpr = (HEIGHT // 2) * (WIDTH // 2)
    sample = position // per_image
    rest = position % per_image
    tap = tl.arange(0, 16)[None, :]
    row = (rest // (WIDTH // 2) * 2 - 1)[:, None] + tap // 4
    column = (rest % (WIDTH // 2) * 2 - 1)[:, None] + tap % 4
    inside = real[:, None] & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    at = image_ptr + sample[:, None] * (HEIGHT * WIDTH) + row * WIDTH + column
    return tl.load(at, mask=inside, other=0)


@triton.jit
def _placed(weight_ptr, channel, PLACE: tl.constexpr):
    """[16, 32]: the 3x3 weights where the candidate at PLACE = 2 y + x has them in the 4x4 pixels.

    0 elsewhere.
    """
    tap = tl.arange(0, 16)[:, None]
    row = tap // 4 - PLACE // 2
    column = tap % 4 - PLACE % 2
    inside = (row >= 0) & (row < 3) & (column >= 0) & (column < 3)
    return tl.load(weight_ptr + channel[None, :] * 9 + row * 3 + column, mask=inside, other=0.0)


@triton.jit
def conv_pool_relu_forward(
    image_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    code_ptr,
    num_positions,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
    CODED: tl.constexpr,
):
    """The code is not written where there is no backward."""
    dtype = y_ptr.dtype.element_ty
    group = tl.program_id(1)
    channel = group * LANES + tl.arange(0, LANES)
    bias = tl.load(bias_ptr + channel).to(tl.float32)[None, :]
    weight_0 = _placed(weight_ptr, channel, 0).to(dtype)
    weight_1 = _placed(weight_ptr, channel, 1).to(dtype)
    weight_2 = _placed(weight_ptr, channel, 2).to(dtype)
    weight_3 = _placed(weight_ptr, channel, 3).to(dtype)
    groups: tl.constexpr = CHANNELS // LANES
    for turn in range(TURNS):
        position = (tl.program_id(0) + turn * tl.num_programs(0)) * BLOCK + tl.arange(0, BLOCK)
        real = position < num_positions
        pixels = _patches(image_ptr, position, real, HEIGHT, WIDTH).to(dtype)
        best = tl.dot(pixels, weight_0, input_precision=PRECISION)
        winner = tl.zeros([BLOCK, LANES], tl.int32)
        best, winner = better(best, winner, tl.dot(pixels, weight_1, input_precision=PRECISION), 1)
        best, winner = better(best, winner, tl.dot(pixels, weight_2, input_precision=PRECISION), 2)
        best, winner = better(best, winner, tl.dot(pixels, weight_3, input_precision=PRECISION), 3)
        y = best * SCALE + bias
        passes = ~(y <= 0)
        at = y_ptr + position[:, None] * CHANNELS + channel[None, :]
        tl.store(at, tl.where(passes, y, 0.0), mask=real[:, None])
        if CODED:
            word = position * groups + group
            store_code(code_ptr, winner, passes, word, num_positions * groups, real)


@triton.jit
def _fold(sum_16C, PLACE: tl.constexpr):
    """[16, 32] sums over 4x4 pixels -> the 9 weights' rows, for the candidates at PLACE.

    Rows 9 to 15 are 0.
    """
    weight = tl.arange(0, 16)[:, None]
    tap = tl.arange(0, 16)[None, :]
    lies_at = (weight // 3 + PLACE // 2) * 4 + weight % 3 + PLACE % 2
    chosen = ((tap == lies_at) & (weight < 9)).to(tl.float32)
    return tl.dot(chosen, sum_16C, input_precision=PRECISION)


@triton.jit
def _add_won(sum_16C, pixels, grad, winner, PLACE: tl.constexpr):
    """The [16, 32] sums for the candidates at PLACE, and those of the positions they won."""
    won = tl.where(winner == PLACE, grad, 0.0).to(pixels.dtype)
    return tl.dot(pixels, won, sum_16C, input_precision=PRECISION)


@triton.jit
def _loaded(
    grad_ptr,
    code_ptr,
    image_ptr,
    position,
    channel,
    group,
    num_positions,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """(4x4 pixels, the code's three words, gradients) of pooled positions, as they lie in memory.

    0 beyond the last.
    """
    real = position < num_positions
    groups: tl.constexpr = CHANNELS // LANES
    pixels = _patches(image_ptr, position, real, HEIGHT, WIDTH)
    word = position * groups + group
    low, high, passes = load_words(code_ptr, word, num_positions * groups, real)
    at = grad_ptr + position[:, None] * CHANNELS + channel[None, :]
    return pixels, low, high, passes, tl.load(at, mask=real[:, None], other=0.0)


@triton.jit
def conv_pool_relu_backward(
    grad_ptr,
    code_ptr,
    image_ptr,
    partial_ptr,
    num_positions,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
):
    """partial [programs, 16, C] fp32: rows 0 to 8 the weights' gradients, row 9 the bias's.

    What the next turn needs is loaded before this turn's products.
    """
    dtype = grad_ptr.dtype.element_ty
    group = tl.program_id(1)
    channel = group * LANES + tl.arange(0, LANES)
    sum_0 = tl.zeros([16, LANES], tl.float32)
    sum_1 = tl.zeros([16, LANES], tl.float32)
    sum_2 = tl.zeros([16, LANES], tl.float32)
    sum_3 = tl.zeros([16, LANES], tl.float32)
    bias_sum = tl.zeros([LANES], tl.float32)
    ptrs = (grad_ptr, code_ptr, image_ptr)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ahead = _loaded(*ptrs, position, channel, group, num_positions, HEIGHT, WIDTH, CHANNELS)
    for _ in range(TURNS):
        patches, low, high, passes, grad = ahead
        pixels = tl.trans(patches.to(dtype))
        winner, passes = read_code(low, high, passes)
        position += tl.num_programs(0) * BLOCK
        ahead = _loaded(*ptrs, position, channel, group, num_positions, HEIGHT, WIDTH, CHANNELS)
        grad = tl.where(passes, grad.to(tl.float32), 0.0)
        bias_sum += tl.sum(grad, 0)
        sum_0 = _add_won(sum_0, pixels, grad, winner, 0)
        sum_1 = _add_won(sum_1, pixels, grad, winner, 1)
        sum_2 = _add_won(sum_2, pixels, grad, winner, 2)
        sum_3 = _add_won(sum_3, pixels, grad, winner, 3)
    total = (_fold(sum_0, 0) + _fold(sum_1, 1) + _fold(sum_2, 2) + _fold(sum_3, 3)) * SCALE
    tap = tl.arange(0, 16)[:, None]
    total = tl.where(tap == 9, bias_sum[None, :], total)
    tl.store(partial_ptr + (tl.program_id(0) * 16 + tap) * CHANNELS + channel[None, :], total)


@triton.jit
def conv_pool_relu_backward_sum(
    partial_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """A program for each of the rows 0 to 9, in a fixed order: the sum is the same to the bit."""
    row = tl.program_id(0)
    channel = tl.program_id(1) * LANES + tl.arange(0, LANES)
    total = tl.zeros([BLOCK, LANES], tl.float32)
    for first in range(0, PARTIALS, BLOCK):
        number = first + tl.arange(0, BLOCK)[:, None]
        place = (number * 16 + row) * CHANNELS + channel[None, :]
        total += tl.load(partial_ptr + place, mask=number < PARTIALS, other=0.0)
    if row < 9:
        tl.store(grad_weight_ptr + channel * 9 + row, tl.sum(total, 0))
    else:
        tl.store(grad_bias_ptr + channel, tl.sum(total, 0))


def check_layer(image_BHW: torch.Tensor, weight_C133: torch.Tensor, bias_C: torch.Tensor) -> None:
    """ValueError with a sentence unless pixels, weights and bias fit each other."""
    channels = len(bias_C)
    check("image", image_BHW, (torch.uint8,), (None, None, None), image_BHW)
    check("weight", weight_C133, (torch.float32, torch.float64), (channels, 1, 3, 3), image_BHW)
    check("bias", bias_C, (weight_C133.dtype,), (channels,), image_BHW)
    check_channels(channels)


@torch.library.custom_op("tmnist::conv_pool_relu", mutates_args=())
def _op(
    image_BHW: torch.Tensor,
    weight_C133: torch.Tensor,
    bias_C: torch.Tensor,
    dtype: torch.dtype,
    keeps_code: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_layer(image_BHW, weight_C133, bias_C)
    batch_size, height, width = image_BHW.shape
    channels = len(bias_C)
    if not on_triton(image_BHW):
        y_BCYX, code_3PG = conv_pool_relu_reference(image_BHW, weight_C133, bias_C, dtype)
        return y_BCYX, code_3PG if keeps_code else code_3PG.new_empty(0)
    y_BCYX, code_3PG = _fake(image_BHW, weight_C133, bias_C, dtype, keeps_code)
    check("y", y_BCYX, FLOATS, (None, None, None, None), image_BHW)
    num_positions, groups = batch_size * (height // 2) * (width // 2), channels // LANES.value
    programs, turns = share(image_BHW, num_positions, BLOCK, 8)
    tensors = (image_BHW.contiguous(), weight_C133.contiguous(), bias_C, y_BCYX, code_3PG)
    sizes = {"HEIGHT": height, "WIDTH": width, "CHANNELS": channels, "BLOCK": BLOCK, "TURNS": turns}
    grid = (programs, groups)
    start(conv_pool_relu_forward, grid, *tensors, num_positions, **sizes, CODED=keeps_code)
    return y_BCYX, code_3PG


@_op.register_fake
def _fake(
    image_BHW: torch.Tensor,
    weight_C133: torch.Tensor,
    bias_C: torch.Tensor,
    dtype: torch.dtype,
    keeps_code: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch_size, height, width = image_BHW.shape
    shape_BCHW = (batch_size, weight_C133.shape[0], height, width)
    y_BCYX, code_3PG = empty_pooled(image_BHW, dtype, shape_BCHW)
    return y_BCYX, code_3PG if keeps_code else code_3PG.new_empty(0)


@torch.library.custom_op("tmnist::conv_pool_relu_backward", mutates_args=())
def _backward_op(
    grad_BCYX: torch.Tensor, code_3PG: torch.Tensor, image_BHW: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    if not on_triton(image_BHW):
        return conv_pool_relu_backward_reference(grad_BCYX, code_3PG, image_BHW, dtype)
    grad_weight, grad_bias = _backward_fake(grad_BCYX, code_3PG, image_BHW, dtype)
    channels = grad_BCYX.shape[1]
    _, height, width = image_BHW.shape
    num_positions, groups = code_3PG.shape[1:]
    block = BACKWARD_BLOCK[grad_BCYX.dtype]
    programs, turns = share(image_BHW, num_positions, block, 3)
    partial = image_BHW.new_empty((programs, 16, channels), dtype=torch.float32)
    grad_BCYX = grad_BCYX.contiguous(memory_format=torch.channels_last)
    tensors = (grad_BCYX, code_3PG, image_BHW.contiguous(), partial)
    sizes = {"HEIGHT": height, "WIDTH": width, "CHANNELS": channels, "BLOCK": block, "TURNS": turns}
    start(conv_pool_relu_backward, (programs, groups), *tensors, num_positions, **sizes)
    sums = (partial, grad_weight, grad_bias)
    sizes = {"CHANNELS": channels, "BLOCK": SUM_BLOCK, "PARTIALS": programs}
    start(conv_pool_relu_backward_sum, (10, groups), *sums, **sizes, num_warps=SUM_WARPS)
    return grad_weight, grad_bias


@_backward_op.register_fake
def _backward_fake(
    grad_BCYX: torch.Tensor, code_3PG: torch.Tensor, image_BHW: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    channels = grad_BCYX.shape[1]
    grad_weight = grad_BCYX.new_empty((channels, 1, 3, 3), dtype=dtype)
    return grad_weight, grad_BCYX.new_empty((channels,), dtype=dtype)


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # of outputs that have none: a launch each
    ctx.save_for_backward(output[1], inputs[0])
    ctx.dtype = inputs[1].dtype


def _differentiate(ctx: Any, grad_BCYX: torch.Tensor, _: None) -> tuple[object, ...]:
    code_3PG, image_BHW = ctx.saved_tensors
    return None, *_backward_op(grad_BCYX, code_3PG, image_BHW, ctx.dtype), None, None


_op.register_autograd(_differentiate, setup_context=_save)


def conv_pool_relu(
    image_BHW: torch.Tensor, weight_C133: torch.Tensor, bias_C: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """relu(max_pool2d(conv2d(image / 255, weight, padding=1) + bias, 2)).

    Args:
        image_BHW: uint8.
        weight_C133, bias_C: fp32; C a multiple of 32. (On a CPU, by the reference, also fp64.)
        dtype: fp32, bf16 or fp16, that of the products and of the result; sums are fp32.
    Returns:
        [B, C, H // 2, W // 2] in channels-last memory; differentiable in weight and bias.
    Raises:
        ValueError: a shape, type or device does not fit.
    """
    is_trained = weight_C133.requires_grad or bias_C.requires_grad
    keeps_code = torch.is_grad_enabled() and is_trained
    is_fp32 = weight_C133.dtype == torch.float32
    if is_fp32 and not on_triton(image_BHW) and cpu.fits(image_BHW, dtype):
        check_layer(image_BHW, weight_C133, bias_C)
        return cpu.conv_pool_relu(image_BHW, weight_C133, bias_C, dtype, keeps_code)
    y_BCYX: torch.Tensor = _op(image_BHW, weight_C133, bias_C, dtype, keeps_code)[0]
    return y_BCYX
