"""Softmax cross entropy with label smoothing, in one pass over the logits.

It gives the mean loss, its gradient and the number of right answers:

    loss = logsumexp(x) - (1 - s) x[label] - s mean(x)
    gradient = softmax(x) - (1 - s) [k = label] - s / K

The forward leaves the gradient of a sample's own loss, at most 1 in size, so that fp16 loses
nothing; the backward multiplies it by the incoming gradient (GradScaler's scale) over B, read on
the device. A label that is no class makes the loss NaN. Of equal logits the first is the answer.

Bytes a sample (K = 94, bf16): forward reads 188 + 1 and writes 188 + 8, backward reads 188 and
writes 188.

Shapes: B samples, K classes.
"""

from typing import Any

import torch
import triton
from torch.nn import functional
from triton import language as tl

from kernels.launch import FLOATS, check, on_triton, start

ROWS = 4
"""Samples a program of the forward takes."""
BLOCK = 1024
"""Numbers that a program of the sums and of the backward takes at once."""


def softmax_cross_entropy_reference(
    logits_BK: torch.Tensor, label_B: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean loss, right answers, the gradient of each sample's own loss in the logits' type)."""
    x_BK = logits_BK.double() if logits_BK.dtype == torch.float64 else logits_BK.float()
    num_classes = x_BK.shape[1]
    chosen_B = label_B.long()
    valid_B = chosen_B < num_classes
    one_hot_BK = functional.one_hot(chosen_B.clamp(max=num_classes - 1), num_classes)
    target_BK = one_hot_BK * (1 - smoothing) + smoothing / num_classes
    loss_B = torch.where(valid_B, -(target_BK * x_BK.log_softmax(1)).sum(1), torch.nan)
    correct_B = (x_BK.argmax(1) == chosen_B).to(x_BK.dtype)
    return loss_B.mean(), correct_B.sum(), (x_BK.softmax(1) - target_BK).to(logits_BK.dtype)


@triton.jit
def softmax_cross_entropy_forward(
    logits_ptr,
    label_ptr,
    stats_ptr,
    unit_ptr,
    num_samples,
    row_stride,
    SMOOTHING: tl.constexpr,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """stats [2, B] fp32: each sample's part of the mean loss, and 1 where it is right."""
    sample = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = sample < num_samples
    column = tl.arange(0, COLUMNS)[None, :]
    mask = real[:, None] & (column < CLASSES)
    at = logits_ptr + sample[:, None] * row_stride + column
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    shown = tl.where(column < CLASSES, x, float("-inf"))
    highest = tl.max(shown, 1)
    power = tl.exp(shown - highest[:, None])
    total = tl.sum(power, 1)
    label = tl.load(label_ptr + sample, mask=real, other=0).to(tl.int32)
    chosen = column == label[:, None]
    picked = tl.sum(tl.where(chosen, x, 0.0), 1)
    mean = tl.sum(x, 1) / CLASSES
    loss = tl.log(total) + highest - (1 - SMOOTHING) * picked - SMOOTHING * mean
    loss = tl.where(label < CLASSES, loss, float("nan"))
    answer = tl.min(tl.where(shown == highest[:, None], column, COLUMNS), 1)
    tl.store(stats_ptr + sample, loss / num_samples, mask=real)
    tl.store(stats_ptr + num_samples + sample, (answer == label).to(tl.float32), mask=real)
    unit = power / total[:, None] - tl.where(chosen, 1 - SMOOTHING, 0.0) - SMOOTHING / CLASSES
    tl.store(unit_ptr + sample[:, None] * CLASSES + column, unit, mask=mask)


@triton.jit
def softmax_cross_entropy_forward_sum(
    stats_ptr, loss_ptr, correct_ptr, num_samples, BLOCK: tl.constexpr, TURNS: tl.constexpr
):
    """One program, in a fixed order: the sums are the same to the bit."""
    loss = tl.zeros([BLOCK], tl.float32)
    correct = tl.zeros([BLOCK], tl.float32)
    for turn in range(TURNS):
        sample = turn * BLOCK + tl.arange(0, BLOCK)
        mask = sample < num_samples
        loss += tl.load(stats_ptr + sample, mask=mask, other=0.0)
        correct += tl.load(stats_ptr + num_samples + sample, mask=mask, other=0.0)
    tl.store(loss_ptr, tl.sum(loss, 0))
    tl.store(correct_ptr, tl.sum(correct, 0))


