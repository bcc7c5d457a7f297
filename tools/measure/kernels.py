"""Each of kernels/ against PyTorch's operations, as they are and by torch.compile.

What is measured is time, GB/s and the part of the bandwidth.

The bytes are those that the Triton kernels' launchers ask for (started.py).
Between repetitions 1 GiB is read. Then the second-level cache holds nothing of the last, and
nothing that must be written back while the next is measured. The host gets ahead of the GPU, too,
so that its own time is not measured. The ways are measured in turn, the copy bandwidth in the same
run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from engine.errors import first_cause, sentence
from engine.meters import Stopwatch
from engine.models.baseline import HIDDEN
from kernels.bias_pool_relu import bias_pool_relu
from kernels.conv2_pool_relu import conv2_pool_relu
from kernels.conv_pool_relu import conv_pool_relu
from kernels.gather_warp import gather_warp, gather_warp_reference
from kernels.launch import num_processors
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.softmax_cross_entropy import softmax_cross_entropy
from tools.measure import roofline
from tools.measure.started import launched_bytes
from tools.report.rows import Row, row

HEIGHT_WIDTH, CLASSES, SMOOTHING = (28, 28), 94, 0.05
FLUSH_BYTES = 2**30
NUM_UNTIMED = 2
"""Repetitions of each way that compile and warm up."""
Work = Callable[[], object]
Function = Callable[..., torch.Tensor]


class Case(NamedTuple):
    """A kernel, and the ways to do its work."""

    name: str
    ways: dict[str, Work]


@dataclass(frozen=True)
class MeasuredCase:
    """A case's result lines, and a sentence for each way that failed."""

    rows: list[Row]
    failures: list[str]


def setting(device: torch.device) -> tuple[torch.Tensor, float | None]:
    """What is read between repetitions, and the copy bandwidth (bytes/s; None on a CPU)."""
    num_bytes = FLUSH_BYTES if device.type == "cuda" else 2**20
    flush = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return flush, roofline.copy_bandwidth(device)


def measure_case(
    case: Case, flush: torch.Tensor, bandwidth: float | None, repetitions: int
) -> MeasuredCase:
    """Microseconds of each way, in turn, and what the Triton kernel makes of the bandwidth."""
    times_us: dict[str, list[float]] = {way: [] for way in case.ways}
    failures: dict[str, str] = {}
    for number in range(repetitions + NUM_UNTIMED):
        for way in [way for way in case.ways if way not in failures]:
            try:
                took_us = _time_us(case.ways[way], flush)
            except Exception as error:  # Triton, gcc and the launch each raise errors of their own
                failures[way] = sentence(first_cause(error))
                continue
            if number >= NUM_UNTIMED:
                times_us[way].append(took_us)
    kept = {way: times for way, times in times_us.items() if way not in failures}
    rows = [row(f"{case.name}: {way}", times, "us") for way, times in kept.items()]
    if "Triton" in kept:
        processors = num_processors(flush)
        num_bytes = launched_bytes(case.ways["Triton"], processors)
        rows += _rates(case.name, num_bytes, kept["Triton"], bandwidth)
    return MeasuredCase(rows, [f"{case.name}: {way}: {why}" for way, why in failures.items()])


def _rates(
    name: str, num_bytes: float, times_us: list[float], bandwidth: float | None
) -> list[Row]:
    rates = [num_bytes / us / 1000 for us in times_us]
    rows = [row(f"{name}: Triton", rates, "GB/s")]
    if bandwidth:
        parts = [1e11 * rate / bandwidth for rate in rates]
        rows.append(row(f"{name}: part of the copy bandwidth", parts, "%"))
    return rows


def _time_us(work: Work, flush: torch.Tensor) -> float:
    """Microseconds of `work` on the device, from a cold second-level cache."""
    watch = Stopwatch(flush.device)
    flush.sum()
    watch.start()
    work()
    return 1e6 * watch.stop()


