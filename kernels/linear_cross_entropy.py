"""The last linear layer and its loss, forward and backward: no logits are ever written.

    x = hidden weight' + bias, in fp32
    loss = logsumexp(x) - (1 - s) x[label] - s mean(x)
    unit = softmax(x) - (1 - s) [k = label] - s / K

It gives the mean loss and the number of right answers. The same launch leaves the gradients: of
hidden (unit weight), a sample's own, so that fp16 loses nothing; and of weight and bias, sums over
a program's samples that a small second launch adds up in a fixed order. The backward multiplies all
three by the incoming gradient (GradScaler's scale) over B, read on the device.

Where hidden is the result of a linear layer and its ReLU, the same launch may mask hidden's
gradient by that ReLU, 0 where hidden is not above 0, and sum it over the samples: the gradient of
that layer's bias, for which PyTorch starts a launch of its own.

Rounding: the weight is rounded to hidden's type, as autocast does; products are summed in fp32, and
bias, logits, loss and bias gradient stay fp32, where autocast rounds the logits. unit is rounded to
hidden's type for its two products, and so is, as by autocast, the gradient of the bias before. A
label that is no class makes the loss NaN. Of equal logits the first is the answer.

A program has a chunk of hidden's width: it makes that chunk's gradients, from logits that it
computes in full. For up to 128 classes a chunk is 64 numbers, so at D = 128 logits are computed
twice: 24 kFLOP a sample more, and twice the programs.

Bytes a sample (D = 128, bf16): forward reads 256 + 1 and writes 256, backward reads 256 and writes
256. Besides, forward writes and reads 48 KB a multiprocessor of partial sums (K = 94): they stay in
the second-level cache.

Shapes: B samples, D numbers of the hidden layer, K classes, P programs.
"""

from typing import Any

import torch
import triton
from torch.nn import functional
from triton import language as tl

from kernels.launch import FLOATS, check, on_triton, share, start
from kernels.softmax_cross_entropy import softmax_cross_entropy_reference

ROWS = 16
"""Samples a program of the forward takes at once."""
SUMS = 64 * 128
"""Weight gradients that a program sums up in its registers: more would spill in fp32."""
WARPS = 8
DEPTH = 16
"""Numbers of hidden that enter the logits at once."""
MOST_HIDDEN, MOST_CLASSES = 512, 256
"""Above, the logits that chunks compute again cost more than they save; labels are uint8."""
BLOCK = 1024
"""Numbers that a program of the backward takes of each gradient."""
SUM_BLOCK, SUM_WIDTH = 64, 32
"""Partial sums that a program of the sums takes at once, and numbers of each."""
PRECISION = tl.constexpr("tf32x3")
"""Of products of fp32 values: three products in TF32, which together are as good as one in fp32."""
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def linear_cross_entropy_reference(
    hidden_BD: torch.Tensor,
    weight_KD: torch.Tensor,
    bias_K: torch.Tensor,
    label_B: torch.Tensor,
    smoothing: float,
    after_relu: bool = False,
) -> Found:
    """(mean loss, right answers, and what is differentiated for a gradient of B of that mean).

    That is hidden [B, D], weight [K, D], bias [K], and hidden's summed over the samples [D].
    """
    exact = torch.promote_types(hidden_BD.dtype, torch.float32)
    rounded_KD = weight_KD.to(hidden_BD.dtype).to(exact)
    logits_BK = functional.linear(hidden_BD.to(exact), rounded_KD, bias_K.to(exact))
    loss, correct, unit_BK = softmax_cross_entropy_reference(logits_BK, label_B, smoothing)
    unit_hidden_BD = unit_BK @ rounded_KD
    if after_relu:
        unit_hidden_BD = unit_hidden_BD.masked_fill(hidden_BD <= 0, 0)
    unit_weight_KD = unit_BK.T @ hidden_BD.to(exact)
    units = (unit_hidden_BD.to(hidden_BD.dtype), unit_weight_KD, unit_BK.sum(0))
    return loss, correct, *units, unit_hidden_BD.sum(0)