@triton.jit
def softmax_cross_entropy_backward(
    unit_ptr, grad_loss_ptr, grad_ptr, num_samples, num_elements, BLOCK: tl.constexpr
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < num_elements
    factor = tl.load(grad_loss_ptr).to(tl.float32) / num_samples
    unit = tl.load(unit_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_ptr + place, unit * factor, mask=mask)


@torch.library.custom_op("tmnist::softmax_cross_entropy", mutates_args=())
def _op(
    logits_BK: torch.Tensor, label_B: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check("logits", logits_BK, (*FLOATS, torch.float64), (None, None), logits_BK)
    num_samples, num_classes = logits_BK.shape
    check("label", label_B, (torch.uint8,), (num_samples,), logits_BK)
    if not on_triton(logits_BK):
        return softmax_cross_entropy_reference(logits_BK, label_B, smoothing)
    check("logits", logits_BK, FLOATS, (None, None), logits_BK)
    if logits_BK.stride(1) != 1:
        logits_BK = logits_BK.contiguous()
    stats_2B = logits_BK.new_empty((2, num_samples), dtype=torch.float32)
    loss, correct, unit_BK = _fake(logits_BK, label_B, smoothing)
    given = (logits_BK, label_B.contiguous(), stats_2B, unit_BK, num_samples, logits_BK.stride(0))
    columns = max(16, triton.next_power_of_2(num_classes))
    sizes = {"CLASSES": num_classes, "COLUMNS": columns, "ROWS": ROWS}
    grid = (triton.cdiv(num_samples, ROWS),)
    start(softmax_cross_entropy_forward, grid, *given, SMOOTHING=smoothing, **sizes)
    sums = (stats_2B, loss, correct, num_samples)
    sizes = {"BLOCK": BLOCK, "TURNS": triton.cdiv(num_samples, BLOCK)}
    start(softmax_cross_entropy_forward_sum, (1,), *sums, **sizes)
    return loss, correct, unit_BK


@_op.register_fake
def _fake(
    logits_BK: torch.Tensor, label_B: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if logits_BK.dtype == torch.float64 else torch.float32
    loss = logits_BK.new_empty((), dtype=dtype)
    correct = logits_BK.new_empty((), dtype=dtype)
    return loss, correct, logits_BK.new_empty(logits_BK.shape)


@torch.library.custom_op("tmnist::softmax_cross_entropy_backward", mutates_args=())
def _backward_op(unit_BK: torch.Tensor, grad_loss: torch.Tensor) -> torch.Tensor:
    if not on_triton(unit_BK):
        return (unit_BK * (grad_loss / len(unit_BK))).to(unit_BK.dtype)
    grad_BK = torch.empty_like(unit_BK)
    num_elements = unit_BK.numel()
    given = (unit_BK, grad_loss, grad_BK, len(unit_BK), num_elements)
    grid = (triton.cdiv(num_elements, BLOCK),)
    start(softmax_cross_entropy_backward, grid, *given, BLOCK=BLOCK)
    return grad_BK


@_backward_op.register_fake
def _backward_fake(unit_BK: torch.Tensor, grad_loss: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(unit_BK)


def _save(ctx: Any, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # of outputs that have none: a launch each
    ctx.save_for_backward(output[2])


def _differentiate(ctx: Any, grad_loss: torch.Tensor, *_: None) -> tuple[object, ...]:
    (unit_BK,) = ctx.saved_tensors
    return _backward_op(unit_BK, grad_loss), None, None


_op.register_autograd(_differentiate, setup_context=_save)


def softmax_cross_entropy(
    logits_BK: torch.Tensor, label_B: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss, right answers), fp32 scalars; the loss is differentiable in the logits.

    Args:
        logits_BK: fp32, bf16 or fp16. (On a CPU, by the reference, also fp64.)
        label_B: uint8.
        smoothing: share of the target spread over all classes, 0..1; compiled into the kernel.
    Raises:
        ValueError: a shape, type or device does not fit.
    """
    loss, correct, _ = _op(logits_BK, label_B, smoothing)
    return loss, correct.detach()
