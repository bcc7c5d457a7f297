"""Second layer, after the library's convolution: y = relu(max_pool2d(x, 2) + bias).

One kernel each way. The convolution runs without its bias; adding it after the pool is the same
function, to a quarter of the values. Backward writes every gradient of x: the pooled one at the
winner's place where the ReLU let it pass, 0 elsewhere. Programs of the same positions, 32 channels
each, are neighbours: together they read and write whole lines of memory.

Bytes a sample (14x14, C = 64, bf16): forward reads 25,088 and writes 6,272 + 1,176 of code;
backward the reverse.

Shapes: B samples, H x W values, P = B (H // 2) (W // 2) pooled positions, C channels, G = C / 32
groups.
"""

from typing import Any

import torch
import triton
from triton import language as tl

from kernels import cpu
from kernels.launch import (
    FLOATS,
    LARGEST,
    check,
    check_channels,
    empty_pooled,
    on_triton,
    pool_reference,
    share,
    start,
    unpool_reference,
)
from kernels.pool import LANES, better, load_code, store_code

BLOCK = 64
"""Pooled positions a program takes at once."""


def bias_pool_relu_reference(
    x_BCHW: torch.Tensor, bias_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y_BCYX, code), in x's type."""
    y_BCYX, code_3PG = pool_reference(x_BCHW, bias_C)
    return y_BCYX.contiguous(memory_format=torch.channels_last), code_3PG