@triton.jit
def _rows(start_ptr, row, place, num_rows, WIDTH: tl.constexpr):
    """[rows, places] of a matrix of rows of WIDTH; 0 outside."""
    mask = (row < num_rows)[:, None] & (place < WIDTH)[None, :]
    return tl.load(start_ptr + row[:, None] * WIDTH + place[None, :], mask=mask, other=0.0)


@triton.jit
def _logits(
    hidden_ptr,
    weight_ptr,
    bias,
    sample,
    num_samples,
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """[ROWS, COLUMNS] fp32; 0 for columns that are no class."""
    column = tl.arange(0, COLUMNS)
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, WIDTH, DEPTH):
        place = first + tl.arange(0, DEPTH)
        hidden = _rows(hidden_ptr, sample, place, num_samples, WIDTH)
        weight = _rows(weight_ptr, column, place, CLASSES, WIDTH).to(hidden.dtype)
        x = tl.dot(hidden, tl.trans(weight), x, input_precision=PRECISION)
    return x + bias[None, :]


@triton.jit
def _softmax_loss(x, label, SMOOTHING: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr):
    """(loss, whether the answer is right, unit [ROWS, COLUMNS]) of each row of logits."""
    column = tl.arange(0, COLUMNS)[None, :]
    shown = tl.where(column < CLASSES, x, float("-inf"))
    highest = tl.max(shown, 1)
    power = tl.exp(shown - highest[:, None])
    total = tl.sum(power, 1)
    chosen = column == label[:, None]
    picked = tl.sum(tl.where(chosen, x, 0.0), 1)
    mean = tl.sum(x, 1) / CLASSES
    loss = tl.log(total) + highest - (1 - SMOOTHING) * picked - SMOOTHING * mean
    loss = tl.where(label < CLASSES, loss, float("nan"))
    answer = tl.min(tl.where(shown == highest[:, None], column, COLUMNS), 1)
    unit = power / total[:, None] - tl.where(chosen, 1 - SMOOTHING, 0.0) - SMOOTHING / CLASSES
    return loss, answer == label, tl.where(column < CLASSES, unit, 0.0)


