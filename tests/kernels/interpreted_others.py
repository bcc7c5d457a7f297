"""All other kernels in Triton's interpreter: losses, the head, gather_warp, adamw, against float64.

Run by TRITON_INTERPRET=1 pytest tests/kernels/interpreted_others.py.
"""

import pytest
import torch
from torch.nn import functional

from kernels import adamw as optimiser
from kernels import cpu, launch
from kernels import gather_warp as gather
from kernels import linear_cross_entropy as head_file
from kernels import softmax_cross_entropy as loss_file
from tests.kernels.interpreting import LAUNCHED, UNIT, close, poisoned_and_recorded

__all__ = ["poisoned_and_recorded"]  # a fixture of every test


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
@pytest.mark.parametrize("batch_size, num_classes", [(1, 94), (37, 94), (5, 8), (8, 128), (3, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_softmax_cross_entropy(
    dtype: torch.dtype, batch_size: int, num_classes: int, smoothing: float
) -> None:
    wide = (4 * torch.randn(batch_size, num_classes + 3)).to(dtype)
    logits = wide[:, :num_classes].detach()  # rows lie further apart than they are long
    logits.requires_grad_()
    label = torch.randint(num_classes, (batch_size,), dtype=torch.uint8)
    twin = logits.detach().double().requires_grad_()
    wanted = functional.cross_entropy(twin, label.long(), label_smoothing=smoothing)
    scale = 1024.0 if dtype == torch.float16 else 3.0
    loss, correct = loss_file.softmax_cross_entropy(logits, label, smoothing)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    first_best = (twin == twin.amax(1, keepdim=True)).int().argmax(1)
    assert correct.item() == (first_best == label).sum()
    (scale * loss).backward()
    (scale * wanted).backward()
    assert logits.grad is not None and twin.grad is not None and logits.grad.dtype == dtype
    close(logits.grad, twin.grad, dtype, scale=scale / batch_size, units=2)  # rounded twice
    assert logits.grad.double().sum(1).abs().max() <= num_classes * UNIT[dtype] * scale / batch_size


def test_a_label_that_is_no_class_and_a_nan_reach_the_loss() -> None:
    logits = torch.randn(3, 8)
    label = torch.tensor([1, 8, 2], dtype=torch.uint8)
    assert loss_file.softmax_cross_entropy(logits, label, 0.05)[0].isnan()
    logits[0, 3] = torch.nan
    assert loss_file.softmax_cross_entropy(logits, label.clamp(max=7), 0.05)[0].isnan()
    ties = torch.zeros(2, 8)
    _, correct = loss_file.softmax_cross_entropy(ties, torch.tensor([0, 1], dtype=torch.uint8), 0.0)
    assert correct == 1, "of equal logits the first is the answer"


HEADS = [(1, 64, 94), (37, 128, 94), (5, 20, 8), (19, 96, 128), (3, 44, 200)]
"""B, D, K: one and several turns and chunks, sizes that fill no block, the widest classes."""


@pytest.mark.parametrize("number, head", enumerate(HEADS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_cross_entropy(dtype: torch.dtype, number: int, head: tuple[int, int, int]) -> None:
    """Each size with smoothing in one of the types, and then as after a linear layer and its ReLU;
    the next size in the other type."""
    batch_size, width, num_classes = head
    smoothing = 0.1 if (number % 2 == 1) == (dtype == torch.float32) else 0.0
    wide = torch.randn(batch_size, width + 3).to(dtype)
    relu_bias = torch.zeros(width, dtype=dtype).requires_grad_() if smoothing > 0 else None
    if relu_bias is not None:
        wide.relu_()
    hidden = wide[:, :width].detach().requires_grad_()  # rows lie further apart than they are long
    weight = (3 * torch.randn(num_classes, width) / width**0.5).requires_grad_()
    bias = torch.randn(num_classes).requires_grad_()
    label = torch.randint(num_classes, (batch_size,), dtype=torch.uint8)
    rounded = weight.detach().to(dtype)
    twins = [t.detach().double().requires_grad_() for t in (hidden, rounded, bias)]
    logits = functional.linear(*twins)
    wanted = functional.cross_entropy(logits, label.long(), label_smoothing=smoothing)
    scale = 1024.0 if dtype == torch.float16 else 3.0
    loss, correct = head_file.linear_cross_entropy(
        hidden, weight, bias, label, smoothing, relu_bias
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert correct.item() == (logits.argmax(1) == label).sum()
    (scale * loss).backward()
    (scale * wanted).backward()
    ours = [hidden, weight, bias]
    if relu_bias is not None:
        assert (hidden == 0).any() and twins[0].grad is not None
        twins[0].grad *= hidden > 0
        ours.append(relu_bias)
        twins.append(torch.empty(width, dtype=torch.float64))
        twins[3].grad = twins[0].grad.sum(0)
    chosen = functional.one_hot(label.long(), num_classes) * (1 - smoothing)
    unit = (logits.detach().softmax(1) - chosen - smoothing / num_classes).abs()
    hidden_size = unit @ rounded.double().abs()
    sizes = [hidden_size, unit.T @ hidden.detach().double().abs(), unit.sum(0), hidden_size.sum(0)]
    for our, twin, size in zip(ours, twins, sizes[: len(ours)], strict=True):
        assert our.grad is not None and twin.grad is not None and our.grad.dtype == our.dtype
        largest = float(size.max()) * scale / batch_size
        rounded_unit = UNIT[dtype] / 4e-6 if dtype == torch.float16 and our is not bias else 1.0
        close(our.grad, twin.grad, our.dtype, scale=largest * rounded_unit, units=2)


def test_many_samples_of_few_programs_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns beyond the first, a last one that is partly filled, and partial sums of several."""
    monkeypatch.setattr(launch, "num_processors", lambda tensor: 3)
    hidden, label = torch.randn(16 * 7 + 5, 20), torch.zeros(16 * 7 + 5, dtype=torch.uint8)
    weight, bias = torch.randn(9, 20), torch.randn(9)
    found = head_file._op(hidden, weight, bias, label, 0.1, bias.new_zeros(20))
    wanted = head_file.linear_cross_entropy_reference(hidden, weight, bias, label, 0.1, True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("place", ["hidden", "weight", "bias", "label"])
def test_what_is_no_number_or_no_class_reaches_the_heads_loss(place: str) -> None:
    given = {"hidden": torch.randn(3, 20), "weight": torch.randn(9, 20), "bias": torch.randn(9)}
    label = torch.tensor([1, 9 if place == "label" else 8, 2], dtype=torch.uint8)
    if place in given:
        given[place].flatten()[5] = torch.nan
    assert head_file.linear_cross_entropy(*given.values(), label, 0.1)[0].isnan()
    for t in given.values():
        t.zero_()
    _, correct = head_file.linear_cross_entropy(*given.values(), label.clamp(max=1) - 1, 0.0)
    assert correct == 3, "of equal logits the first is the answer"


@pytest.mark.parametrize("warped", [False, True])
@pytest.mark.parametrize("shape", [(28, 28), (9, 7)])
def test_gather_warp(shape: tuple[int, int], warped: bool) -> None:
    num, batch_size, margin = 20, 5, 3
    image = torch.randint(256, (num, *shape), dtype=torch.uint8)
    label = torch.randint(94, (num,), dtype=torch.uint8)
    table = torch.randint(-1, num, (6, batch_size))
    step = torch.tensor([5, 0, 3])
    size = len(step) * batch_size
    matrix = distortions(size) if warped else None
    whole = [
        torch.full((size + 2 * margin, *shape), 77, dtype=torch.uint8),
        torch.full((size + 2 * margin,), 77, dtype=torch.uint8),
        torch.full((size + 2 * margin,), 77, dtype=torch.int64),
    ]
    out = [t[margin : margin + size] for t in whole]
    gather.gather_warp(image, label, table, step, matrix, *out)
    number = table[step].flatten()
    assert torch.equal(out[2], number)
    assert torch.equal(out[1], label[number.clamp(min=0)])
    for t in whole:
        beside = torch.cat([t[:margin], t[-margin:]])
        assert (beside == 77).all(), "nothing beside the buffers is written"
    if matrix is None:
        assert torch.equal(out[0], image[number.clamp(min=0)])
        return
    wanted = [torch.empty_like(t) for t in out]
    gather.gather_warp_reference(image, label, table, step, matrix, *wanted)
    away = (out[0].int() - wanted[0].int()).abs()
    assert away.max() <= 1, "rounded to nearest, but for fp32's own rounding"
    assert away.float().mean() < 0.02
    assert not out[0][0].any(), "what lies far outside is black"
    if cpu.warps(image):
        cpu.warp(image, number.clamp(min=0), matrix, wanted[0])
        away = (out[0].int() - wanted[0].int()).abs()
        assert away.max() <= 1, "and so it is where it is compiled for a CPU"
        assert away.float().mean() < 0.02


def distortions(size: int) -> torch.Tensor:
    """Random warps, the first of which looks far outside."""
    matrix = torch.eye(2, 3).repeat(size, 1, 1) + 0.2 * torch.randn(size, 2, 3)
    matrix[:, :, 2] *= 20
    matrix[0] = torch.tensor([[1, 0, 1e9], [0, 1, -1e9]])
    return matrix


def test_the_identity_and_whole_shifts_move_pixels_exactly() -> None:
    image = torch.randint(256, (3, 9, 7), dtype=torch.uint8)
    labels = torch.zeros(3, dtype=torch.uint8)
    rows = torch.arange(3)
    step = torch.zeros(1, dtype=torch.int64)
    matrix = torch.eye(2, 3).repeat(3, 1, 1)
    matrix[1, 0, 2] = 2
    matrix[2, 1, 2] = -3
    out = torch.empty_like(image)
    gather.gather_warp(image, labels, rows[None], step, matrix, out, labels, rows.clone())
    assert torch.equal(out[0], image[0])
    assert torch.equal(out[1], functional.pad(image[1, :, 2:], (0, 2)))
    assert torch.equal(out[2], functional.pad(image[2, :-3], (0, 0, 3, 0)))


DECAY, BETAS, EPS = 0.1, (0.9, 0.97), 1e-8


def flat_of(num_rounded: int, num_plain: int, num_decayed: tuple[int, int]) -> optimiser.Flat:
    """Drawn parameters at their start, a margin of NaN behind each buffer that is written."""
    size = num_rounded + num_plain
    buffers = [torch.full((size + 8,), torch.nan)[:size] for _ in range(3)]
    buffers[0].copy_(torch.randn(size))
    buffers[1].zero_()
    buffers[2].zero_()
    rounded_grad_R = torch.zeros(num_rounded, dtype=torch.bfloat16)
    shadow_R = torch.full((num_rounded + 8,), torch.nan, dtype=torch.bfloat16)[:num_rounded]
    return optimiser.Flat(*buffers, rounded_grad_R, shadow_R, torch.zeros(num_plain), num_decayed)


def rates_of(num_tensors: int) -> optimiser.Rates:
    zeros = (torch.zeros(()), torch.zeros(num_tensors), torch.zeros(()), torch.zeros(4))
    return optimiser.Rates(*zeros, BETAS, DECAY, EPS)


def draw_gradients(flat: optimiser.Flat) -> torch.Tensor:
    """Of a size of their own; in fp32, as they are read."""
    for grad in (flat.rounded_grad_R, flat.grad_F):
        grad.copy_(torch.randn(grad.shape) * 10.0 ** torch.randint(-6, 2, ()))
    return torch.cat([flat.rounded_grad_R.float(), flat.grad_F])


@pytest.mark.parametrize(
    "num_rounded, num_plain, num_decayed",
    [
        (0, 1, (0, 0)),
        (0, 2077, (0, 1031)),
        (1024, 0, (1024, 0)),
        (1031, 1046, (16, 1037)),
        (2048, 5, (2041, 0)),
    ],
)
def test_adamw(num_rounded: int, num_plain: int, num_decayed: tuple[int, int]) -> None:
    """25 steps, each from where torch's fused AdamW stands: within 2 * 2^-23 of the larger of a
    number and what it was, which is up to two units in its last place, four if it is just above a
    power of two."""
    flat, rates = flat_of(num_rounded, num_plain, num_decayed), rates_of(3)
    kinds = [num_decayed[0], num_rounded - num_decayed[0]]
    kinds += [num_decayed[1], num_plain - num_decayed[1]]
    parts = [part.clone() for part in flat.param_P.split(kinds)]
    groups = [
        {"params": [part], "weight_decay": decay}
        for part, decay in zip(parts, (DECAY, 0.0, DECAY, 0.0), strict=True)
        if len(part)
    ]
    torchs = torch.optim.AdamW(groups, rates.rate, BETAS, weight_decay=0.0, fused=True)
    for step in range(25):
        rates.rate.fill_(1e-3 * (1 + step % 5))
        for part, grad_P in zip(parts, draw_gradients(flat).split(kinds), strict=True):
            part.grad = grad_P
        before = [part.clone() for part in flat[:3]]
        torchs.step()
        optimiser.adamw(flat, rates)
        wanted = [torch.cat(parts)]
        for key in ("exp_avg", "exp_avg_sq"):
            wanted.append(torch.cat([torchs.state[part][key] for part in parts if len(part)]))
        for got, was, want in zip(flat[:3], before, wanted, strict=True):
            allowed = 2 * 2.0**-23 * torch.maximum(was.abs(), want.abs()) + 1e-38
            apart = (got - want).abs() / allowed
            assert (apart <= 1).all(), (step, apart.max())
        close(flat.shadow_R, flat.param_P[:num_rounded], torch.bfloat16)
        for got, want in zip(flat[:3], wanted, strict=True):
            got.copy_(want)
    assert (rates.step_T == 25).all() and rates.bad == 0
    for buffer in (*flat[:3], flat.shadow_R):
        size = len(buffer)
        margin = buffer.as_strided((size + 8,), (1,))[size:]
        assert margin.isnan().all(), "the margin is left"


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf, 0.0])
@pytest.mark.parametrize("place", [3, 1030, 1031, 2076])
def test_adamw_leaves_everything_where_a_gradient_is_not_finite(place: int, fault: float) -> None:
    """In bf16 or fp32, first or last, or found before: nothing moves."""
    flat, rates = flat_of(1031, 1046, (16, 1037)), rates_of(3)
    rates.rate.fill_(1e-3)
    draw_gradients(flat)
    optimiser.adamw(flat, rates)
    assert rates.bad == 0 and (rates.step_T == 1).all()
    if place < 1031:
        flat.rounded_grad_R[place] += fault
    else:
        flat.grad_F[place - 1031] += fault
    before = [tensor.clone() for tensor in flat[:-1]]
    if fault == 0:
        rates.bad.fill_(1)
    optimiser.adamw(flat, rates)
    assert rates.bad == 1 and (rates.step_T == 1).all()
    for got, want in zip(flat[:-1], before, strict=True):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_every_branch_ran() -> None:
    """Last: each kernel in each type and with each switch that a launcher can ask for.

    bf16 products are excepted.
    """
    wanted = {
        "softmax_cross_entropy_forward_sum float32 float32 float32",
        "linear_cross_entropy_forward_sum " + " ".join(7 * ["float32"]),
        f"adamw_check bfloat16{' float32' * 5}",
        f"adamw_update bfloat16{' float32' * 7} bfloat16",
        "gather_warp_forward uint8 uint8 int64 int64 uint8 uint8 uint8 int64 WARPED=False",
        "gather_warp_forward uint8 uint8 int64 int64 float32 uint8 uint8 int64 WARPED=True",
    }
    three = "float32 float32"
    four = f"{three} float32"
    for t in ("float32", "float16"):
        for masks in ("AFTER_RELU=True", "AFTER_RELU=False"):
            head = f"linear_cross_entropy_forward {t} {three} uint8 {t} {three} {masks}"
            wanted.add(head)
        head = f"linear_cross_entropy_backward {t} {four} float32 {t} {three}"
        wanted |= {f"{head} {t}", f"{head} float32"}
    for t in ("float32", "float16", "bfloat16"):
        wanted.add(f"softmax_cross_entropy_forward {t} uint8 float32 {t}")
        wanted.add(f"softmax_cross_entropy_backward {t} float32 {t}")
    assert wanted == LAUNCHED