def bias_pool_relu_backward_reference(
    grad_BCYX: torch.Tensor, code_3PG: torch.Tensor, height: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x, in that of y's type, and of the bias, in `dtype`."""
    grad_BCHW, grad_bias_C = unpool_reference(grad_BCYX, code_3PG, height, width)
    return grad_BCHW.contiguous(memory_format=torch.channels_last), grad_bias_C.to(dtype)


@triton.jit
def _corner(position, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Index of the first value of each pooled position's window, in values of one channel."""
    per_image: tl.constexpr = (HEIGHT // 2) * (WIDTH // 2)
    sample = position // per_image
    rest = position % per_image
    return (sample * HEIGHT + rest // (WIDTH // 2) * 2) * WIDTH + rest % (WIDTH // 2) * 2


@triton.jit
def bias_pool_relu_forward(
    x_ptr,
    bias_ptr,
    y_ptr,
    code_ptr,
    num_positions,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    groups: tl.constexpr = CHANNELS // LANES
    group = tl.program_id(0) % groups
    channel = group * LANES + tl.arange(0, LANES)[None, :]
    position = tl.program_id(0) // groups * BLOCK + tl.arange(0, BLOCK)
    real = position < num_positions
    place = _corner(position, HEIGHT, WIDTH)[:, None] * CHANNELS + channel
    mask = real[:, None]
    best = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    winner = tl.zeros([BLOCK, LANES], tl.int32)
    for number in tl.static_range(1, 4):
        at = x_ptr + place + (number // 2 * WIDTH + number % 2) * CHANNELS
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        best, winner = better(best, winner, value, number)
    y = best + tl.load(bias_ptr + channel).to(tl.float32)
    passes = ~(y <= 0)
    tl.store(y_ptr + position[:, None] * CHANNELS + channel, tl.where(passes, y, 0.0), mask=mask)
    store_code(code_ptr, winner, passes, position * groups + group, num_positions * groups, real)


@triton.jit
def bias_pool_relu_backward(
    grad_ptr,
    code_ptr,
    grad_x_ptr,
    partial_ptr,
    num_positions,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
):
    """partial [programs, C] fp32: sums for the bias."""
    groups: tl.constexpr = CHANNELS // LANES
    group = tl.program_id(0) % groups
    first = tl.program_id(0) // groups
    channel = group * LANES + tl.arange(0, LANES)[None, :]
    bias_sum = tl.zeros([BLOCK, LANES], tl.float32)
    for turn in range(TURNS):
        block = first + turn * (tl.num_programs(0) // groups)
        position = block * BLOCK + tl.arange(0, BLOCK)
        real = position < num_positions
        word = position * groups + group
        winner, passes = load_code(code_ptr, word, num_positions * groups, real)
        at = grad_ptr + position[:, None] * CHANNELS + channel
        grad = tl.load(at, mask=real[:, None], other=0.0)
        grad = tl.where(passes, grad.to(tl.float32), 0.0)
        bias_sum += grad
        place = _corner(position, HEIGHT, WIDTH)[:, None] * CHANNELS + channel
        for number in tl.static_range(4):
            at = grad_x_ptr + place + (number // 2 * WIDTH + number % 2) * CHANNELS
            tl.store(at, tl.where(winner == number, grad, 0.0), mask=real[:, None])
    tl.store(partial_ptr + first * CHANNELS + channel, tl.sum(bias_sum, 0)[None, :])


def check_layer(x_BCHW: torch.Tensor, bias_C: torch.Tensor) -> None:
    """ValueError with a sentence unless the bias fits the values, and they a code."""
    channels = x_BCHW.shape[1]
    check("bias", bias_C, (torch.float32, torch.float64), (channels,), x_BCHW)
    check_channels(channels)


@torch.library.custom_op("tmnist::bias_pool_relu", mutates_args=())
def _op(x_BCHW: torch.Tensor, bias_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _, channels, height, width = x_BCHW.shape
    check_layer(x_BCHW, bias_C)
    if not on_triton(x_BCHW):
        return bias_pool_relu_reference(x_BCHW, bias_C)
    check("x", x_BCHW, FLOATS, (None, None, None, None), bias_C)
    y_BCYX, code_3PG = _fake(x_BCHW, bias_C)
    num_positions, groups = code_3PG.shape[1:]
    tensors = (x_BCHW.contiguous(memory_format=torch.channels_last), bias_C, y_BCYX, code_3PG)
    sizes = {"HEIGHT": height, "WIDTH": width, "CHANNELS": channels, "BLOCK": BLOCK}
    grid = (triton.cdiv(num_positions, BLOCK) * groups,)
    start(bias_pool_relu_forward, grid, *tensors, num_positions, **sizes)
    return y_BCYX, code_3PG


@_op.register_fake
def _fake(x_BCHW: torch.Tensor, bias_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_pooled(x_BCHW, x_BCHW.dtype, x_BCHW.shape)


@torch.library.custom_op("tmnist::bias_pool_relu_backward", mutates_args=())
def _backward_op(
    grad_BCYX: torch.Tensor, code_3PG: torch.Tensor, height: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    if not on_triton(grad_BCYX):
        return bias_pool_relu_backward_reference(grad_BCYX, code_3PG, height, width, dtype)
    grad_x, _ = _backward_fake(grad_BCYX, code_3PG, height, width, dtype)
    if grad_x.numel() >= LARGEST:
        raise ValueError(f"the gradient of x has {grad_x.numel():,} elements; give a smaller batch")
    if height % 2 or width % 2:
        grad_x.zero_()  # the last row or column stands in no window
    channels = grad_BCYX.shape[1]
    num_positions, groups = code_3PG.shape[1:]
    programs, turns = share(grad_BCYX, num_positions, BLOCK, 8)
    partial = grad_BCYX.new_empty((programs, channels), dtype=torch.float32)
    tensors = (grad_BCYX.contiguous(memory_format=torch.channels_last), code_3PG, grad_x, partial)
    sizes = {"HEIGHT": height, "WIDTH": width, "CHANNELS": channels, "BLOCK": BLOCK, "TURNS": turns}
    grid = (programs * groups,)
    start(bias_pool_relu_backward, grid, *tensors, num_positions, **sizes)
    return grad_x, partial.sum(0)


@_backward_op.register_fake
def _backward_fake(
    grad_BCYX: torch.Tensor, code_3PG: torch.Tensor, height: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    batch_size, channels = grad_BCYX.shape[:2]
    grad_BHWC = grad_BCYX.new_empty((batch_size, height, width, channels))
    return grad_BHWC.permute(0, 3, 1, 2), grad_BCYX.new_empty((channels,), dtype=dtype)


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # of outputs that have none: a launch each
    ctx.save_for_backward(output[1])
    ctx.height_width = inputs[0].shape[2:]
    ctx.dtype = inputs[1].dtype


def _differentiate(ctx: Any, grad_BCYX: torch.Tensor, _: None) -> object:
    (code_3PG,) = ctx.saved_tensors
    return _backward_op(grad_BCYX, code_3PG, *ctx.height_width, ctx.dtype)


_op.register_autograd(_differentiate, setup_context=_save)


def bias_pool_relu(x_BCHW: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor:
    """relu(max_pool2d(x, 2) + bias).

    Args:
        x_BCHW: fp32, bf16 or fp16; read in channels-last memory, so copied where it lies otherwise.
        bias_C: fp32; C a multiple of 32. (On a CPU, by the reference, also fp64.)
    Returns:
        [B, C, H // 2, W // 2] of x's type in channels-last memory; differentiable in both.
    Raises:
        ValueError: a shape, type or device does not fit.
    """
    if not on_triton(x_BCHW) and cpu.fits(x_BCHW, x_BCHW.dtype):
        check_layer(x_BCHW, bias_C)
        return cpu.bias_pool_relu(x_BCHW, bias_C)
    y_BCYX: torch.Tensor = _op(x_BCHW, bias_C)[0]
    return y_BCYX