@triton.jit
def linear_cross_entropy_forward(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    label_ptr,
    unit_hidden_ptr,
    partial_ptr,
    rest_ptr,
    num_samples,
    SMOOTHING: tl.constexpr,
    AFTER_RELU: tl.constexpr,
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
    TURNS: tl.constexpr,
):
    """partial [P, D, K + 1] fp32: weight, and hidden; rest [P, K + 2] fp32: bias, loss, right."""
    column = tl.arange(0, COLUMNS)
    place = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    bias = tl.load(bias_ptr + column, mask=column < CLASSES, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([CHUNK, COLUMNS], tl.float32)
    hidden_sum = tl.zeros([CHUNK], tl.float32)
    bias_sum = tl.zeros([COLUMNS], tl.float32)
    loss_sum = tl.zeros([ROWS], tl.float32)
    correct_sum = tl.zeros([ROWS], tl.float32)
    for turn in range(TURNS):
        sample = (tl.program_id(0) + turn * tl.num_programs(0)) * ROWS + tl.arange(0, ROWS)
        real = sample < num_samples
        x = _logits(
            hidden_ptr, weight_ptr, bias, sample, num_samples, WIDTH, CLASSES, COLUMNS, ROWS, DEPTH
        )
        label = tl.load(label_ptr + sample, mask=real, other=0).to(tl.int32)
        loss, right, unit = _softmax_loss(x, label, SMOOTHING, CLASSES, COLUMNS)
        unit = tl.where(real[:, None], unit, 0.0)
        loss_sum += tl.where(real, loss, 0.0)
        correct_sum += tl.where(real & right, 1.0, 0.0)
        bias_sum += tl.sum(unit, 0)
        hidden = _rows(hidden_ptr, sample, place, num_samples, WIDTH)
        weight = _rows(weight_ptr, column, place, CLASSES, WIDTH).to(hidden.dtype)
        unit = unit.to(hidden.dtype)
        unit_hidden = tl.dot(unit, weight, input_precision=PRECISION)
        if AFTER_RELU:
            unit_hidden = tl.where(hidden.to(tl.float32) <= 0, 0.0, unit_hidden)
        hidden_sum += tl.sum(unit_hidden, 0)
        at = unit_hidden_ptr + sample[:, None] * WIDTH + place[None, :]
        tl.store(at, unit_hidden, mask=real[:, None] & (place < WIDTH)[None, :])
        weight_sum = tl.dot(tl.trans(hidden), unit, weight_sum, input_precision=PRECISION)
    mine = partial_ptr + (tl.program_id(0) * WIDTH + place) * (CLASSES + 1)
    mask = (place < WIDTH)[:, None] & (column < CLASSES)[None, :]
    tl.store(mine[:, None] + column[None, :], weight_sum, mask=mask)
    tl.store(mine + CLASSES, hidden_sum, mask=place < WIDTH)
    if tl.program_id(1) == 0:
        rest_ptr += tl.program_id(0) * (CLASSES + 2)
        tl.store(rest_ptr + column, bias_sum, mask=column < CLASSES)
        tl.store(rest_ptr + CLASSES, tl.sum(loss_sum, 0) / num_samples)
        tl.store(rest_ptr + CLASSES + 1, tl.sum(correct_sum, 0))


@triton.jit
def _added(partial_ptr, stride, place, length, BLOCK: tl.constexpr, PARTIALS: tl.constexpr):
    """The sum of the partial sums' numbers at `place`, in a fixed order: the same to the bit."""
    total = tl.zeros([BLOCK, place.shape[0]], tl.float32)
    for first in range(0, PARTIALS, BLOCK):
        number = first + tl.arange(0, BLOCK)
        mask = (number < PARTIALS)[:, None] & (place < length)[None, :]
        at = partial_ptr + number[:, None] * stride + place[None, :]
        total += tl.load(at, mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def linear_cross_entropy_forward_sum(
    partial_ptr,
    rest_ptr,
    loss_ptr,
    correct_ptr,
    unit_weight_ptr,
    unit_bias_ptr,
    unit_sum_ptr,
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    SUM_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Programs for each number of hidden, and for all that is no weight."""
    row = tl.program_id(0)
    place = tl.program_id(1) * SUM_WIDTH + tl.arange(0, SUM_WIDTH)
    if row < WIDTH:
        length: tl.constexpr = CLASSES + 1
        mine = partial_ptr + row * length
        total = _added(mine, WIDTH * length, place, length, BLOCK, PARTIALS)
        tl.store(unit_weight_ptr + place * WIDTH + row, total, mask=place < CLASSES)
        tl.store(unit_sum_ptr + place * 0 + row, total, mask=place == CLASSES)
    else:
        total = _added(rest_ptr, CLASSES + 2, place, CLASSES + 2, BLOCK, PARTIALS)
        tl.store(unit_bias_ptr + place, total, mask=place < CLASSES)
        tl.store(loss_ptr + place * 0, total, mask=place == CLASSES)
        tl.store(correct_ptr + place * 0, total, mask=place == CLASSES + 1)


@triton.jit
def _scale(unit_ptr, grad_ptr, factor, place, num_elements):
    mask = place < num_elements
    unit = tl.load(unit_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_ptr + place, unit * factor, mask=mask)


@triton.jit
def linear_cross_entropy_backward(
    unit_hidden_ptr,
    unit_weight_ptr,
    unit_bias_ptr,
    unit_sum_ptr,
    grad_loss_ptr,
    grad_hidden_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    grad_sum_ptr,
    num_samples,
    num_hidden,
    num_weights,
    num_classes,
    width,
    BLOCK: tl.constexpr,
):
    """A block of each gradient, where it has so many."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(grad_loss_ptr).to(tl.float32) / num_samples
    _scale(unit_hidden_ptr, grad_hidden_ptr, factor, place, num_hidden)
    _scale(unit_weight_ptr, grad_weight_ptr, factor, place, num_weights)
    _scale(unit_bias_ptr, grad_bias_ptr, factor, place, num_classes)
    mask = place < width
    grad_sum = tl.load(unit_sum_ptr + place, mask=mask, other=0.0) * factor
    grad_sum = grad_sum.to(grad_hidden_ptr.dtype.element_ty)
    tl.store(grad_sum_ptr + place, grad_sum, mask=mask)


def _check(
    hidden_BD: torch.Tensor,
    weight_KD: torch.Tensor,
    bias_K: torch.Tensor,
    label_B: torch.Tensor,
    relu_bias_D: torch.Tensor | None,
) -> None:
    types = (*FLOATS, torch.float64)
    check("hidden", hidden_BD, types, (None, None), hidden_BD)
    num_samples, width = hidden_BD.shape
    check("weight", weight_KD, types, (None, width), hidden_BD)
    check("bias", bias_K, (weight_KD.dtype,), (len(weight_KD),), hidden_BD)
    check("label", label_B, (torch.uint8,), (num_samples,), hidden_BD)
    if relu_bias_D is not None:
        check("relu_bias", relu_bias_D, types, (width,), hidden_BD)
    if width > MOST_HIDDEN or len(weight_KD) > MOST_CLASSES:
        raise ValueError(
            f"a layer of {width} numbers and {len(weight_KD)} classes is too large; give at most "
            f"{MOST_HIDDEN} and {MOST_CLASSES}, or use softmax_cross_entropy"
        )


@torch.library.custom_op("tmnist::linear_cross_entropy", mutates_args=())
def _op(
    hidden_BD: torch.Tensor,
    weight_KD: torch.Tensor,
    bias_K: torch.Tensor,
    label_B: torch.Tensor,
    smoothing: float,
    relu_bias_D: torch.Tensor | None = None,
) -> Found:
    _check(hidden_BD, weight_KD, bias_K, label_B, relu_bias_D)
    after_relu = relu_bias_D is not None
    if not on_triton(hidden_BD):
        return linear_cross_entropy_reference(
            hidden_BD, weight_KD, bias_K, label_B, smoothing, after_relu
        )
    check("hidden", hidden_BD, FLOATS, (None, None), hidden_BD)
    check("weight", weight_KD, FLOATS, (None, None), hidden_BD)
    num_samples, width = hidden_BD.shape
    num_classes = len(weight_KD)
    found: Found = _fake(hidden_BD, weight_KD, bias_K, label_B, smoothing)
    loss, correct, unit_hidden_BD, *units = found
    columns = max(16, triton.next_power_of_2(num_classes))
    chunk = max(16, min(triton.next_power_of_2(width), SUMS // columns))
    programs, turns = share(hidden_BD, num_samples, ROWS, 1)
    partial_PDK1 = loss.new_empty((programs, width, num_classes + 1))
    rest_PK2 = loss.new_empty((programs, num_classes + 2))
    given = (hidden_BD.contiguous(), weight_KD.contiguous(), bias_K, label_B.contiguous())
    made = (unit_hidden_BD, partial_PDK1, rest_PK2)
    layer = {"WIDTH": width, "CLASSES": num_classes}
    blocks = {"COLUMNS": columns, "ROWS": ROWS, "CHUNK": chunk, "DEPTH": DEPTH, "TURNS": turns}
    asked = {"SMOOTHING": smoothing, "AFTER_RELU": after_relu}
    constants = {**asked, **layer, **blocks, "num_warps": WARPS}
    grid = (programs, triton.cdiv(width, chunk))
    start(linear_cross_entropy_forward, grid, *given, *made, num_samples, **constants)
    sums = (partial_PDK1, rest_PK2, loss, correct, *units)
    blocks = {"SUM_WIDTH": SUM_WIDTH, "BLOCK": SUM_BLOCK, "PARTIALS": programs}
    grid = (width + 1, triton.cdiv(num_classes + 2, SUM_WIDTH))
    start(linear_cross_entropy_forward_sum, grid, *sums, **layer, **blocks)
    return found


@_op.register_fake
def _fake(
    hidden_BD: torch.Tensor,
    weight_KD: torch.Tensor,
    bias_K: torch.Tensor,
    label_B: torch.Tensor,
    smoothing: float,
    relu_bias_D: torch.Tensor | None = None,
) -> Found:
    loss, correct, unit_weight_KD, unit_bias_K, unit_sum_D = (
        hidden_BD.new_empty(shape, dtype=torch.promote_types(hidden_BD.dtype, torch.float32))
        for shape in ((), (), weight_KD.shape, bias_K.shape, hidden_BD.shape[1:])
    )
    unit_hidden_BD = hidden_BD.new_empty(hidden_BD.shape)
    return loss, correct, unit_hidden_BD, unit_weight_KD, unit_bias_K, unit_sum_D


@torch.library.custom_op("tmnist::linear_cross_entropy_backward", mutates_args=())
def _backward_op(
    unit_hidden_BD: torch.Tensor,
    unit_weight_KD: torch.Tensor,
    unit_bias_K: torch.Tensor,
    unit_sum_D: torch.Tensor,
    grad_loss: torch.Tensor,
    dtype: torch.dtype,
    relu_dtype: torch.dtype,
) -> Gradients:
    """Gradients of hidden, of weight and bias in `dtype`, and of relu_bias in `relu_dtype`."""
    units = (unit_hidden_BD, unit_weight_KD, unit_bias_K, unit_sum_D)
    grads: Gradients = _backward_fake(*units, grad_loss, dtype, relu_dtype)
    if not on_triton(unit_hidden_BD):
        factor = grad_loss / len(unit_hidden_BD)
        for unit, grad in zip(units, grads, strict=True):
            grad.copy_(unit * factor)
        grads[3].copy_((unit_sum_D * factor).to(unit_hidden_BD.dtype))
        return grads
    lengths = [unit.numel() for unit in units]
    grid = (triton.cdiv(max(lengths), BLOCK),)
    numbers = (len(unit_hidden_BD), *lengths)
    start(linear_cross_entropy_backward, grid, *units, grad_loss, *grads, *numbers, BLOCK=BLOCK)
    return grads


@_backward_op.register_fake
def _backward_fake(
    unit_hidden_BD: torch.Tensor,
    unit_weight_KD: torch.Tensor,
    unit_bias_K: torch.Tensor,
    unit_sum_D: torch.Tensor,
    grad_loss: torch.Tensor,
    dtype: torch.dtype,
    relu_dtype: torch.dtype,
) -> Gradients:
    grad_weight_KD = torch.empty_like(unit_weight_KD, dtype=dtype)
    grad_bias_K = torch.empty_like(unit_bias_K, dtype=dtype)
    grad_sum_D = torch.empty_like(unit_sum_D, dtype=relu_dtype)
    return torch.empty_like(unit_hidden_BD), grad_weight_KD, grad_bias_K, grad_sum_D


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.set_materialize_grads(False)
    weight_KD, relu_bias_D = inputs[1], inputs[5]
    ctx.dtypes = weight_KD.dtype, (weight_KD if relu_bias_D is None else relu_bias_D).dtype
    ctx.has_relu = relu_bias_D is not None


def _differentiate(ctx: Any, grad_loss: torch.Tensor, *_: None) -> tuple[object, ...]:
    *grads, grad_sum_D = _backward_op(*ctx.saved_tensors, grad_loss, *ctx.dtypes)
    return *grads, None, None, grad_sum_D if ctx.has_relu else None


_op.register_autograd(_differentiate, setup_context=_save)


def linear_cross_entropy(
    hidden_BD: torch.Tensor,
    weight_KD: torch.Tensor,
    bias_K: torch.Tensor,
    label_B: torch.Tensor,
    smoothing: float,
    relu_bias_D: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss, right answers) of the logits hidden weight' + bias, fp32 scalars.

    The loss is differentiable in hidden, weight, bias and relu_bias.

    Args:
        hidden_BD: fp32, bf16 or fp16, that of the products. (On a CPU, by the reference, also
            fp64.) D is at most 512.
        weight_KD, bias_K: of one of these types, both of the same. K is at most 256.
        label_B: uint8.
        smoothing: share of the target spread over all classes, 0..1; compiled into the kernel.
        relu_bias_D: the bias of the linear layer whose ReLU made hidden. It is not added here: it
            gets its gradient here, and hidden's is the one before that ReLU. That layer must then
            neither mask it again nor differentiate its bias; see linear_relu.
    Raises:
        ValueError: a shape, type or device does not fit.
    """
    loss, correct, *_ = _op(hidden_BD, weight_KD, bias_K, label_B, smoothing, relu_bias_D)
    return loss, correct.detach()
