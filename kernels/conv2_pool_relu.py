"""Second layer, convolution and all.

    y = relu(max_pool2d(conv2d(x, weight, padding=1), 2) + bias)

The library's convolution writes four values for each that the pool keeps. Here the four candidates
of a pooled position are four sums in registers, over nine taps and all input channels; maximum,
bias, ReLU and code follow there, and the convolution is never written.

Backward has the pooled gradient and the code: each pooled gradient goes to one of four places, so
the convolution's gradient is made of both in registers. One kernel gives the gradient of x, two
pixels of a 2x2 window at once: around them lie 3x4 places, 4 a row, in 3 windows. Another gives the
weight's: a program takes three taps and a share of the positions, and the shares are added in a
fixed order. Where no gradient of x is wanted (a first layer that is frozen), none is computed.

Bytes a sample (14x14, 32 to 64 channels, bf16): forward reads 12,544 and writes 6,272 + 1,176 of
code; input backward reads these two and writes 12,544; weight backward reads all three.

Weights enter rounded to x's type, in channels-last memory, by a cast before each kernel. Kernels of
other sizes, strides and paddings than 3, 1 and 1 are not for it.

Shapes: B samples, H x W pixels, P = B (H // 2) (W // 2) pooled positions, I input channels, O
output channels, G = O / 32 groups.
"""

from math import gcd
from typing import Any, NamedTuple

import torch
import triton
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight
from triton import language as tl

from kernels import launch
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
from kernels.pool import LANES, better, keep_won, keep_won_across, load_won, store_codes


class Blocks(NamedTuple):
    """What a program takes at once; fewer channels where these do not divide a layer's."""

    positions: int
    inputs: int
    outputs: int


FORWARD = Blocks(64, 32, 64)
INPUT_BACKWARD = Blocks(64, 32, 32)
WEIGHT_BACKWARD = Blocks(32, 32, 32)
"""Of 2-byte numbers, for three programs a multiprocessor on an H100: at most 168 registers a thread
(65,536 / 384) and 75 KB of shared memory each. Forward: 4 sums of 64 x 64 are 128 registers; three
stages of 4 x 64 x 32 values of x and 64 x 32 weights are 60 KB. Input backward: 2 sums of 64 x 32
are 32 registers. Weight backward: 3 of 32 x 32 are 24; of 64 x 32 they spilled on sm_100, in fp16
with Triton 3.8."""
FORWARD_FP32 = Blocks(32, 16, 64)
INPUT_BACKWARD_FP32 = Blocks(32, 16, 32)
WEIGHT_BACKWARD_FP32 = Blocks(16, 16, 32)
"""Of fp32, whose operands stand in registers, too."""
MOST_CHANNELS = 256
"""In or out: then the weight gradient's shares are 311 MB on an H100."""
PRECISION = tl.constexpr("ieee")
"""Of products of fp32 values, whatever torch is allowed: TF32 would not be told by the type."""


def conv2_pool_relu_reference(
    x_BIHW: torch.Tensor, weight_OI33: torch.Tensor, bias_O: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y_BOYX, code), in x's type, which the weight is of."""
    x_BOHW = functional.conv2d(x_BIHW, weight_OI33, padding=1)
    y_BOYX, code_3PG = pool_reference(x_BOHW, bias_O)
    return y_BOYX.contiguous(memory_format=torch.channels_last), code_3PG


def conv2_pool_relu_input_backward_reference(
    grad_BOYX: torch.Tensor,
    code_3PG: torch.Tensor,
    weight_OI33: torch.Tensor,
    height: int,
    width: int,
) -> torch.Tensor:
    """Gradient of x, in that of y's type, which the weight is of."""
    grad_BOHW, _ = unpool_reference(grad_BOYX, code_3PG, height, width)
    shape = (len(grad_BOYX), weight_OI33.shape[1], height, width)
    grad_BIHW: torch.Tensor = conv2d_input(shape, weight_OI33, grad_BOHW, padding=1)
    return grad_BIHW.contiguous(memory_format=torch.channels_last)