def cases(device: torch.device, batch: int, compiled: bool) -> Iterator[Case]:
    """Every kernel's forward and backward, on random data."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    height, width = HEIGHT_WIDTH
    image = torch.randint(256, (batch, height, width), dtype=torch.uint8, device=device)
    label = torch.randint(CLASSES, (batch,), dtype=torch.uint8, device=device)
    yield from _gathers(image, label, compiled)

    def layer(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=device).to(kind).requires_grad_()

    weight, bias = layer(32, 1, 3, 3), layer(32)
    x = layer(batch, 64, height // 2, width // 2, kind=dtype).detach()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    pooled = layer(batch, 32, height // 2, width // 2, kind=dtype).detach()
    pooled = pooled.contiguous(memory_format=torch.channels_last).requires_grad_()
    bias2, logits = layer(64), layer(batch, CLASSES, kind=dtype)
    hidden = layer(batch, HIDDEN, kind=dtype)
    head = (hidden, layer(CLASSES, HIDDEN), layer(CLASSES), label)
    layers: list[tuple[str, Function, Function, tuple[torch.Tensor, ...]]] = [
        (
            "conv_pool_relu",
            partial(conv_pool_relu, dtype=dtype),
            partial(_first, dtype=dtype),
            (image, weight, bias),
        ),
        ("bias_pool_relu", bias_pool_relu, _second, (x, bias2)),
        ("conv2_pool_relu", conv2_pool_relu, _whole_second, (pooled, layer(64, 32, 3, 3), bias2)),
        ("softmax_cross_entropy", _fused_loss, _loss, (logits, label)),
        ("linear_cross_entropy", _fused_head, _head, head),
    ]
    for name, fused, plain, leaves in layers:
        ways = _ways(plain, fused, compiled)
        forward: dict[str, Work] = {w: partial(function, *leaves) for w, function in ways.items()}
        yield Case(f"{name} forward", forward)
        backward = {way: _backward(function, leaves) for way, function in ways.items()}
        yield Case(f"{name} backward", backward)
    ways = _ways(_head, _fused_head, compiled)
    both = {way: _both(function, head) for way, function in ways.items()}
    yield Case("linear_cross_entropy forward and backward", both)


def _gathers(image: torch.Tensor, label: torch.Tensor, compiled: bool) -> Iterator[Case]:
    """One step of one batch, its ids in any order; and the same through drawn matrices."""
    batch, device = len(label), image.device
    table, step = (
        torch.randperm(batch, device=device)[None],
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    matrix = torch.eye(2, 3, device=device).repeat(batch, 1, 1) + 0.05 * torch.randn(
        batch, 2, 3, device=device
    )
    out = (torch.empty_like(image), torch.empty_like(label), torch.empty_like(table[0]))
    ways = _ways(gather_warp_reference, gather_warp, compiled)
    for name, given in (("gather_warp", None), ("gather_warp, warped", matrix)):
        works: dict[str, Work] = {
            way: partial(function, image, label, table, step, given, *out)
            for way, function in ways.items()
        }
        yield Case(name, works)


def _ways(
    plain: Callable[..., Any], fused: Callable[..., Any], compiled: bool
) -> dict[str, Callable[..., Any]]:
    by_compile = {"torch.compile": torch.compile(plain, dynamic=False)} if compiled else {}
    return {"eager": plain, "Triton": fused} | by_compile


def _backward(function: Function, leaves: tuple[torch.Tensor, ...]) -> Work:
    """The backward of a forward that is run once, when it is first wanted: it may fail."""

    @cache
    def prepared() -> Work:
        y = function(*leaves)
        grad = torch.randn_like(y) if y.dim() else torch.ones_like(y)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return partial(torch.autograd.grad, y, wanted, grad, retain_graph=True)

    return lambda: prepared()()


def _both(function: Function, leaves: tuple[torch.Tensor, ...]) -> Work:
    """Forward and backward: a kernel's forward may have done the backward's work."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return lambda: torch.autograd.grad(function(*leaves), wanted)


def _first(
    image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    x = (image[:, None].float() * (1 / 255)).to(dtype)
    return functional.max_pool2d(
        functional.conv2d(x, weight.to(dtype), bias.to(dtype), padding=1), 2
    ).relu()


def _second(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.max_pool2d(x + bias.to(x.dtype)[:, None, None], 2).relu()


def _whole_second(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return _second(functional.conv2d(x, weight.to(x.dtype), padding=1), bias)


def _loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    chosen = label.long()
    loss = functional.cross_entropy(logits.float(), chosen, label_smoothing=SMOOTHING)
    return loss + 0 * (logits.detach().argmax(1) == chosen).sum()


def _head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, label: torch.Tensor
) -> torch.Tensor:
    kind = hidden.dtype
    return _loss(functional.linear(hidden, weight.to(kind), bias.to(kind)), label)


def _fused_head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, label: torch.Tensor
) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, bias, label, SMOOTHING)[0]


def _fused_loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return softmax_cross_entropy(logits, label, SMOOTHING)[0]
