"""Each of kernels/ against PyTorch's operations, as they are and by torch.compile: time, GB/s, part of the bandwidth.

The bytes are the roofline model's (roofline.py), the same for all three ways, so that GB/s compare. Between
repetitions 1 GiB is overwritten: the second-level cache holds nothing of the last, and the host gets ahead of the GPU,
so that its own time is not measured. The ways are measured in turn, the copy bandwidth in the same run.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from engine.meters import Stopwatch
from engine.world import World
from kernels.bias_pool_relu import bias_pool_relu
from kernels.conv_pool_relu import conv_pool_relu
from kernels.gather_warp import gather_warp, gather_warp_reference
from kernels.softmax_cross_entropy import softmax_cross_entropy
from tools.measure import roofline
from tools.report.rows import row

HEIGHT_WIDTH, CLASSES, SMOOTHING = (28, 28), 94, 0.05
FLUSH_BYTES = 2**30
Work = Callable[[], object]
Function = Callable[..., torch.Tensor]


class Case(NamedTuple):
    """A kernel, the ways to do its work, and the bytes of the whole batch."""

    name: str
    ways: dict[str, Work]
    num_bytes: float


def kernel_rows(world: World, batch: int, repetitions: int, compiled: bool) -> list[dict[str, Any]]:
    """Result lines for every kernel: microseconds of each way, and what the Triton kernel makes of the bandwidth."""
    device = world.device
    flush = torch.empty(
        FLUSH_BYTES if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device
    )
    bandwidth = roofline.copy_bandwidth(device)
    rows = [row("copy within the memory", [bandwidth / 1e9], "GB/s")] if bandwidth else []
    for case in _cases(device, batch, compiled):
        times_us: dict[str, list[float]] = {way: [] for way in case.ways}
        for number in range(repetitions + 2):
            for way, work in case.ways.items():
                took_us = _time_us(work, flush)
                if number >= 2:  # the first compile and warm up
                    times_us[way].append(took_us)
        rows += [row(f"{case.name}: {way}", times, "us") for way, times in times_us.items()]
        rates = [case.num_bytes / us / 1000 for us in times_us["Triton"]]
        rows.append(row(f"{case.name}: Triton", rates, "GB/s"))
        if bandwidth:
            parts = [1e11 * rate / bandwidth for rate in rates]
            rows.append(row(f"{case.name}: part of the copy bandwidth", parts, "%"))
    return rows


def _time_us(work: Work, flush: torch.Tensor) -> float:
    """Microseconds of `work` on the device, from a cold second-level cache."""
    watch = Stopwatch(flush.device)
    flush.zero_()
    watch.start()
    work()
    return 1e6 * watch.stop()


def _cases(device: torch.device, batch: int, compiled: bool) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = roofline.Shapes(*HEIGHT_WIDTH, CLASSES, dtype.itemsize)
    num_bytes = {work.name: batch * work.num_bytes for work in roofline.kernels(sizes)}
    height, width = HEIGHT_WIDTH
    image = torch.randint(256, (batch, height, width), dtype=torch.uint8, device=device)
    label = torch.randint(CLASSES, (batch,), dtype=torch.uint8, device=device)
    yield from _gathers(image, label, num_bytes["gather_warp"], compiled)

    def layer(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=device).to(kind).requires_grad_()

    weight, bias = layer(32, 1, 3, 3), layer(32)
    x = layer(batch, 64, height // 2, width // 2, kind=dtype).detach()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    bias2, logits = layer(64), layer(batch, CLASSES, kind=dtype)
    layers: list[tuple[str, Function, Function, tuple[torch.Tensor, ...]]] = [
        (
            "conv_pool_relu",
            partial(conv_pool_relu, dtype=dtype),
            partial(_first, dtype=dtype),
            (image, weight, bias),
        ),
        ("bias_pool_relu", bias_pool_relu, _second, (x, bias2)),
        ("softmax_cross_entropy", _fused_loss, _loss, (logits, label)),
    ]
    for name, fused, plain, leaves in layers:
        ways = _ways(plain, fused, compiled)
        forward: dict[str, Work] = {
            way: partial(function, *leaves) for way, function in ways.items()
        }
        yield Case(f"{name} forward", forward, num_bytes[f"{name} forward"])
        backward = {way: _backward(function, leaves) for way, function in ways.items()}
        yield Case(f"{name} backward", backward, num_bytes[f"{name} backward"])


def _gathers(
    image: torch.Tensor, label: torch.Tensor, num_bytes: float, compiled: bool
) -> Iterator[Case]:
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
    for name, given, extra in (
        ("gather_warp", None, 0),
        ("gather_warp, warped", matrix, 24 * batch),
    ):
        works: dict[str, Work] = {
            way: partial(function, image, label, table, step, given, *out)
            for way, function in ways.items()
        }
        yield Case(name, works, num_bytes + extra)


def _ways(
    plain: Callable[..., Any], fused: Callable[..., Any], compiled: bool
) -> dict[str, Callable[..., Any]]:
    by_compile = {"torch.compile": torch.compile(plain, dynamic=False)} if compiled else {}
    return {"eager": plain, "Triton": fused} | by_compile


def _backward(function: Function, leaves: tuple[torch.Tensor, ...]) -> Work:
    y = function(*leaves)
    grad = torch.randn_like(y) if y.dim() else torch.ones_like(y)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return partial(torch.autograd.grad, y, wanted, grad, retain_graph=True)


def _first(
    image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    x = (image[:, None].float() * (1 / 255)).to(dtype)
    return functional.max_pool2d(
        functional.conv2d(x, weight.to(dtype), bias.to(dtype), padding=1), 2
    ).relu()


def _second(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.max_pool2d(x + bias.to(x.dtype)[:, None, None], 2).relu()


def _loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    chosen = label.long()
    loss = functional.cross_entropy(logits.float(), chosen, label_smoothing=SMOOTHING)
    return loss + 0 * (logits.detach().argmax(1) == chosen).sum()


def _fused_loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return softmax_cross_entropy(logits, label, SMOOTHING)[0]