def conv2_pool_relu_weight_backward_reference(
    grad_BOYX: torch.Tensor, code_3PG: torch.Tensor, x_BIHW: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight [O, I, 3, 3] and bias [O], computed and given in `dtype`."""
    grad_BOHW, grad_bias_O = unpool_reference(grad_BOYX.to(dtype), code_3PG, *x_BIHW.shape[2:])
    shape = (grad_BOYX.shape[1], x_BIHW.shape[1], 3, 3)
    grad_weight = conv2d_weight(x_BIHW.to(dtype), shape, grad_BOHW, padding=1)
    return grad_weight.contiguous(memory_format=torch.channels_last), grad_bias_O


@triton.jit
def _load_pixels(
    x_ptr,
    sample,
    row,
    column,
    real,
    inputs,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """[BLOCK, I]: some inputs of the pixel at (row, column) of each sample, 0 outside the image."""
    inside = real & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    at = ((sample * HEIGHT + row) * WIDTH + column) * INPUTS
    return tl.load(x_ptr + at[:, None] + inputs[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _corner(position, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """(sample, row, column) of the first of the 4x4 pixels that a pooled position sees."""
    per_image: tl.constexpr = (HEIGHT // 2) * (WIDTH // 2)
    rest = position % per_image
    row = rest // (WIDTH // 2) * 2 - 1
    return position // per_image, row, rest % (WIDTH // 2) * 2 - 1


@triton.jit
def conv2_pool_relu_forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    code_ptr,
    num_positions,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = position < num_positions
    sample, top, left = _corner(position, HEIGHT, WIDTH)
    channel = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    sum_0 = tl.zeros([BLOCK, BLOCK_O], tl.float32)
    sum_1 = tl.zeros([BLOCK, BLOCK_O], tl.float32)
    sum_2 = tl.zeros([BLOCK, BLOCK_O], tl.float32)
    sum_3 = tl.zeros([BLOCK, BLOCK_O], tl.float32)
    for step in range(9 * (INPUTS // BLOCK_I)):
        tap = step % 9
        row = top + tap // 3
        column = left + tap % 3
        inputs = step // 9 * BLOCK_I + tl.arange(0, BLOCK_I)
        weight = tl.trans(_load_weight(weight_ptr, channel, inputs, tap, INPUTS))
        x = _load_pixels(x_ptr, sample, row, column, real, inputs, HEIGHT, WIDTH, INPUTS)
        sum_0 = tl.dot(x, weight, sum_0, input_precision=PRECISION)
        x = _load_pixels(x_ptr, sample, row, column + 1, real, inputs, HEIGHT, WIDTH, INPUTS)
        sum_1 = tl.dot(x, weight, sum_1, input_precision=PRECISION)
        x = _load_pixels(x_ptr, sample, row + 1, column, real, inputs, HEIGHT, WIDTH, INPUTS)
        sum_2 = tl.dot(x, weight, sum_2, input_precision=PRECISION)
        x = _load_pixels(x_ptr, sample, row + 1, column + 1, real, inputs, HEIGHT, WIDTH, INPUTS)
        sum_3 = tl.dot(x, weight, sum_3, input_precision=PRECISION)
    best, winner = better(sum_0, tl.zeros([BLOCK, BLOCK_O], tl.int32), sum_1, 1)
    best, winner = better(best, winner, sum_2, 2)
    best, winner = better(best, winner, sum_3, 3)
    y = best + tl.load(bias_ptr + channel).to(tl.float32)[None, :]
    passes = ~(y <= 0)
    at = y_ptr + position[:, None] * CHANNELS + channel[None, :]
    tl.store(at, tl.where(passes, y, 0.0), mask=real[:, None])
    groups: tl.constexpr = CHANNELS // LANES
    group = tl.program_id(1) * (BLOCK_O // LANES) + tl.arange(0, BLOCK_O // LANES)
    word = position[:, None] * groups + group[None, :]
    store_codes(code_ptr, winner, passes, word, num_positions * groups, real[:, None])


@triton.jit
def _load_weight(weight_ptr, channel, inputs, tap, INPUTS: tl.constexpr):
    """[O, I]: a tap's weights."""
    return tl.load(weight_ptr + channel[:, None] * (9 * INPUTS) + tap * INPUTS + inputs[None, :])


@triton.jit
def _load_won(
    grad_ptr,
    code_ptr,
    position,
    inside,
    part,
    num_positions,
    row,
    CHANNELS: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """(left, right) [BLOCK, O]: gradients of the convolution in a row of each position's window."""
    groups: tl.constexpr = CHANNELS // LANES
    channel = part * BLOCK_O + tl.arange(0, BLOCK_O)
    group = part * (BLOCK_O // LANES) + tl.arange(0, BLOCK_O // LANES)
    mask = inside[:, None]
    at = grad_ptr + position[:, None] * CHANNELS + channel[None, :]
    grad = tl.load(at, mask=mask, other=0.0)
    word = position[:, None] * groups + group[None, :]
    left, right = load_won(code_ptr, word, num_positions * groups, mask, row)
    return keep_won(grad, left), keep_won(grad, right)


@triton.jit
def _load_row(
    grad_ptr,
    code_ptr,
    near,
    x,
    in_row,
    part,
    num_positions,
    row,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Gradients [BLOCK, O] at the 4 places of a row around window `near`: they lie in 3 windows."""
    inside = in_row & (x > 0) & (x <= WIDTH // 2)
    _, won_0 = _load_won(
        grad_ptr, code_ptr, near - 1, inside, part, num_positions, row, CHANNELS, BLOCK_O
    )
    inside = in_row & (x < WIDTH // 2)
    won_1, won_2 = _load_won(
        grad_ptr, code_ptr, near, inside, part, num_positions, row, CHANNELS, BLOCK_O
    )
    inside = in_row & (x + 1 < WIDTH // 2)
    won_3, _ = _load_won(
        grad_ptr, code_ptr, near + 1, inside, part, num_positions, row, CHANNELS, BLOCK_O
    )
    return won_0, won_1, won_2, won_3


@triton.jit
def conv2_pool_relu_input_backward(
    grad_ptr,
    code_ptr,
    weight_ptr,
    grad_x_ptr,
    num_windows,
    num_positions,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Two pixels, a row of a 2x2 window: the upper or the lower, program_id(1) % 2.

    Each sees 3x3 of the 3x4 places around both.
    Windows are those of all pixels: at an odd side one more than are pooled.
    """
    columns: tl.constexpr = (WIDTH + 1) // 2
    per_image: tl.constexpr = (HEIGHT + 1) // 2 * columns
    window = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = window // per_image
    y = window % per_image // columns
    x = window % columns
    lower = tl.program_id(1) % 2
    inputs = tl.program_id(1) // 2 * BLOCK_I + tl.arange(0, BLOCK_I)
    left_sum = tl.zeros([BLOCK, BLOCK_I], tl.float32)
    right_sum = tl.zeros([BLOCK, BLOCK_I], tl.float32)
    for step in range(3 * (CHANNELS // BLOCK_O)):
        away = step % 3
        part = step // 3
        near_y = y + (lower + away + 1) // 2 - 1
        row = (lower + away + 1) % 2
        in_row = (window < num_windows) & (near_y >= 0) & (near_y < HEIGHT // 2)
        near = (sample * (HEIGHT // 2) + near_y) * (WIDTH // 2) + x
        won_0, won_1, won_2, won_3 = _load_row(
            grad_ptr, code_ptr, near, x, in_row, part, num_positions, row, WIDTH, CHANNELS, BLOCK_O
        )
        tap = 3 * (2 - away)
        channel = part * BLOCK_O + tl.arange(0, BLOCK_O)
        weight = _load_weight(weight_ptr, channel, inputs, tap + 2, INPUTS)
        left_sum = tl.dot(won_0, weight, left_sum, input_precision=PRECISION)
        right_sum = tl.dot(won_1, weight, right_sum, input_precision=PRECISION)
        weight = _load_weight(weight_ptr, channel, inputs, tap + 1, INPUTS)
        left_sum = tl.dot(won_1, weight, left_sum, input_precision=PRECISION)
        right_sum = tl.dot(won_2, weight, right_sum, input_precision=PRECISION)
        weight = _load_weight(weight_ptr, channel, inputs, tap, INPUTS)
        left_sum = tl.dot(won_2, weight, left_sum, input_precision=PRECISION)
        right_sum = tl.dot(won_3, weight, right_sum, input_precision=PRECISION)
    real = (window < num_windows) & (2 * y + lower < HEIGHT)
    first = (sample * HEIGHT + 2 * y + lower) * WIDTH + 2 * x
    at = grad_x_ptr + first[:, None] * INPUTS + inputs[None, :]
    tl.store(at, left_sum, mask=real[:, None])
    tl.store(at + INPUTS, right_sum, mask=(real & (2 * x + 1 < WIDTH))[:, None])


@triton.jit
def _add_taps(
    sums,
    won_0,
    won_1,
    x_ptr,
    sample,
    y,
    left,
    real,
    inputs,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Three taps' sums [O, I] with the shares of a row's two places: their gradients times x."""
    sum_0, sum_1, sum_2 = sums
    x = _load_pixels(x_ptr, sample, y, left, real, inputs, HEIGHT, WIDTH, INPUTS)
    sum_0 = tl.dot(won_0, x, sum_0, input_precision=PRECISION)
    x = _load_pixels(x_ptr, sample, y, left + 1, real, inputs, HEIGHT, WIDTH, INPUTS)
    sum_1 = tl.dot(won_0, x, sum_1, input_precision=PRECISION)
    sum_0 = tl.dot(won_1, x, sum_0, input_precision=PRECISION)
    x = _load_pixels(x_ptr, sample, y, left + 2, real, inputs, HEIGHT, WIDTH, INPUTS)
    sum_2 = tl.dot(won_0, x, sum_2, input_precision=PRECISION)
    sum_1 = tl.dot(won_1, x, sum_1, input_precision=PRECISION)
    x = _load_pixels(x_ptr, sample, y, left + 3, real, inputs, HEIGHT, WIDTH, INPUTS)
    return sum_0, sum_1, tl.dot(won_1, x, sum_2, input_precision=PRECISION)


@triton.jit
def conv2_pool_relu_weight_backward(
    grad_ptr,
    code_ptr,
    x_ptr,
    partial_ptr,
    num_positions,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Three taps, a row of the nine: program_id(1) % 3; a turn takes both rows of its windows.

    partial [programs, O 9 I + O] fp32: the weights', in channels-last memory, then the bias's.
    """
    tap_row = tl.program_id(1) % 3
    inputs = tl.program_id(1) // 3 * BLOCK_I + tl.arange(0, BLOCK_I)
    part = tl.program_id(2)
    sum_0 = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    sum_1 = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    sum_2 = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    bias_sum = tl.zeros([BLOCK_O, BLOCK], tl.float32)
    channel = part * BLOCK_O + tl.arange(0, BLOCK_O)
    groups: tl.constexpr = CHANNELS // LANES
    group = part * (BLOCK_O // LANES) + tl.arange(0, BLOCK_O // LANES)
    for step in range(2 * TURNS):
        first = (tl.program_id(0) + step // 2 * tl.num_programs(0)) * BLOCK
        row = step % 2
        position = first + tl.arange(0, BLOCK)
        real = position < num_positions
        sample, top, left = _corner(position, HEIGHT, WIDTH)
        at = grad_ptr + position[None, :] * CHANNELS + channel[:, None]
        grad = tl.load(at, mask=real[None, :], other=0.0)
        word = position[:, None] * groups + group[None, :]
        won = load_won(code_ptr, word, num_positions * groups, real[:, None], row)
        won_0 = keep_won_across(grad, won[0])
        won_1 = keep_won_across(grad, won[1])
        bias_sum += won_0.to(tl.float32) + won_1.to(tl.float32)
        y = top + tap_row + row
        sums = (sum_0, sum_1, sum_2)
        sum_0, sum_1, sum_2 = _add_taps(
            sums, won_0, won_1, x_ptr, sample, y, left, real, inputs, HEIGHT, WIDTH, INPUTS
        )
    weights: tl.constexpr = CHANNELS * 9 * INPUTS
    mine = partial_ptr + tl.program_id(0) * (weights + CHANNELS)
    at = mine + channel[:, None] * (9 * INPUTS) + tap_row * 3 * INPUTS + inputs[None, :]
    tl.store(at, sum_0)
    tl.store(at + INPUTS, sum_1)
    tl.store(at + 2 * INPUTS, sum_2)
    if tl.program_id(1) == 0:
        tl.store(mine + weights + channel, tl.sum(bias_sum, 1))


@triton.jit
def conv2_pool_relu_weight_backward_sum(
    partial_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    INPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """32 sums a program, in a fixed order: the same to the bit."""
    weights: tl.constexpr = CHANNELS * 9 * INPUTS
    place = tl.program_id(0) * LANES + tl.arange(0, LANES)
    total = tl.zeros([BLOCK, LANES], tl.float32)
    for first in range(0, PARTIALS, BLOCK):
        number = first + tl.arange(0, BLOCK)[:, None]
        at = partial_ptr + number * (weights + CHANNELS) + place[None, :]
        total += tl.load(at, mask=number < PARTIALS, other=0.0)
    if tl.program_id(0) * LANES < weights:
        tl.store(grad_weight_ptr + place, tl.sum(total, 0))
    else:
        tl.store(grad_bias_ptr + place - weights, tl.sum(total, 0))


def _sizes(
    x_BIHW: torch.Tensor, outputs: int, blocks: Blocks, fp32: Blocks
) -> tuple[Blocks, dict[str, int]]:
    """(the blocks that divide the layer, the kernels' constants)."""
    _, inputs, height, width = x_BIHW.shape
    most = fp32 if x_BIHW.dtype == torch.float32 else blocks
    chosen = Blocks(most.positions, gcd(inputs, most.inputs), gcd(outputs, most.outputs))
    sizes = {"HEIGHT": height, "WIDTH": width, "INPUTS": inputs, "CHANNELS": outputs}
    names = ("BLOCK", "BLOCK_I", "BLOCK_O")
    return chosen, sizes | dict(zip(names, chosen, strict=True))


def _last(tensor: torch.Tensor) -> torch.Tensor:
    """In channels-last memory."""
    return tensor.contiguous(memory_format=torch.channels_last)


def check_layer(x_BIHW: torch.Tensor, weight_OI33: torch.Tensor, bias_O: torch.Tensor) -> None:
    """ValueError with a sentence unless values, weights and bias fit each other and the kernels."""
    outputs, inputs = len(bias_O), weight_OI33.shape[1]
    check("x", x_BIHW, (*FLOATS, torch.float64), (None, inputs, None, None), x_BIHW)
    check("weight", weight_OI33, (torch.float32, torch.float64), (outputs, inputs, 3, 3), x_BIHW)
    check("bias", bias_O, (weight_OI33.dtype,), (outputs,), x_BIHW)
    check_channels(outputs)
    if inputs % 16 or max(inputs, outputs) > MOST_CHANNELS:
        what = f"{inputs} to {outputs} channels"
        fits = f"multiples of 16 to multiples of {launch.LANES}, up to {MOST_CHANNELS}"
        raise ValueError(f"{what} are not {fits}; leave this kernel off for them")


@torch.library.custom_op("tmnist::conv2_pool_relu", mutates_args=())
def _op(
    x_BIHW: torch.Tensor,
    weight_OI33: torch.Tensor,
    bias_O: torch.Tensor,
    rounded_OI33: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rounded_OI33`: the weight in x's type, which is computed with."""
    check_layer(x_BIHW, weight_OI33, bias_O)
    if not on_triton(x_BIHW):
        return conv2_pool_relu_reference(x_BIHW, rounded_OI33, bias_O)
    check("x", x_BIHW, FLOATS, (None, None, None, None), x_BIHW)
    check("the rounded weight", rounded_OI33, (x_BIHW.dtype,), tuple(weight_OI33.shape), x_BIHW)
    y_BOYX, code_3PG = _fake(x_BIHW, weight_OI33, bias_O, rounded_OI33)
    blocks, sizes = _sizes(x_BIHW, len(bias_O), FORWARD, FORWARD_FP32)
    tensors = (_last(x_BIHW), _last(rounded_OI33), bias_O, y_BOYX, code_3PG)
    num_positions = code_3PG.shape[1]
    grid = (triton.cdiv(num_positions, blocks.positions), len(bias_O) // blocks.outputs)
    start(conv2_pool_relu_forward, grid, *tensors, num_positions, **sizes)
    return y_BOYX, code_3PG


@_op.register_fake
def _fake(
    x_BIHW: torch.Tensor,
    weight_OI33: torch.Tensor,
    bias_O: torch.Tensor,
    rounded_OI33: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch_size, _, height, width = x_BIHW.shape
    return empty_pooled(x_BIHW, x_BIHW.dtype, (batch_size, bias_O.shape[0], height, width))


@torch.library.custom_op("tmnist::conv2_pool_relu_input_backward", mutates_args=())
def _input_backward_op(
    grad_BOYX: torch.Tensor,
    code_3PG: torch.Tensor,
    weight_OI33: torch.Tensor,
    height: int,
    width: int,
) -> torch.Tensor:
    given = (grad_BOYX, code_3PG, weight_OI33, height, width)
    if not on_triton(grad_BOYX):
        return conv2_pool_relu_input_backward_reference(*given)
    grad_x: torch.Tensor = _input_backward_fake(*given)
    blocks, sizes = _sizes(grad_x, len(weight_OI33), INPUT_BACKWARD, INPUT_BACKWARD_FP32)
    num_windows = len(grad_x) * ((height + 1) // 2) * ((width + 1) // 2)
    tensors = (_last(grad_BOYX), code_3PG, _last(weight_OI33), grad_x)
    grid = (triton.cdiv(num_windows, blocks.positions), 2 * (grad_x.shape[1] // blocks.inputs))
    counts = (num_windows, code_3PG.shape[1])
    start(conv2_pool_relu_input_backward, grid, *tensors, *counts, **sizes)
    return grad_x


@_input_backward_op.register_fake
def _input_backward_fake(
    grad_BOYX: torch.Tensor,
    code_3PG: torch.Tensor,
    weight_OI33: torch.Tensor,
    height: int,
    width: int,
) -> torch.Tensor:
    shape_BHWI = (grad_BOYX.shape[0], height, width, weight_OI33.shape[1])
    return grad_BOYX.new_empty(shape_BHWI).permute(0, 3, 1, 2)


@torch.library.custom_op("tmnist::conv2_pool_relu_weight_backward", mutates_args=())
def _weight_backward_op(
    grad_BOYX: torch.Tensor, code_3PG: torch.Tensor, x_BIHW: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    if not on_triton(grad_BOYX):
        return conv2_pool_relu_weight_backward_reference(grad_BOYX, code_3PG, x_BIHW, dtype)
    grad_weight, grad_bias = _weight_backward_fake(grad_BOYX, code_3PG, x_BIHW, dtype)
    outputs, inputs = grad_weight.shape[:2]
    blocks, sizes = _sizes(x_BIHW, outputs, WEIGHT_BACKWARD, WEIGHT_BACKWARD_FP32)
    num_positions = code_3PG.shape[1]
    programs, turns = share(x_BIHW, num_positions, blocks.positions, 1)
    num_sums = outputs * 9 * inputs + outputs
    partial = x_BIHW.new_empty((programs, num_sums), dtype=torch.float32)
    tensors = (_last(grad_BOYX), code_3PG, _last(x_BIHW), partial)
    grid = (programs, 3 * (inputs // blocks.inputs), outputs // blocks.outputs)
    start(conv2_pool_relu_weight_backward, grid, *tensors, num_positions, **sizes, TURNS=turns)
    sums = (partial, grad_weight, grad_bias)
    sizes = {"INPUTS": inputs, "CHANNELS": outputs, "BLOCK": 64, "PARTIALS": programs}
    start(conv2_pool_relu_weight_backward_sum, (num_sums // launch.LANES,), *sums, **sizes)
    return grad_weight, grad_bias


@_weight_backward_op.register_fake
def _weight_backward_fake(
    grad_BOYX: torch.Tensor, code_3PG: torch.Tensor, x_BIHW: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, inputs = grad_BOYX.shape[1], x_BIHW.shape[1]
    grad_weight_O33I = grad_BOYX.new_empty((outputs, 3, 3, inputs), dtype=dtype)
    return grad_weight_O33I.permute(0, 3, 1, 2), grad_BOYX.new_empty((outputs,), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x_BIHW, weight_OI33, _, rounded_OI33 = inputs
    ctx.save_for_backward(output[1], x_BIHW, rounded_OI33)
    ctx.set_materialize_grads(False)
    ctx.dtype = weight_OI33.dtype


def _differentiate(ctx: Any, grad_BOYX: torch.Tensor, _: None) -> tuple[object, ...]:
    code_3PG, x_BIHW, rounded_OI33 = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = _input_backward_op(grad_BOYX, code_3PG, rounded_OI33, *x_BIHW.shape[2:])
    return grad_x, *_weight_backward_op(grad_BOYX, code_3PG, x_BIHW, ctx.dtype), None


_op.register_autograd(_differentiate, setup_context=_save)


def conv2_pool_relu(
    x_BIHW: torch.Tensor, weight_OI33: torch.Tensor, bias_O: torch.Tensor
) -> torch.Tensor:
    """relu(max_pool2d(conv2d(x, weight, padding=1), 2) + bias).

    Args:
        x_BIHW: fp32, bf16 or fp16, which is the type of the products, too; sums are fp32. Read in
            channels-last memory, so copied where it lies otherwise. I a multiple of 16, up to 256.
        weight_OI33, bias_O: fp32; O a multiple of 32, up to 256. (On a CPU all by the reference,
            also fp64.)
    Returns:
        [B, O, H // 2, W // 2] of x's type in channels-last memory; differentiable in all three.
    Raises:
        ValueError: a shape, type or device does not fit.
    """
    rounded_OI33 = weight_OI33.detach().to(x_BIHW.dtype)  # once, for forward and backward
    y_BOYX: torch.Tensor = _op(x_BIHW, weight_OI33, bias_O, rounded_OI33)[0]
    return y_BOYX
