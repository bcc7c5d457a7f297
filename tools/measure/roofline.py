"""The roofline of a training step: bytes and FLOPs of each kernel of the study's network.

Of other networks, products.py counts what each product reads and writes.

Bytes are those through device memory. Every tensor is counted once for each kernel that reads or
writes it. Weights and the optimiser are left out: they are 1.7 MB per step, not per sample.

There are three ways to run: `eager`, PyTorch's operations one after another; `kernels`, with all of
kernels/ around the library's second convolution; `floor`, eight kernels that fuse all that can be.

What is predicted is the sum over the kernels of the longer of two times: bytes over a measured copy
bandwidth, FLOPs over the datasheet's peak. Hardware whose peak is not listed has no prediction.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import torch

from engine.meters import Stopwatch
from engine.models.baseline import CONV1_CHANNELS, CONV2_CHANNELS, HIDDEN
from tools.report.rows import markdown_table

_HOPPER_SXM = {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}
_HOPPER_NVL = {"bf16": 835e12, "fp16": 835e12, "tf32": 417e12, "fp32": 60e12}
_HOPPER_PCIE = {"bf16": 756e12, "fp16": 756e12, "tf32": 378e12, "fp32": 51e12}
_AMPERE = {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12}
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": _HOPPER_SXM,
    "NVIDIA H100 NVL": _HOPPER_NVL,
    "NVIDIA H100 PCIe": _HOPPER_PCIE,
    "NVIDIA H200": _HOPPER_SXM,
    "NVIDIA H200 NVL": _HOPPER_NVL,
    "NVIDIA A100-SXM4-40GB": _AMPERE,
    "NVIDIA A100-SXM4-80GB": _AMPERE,
    "NVIDIA A100-PCIE-40GB": _AMPERE,
    "NVIDIA A100 80GB PCIe": _AMPERE,
}
"""Dense peaks by NVIDIA's datasheets, by the device's whole name: a family differs by a third."""
FLOOR_BITS = 2
"""Of a pooled value, in the floor: which of four won."""


@dataclass(frozen=True)
class Work:
    """One kernel's share of a sample."""

    name: str
    read_bytes: float
    write_bytes: float
    flops: float = 0.0

    @property
    def num_bytes(self) -> float:
        return self.read_bytes + self.write_bytes


class Shapes:
    """Bytes of a sample's tensors in the baseline network, and FLOPs of each layer's forward.

    kernels/ keep a code of 3 bits of a pooled value: which of four won, and whether it passed.
    """

    def __init__(
        self, height: int, width: int, num_classes: int, item_bytes: int = 2, code_bits: int = 3
    ) -> None:
        area, half, quarter = (
            height * width,
            (height // 2) * (width // 2),
            (height // 4) * (width // 4),
        )
        pooled1, pooled2 = half * CONV1_CHANNELS, quarter * CONV2_CHANNELS
        self.pixels = area
        self.image = area * item_bytes  # normalised
        self.conv1 = area * CONV1_CHANNELS * item_bytes
        self.pool1 = pooled1 * item_bytes
        self.conv2 = half * CONV2_CHANNELS * item_bytes
        self.pool2 = pooled2 * item_bytes
        self.hidden = HIDDEN * item_bytes
        self.logits = num_classes * item_bytes
        self.code1, self.code2 = pooled1 * code_bits / 8, pooled2 * code_bits / 8
        self.index1, self.index2 = pooled1 * 8, pooled2 * 8  # PyTorch's own codes, int64
        self.conv1_flops = 2 * 9 * CONV1_CHANNELS * area
        self.conv2_flops = 2 * 9 * CONV1_CHANNELS * CONV2_CHANNELS * half
        self.linear_flops = 2 * HIDDEN * (pooled2 + num_classes)


def floor(s: Shapes) -> list[Work]:
    """Eight kernels that read or write each tensor once: no such step can go below."""
    return [
        Work("gather + normalise", s.pixels, s.image),
        Work("conv1 + bias + ReLU + pool", s.image, s.pool1 + s.code1, s.conv1_flops),
        Work("conv2 + bias + ReLU + pool", s.pool1, s.pool2 + s.code2, s.conv2_flops),
        Work("linear layers, softmax, loss", s.pool2, 2 * (s.hidden + s.logits), s.linear_flops),
        Work("gradients of the linear layers", s.pool2 + s.hidden, s.pool2, 2 * s.linear_flops),
        Work("conv2 input gradient", s.pool2 + s.code2, s.pool1, s.conv2_flops),
        Work("conv2 weight gradient", s.pool2 + s.code2 + s.pool1, 0, s.conv2_flops),
        Work("conv1 weight gradient", s.pool1 + s.code1 + s.image, 0, s.conv1_flops),
    ]


def frozen_floor(s: Shapes) -> list[Work]:
    """`floor` with a first layer that is not trained: it keeps no code, and no gradient ends there.

    conv2's input gradient is wanted by conv1's weight gradient alone.
    """
    left_out = ("conv2 input gradient", "conv1 weight gradient")
    kept = [work for work in floor(s) if work.name not in left_out]
    name = "conv1 + bias + ReLU + pool"
    first = Work(name, s.image, s.pool1, s.conv1_flops)
    return [first if work.name == name else work for work in kept]


def kernels(s: Shapes) -> list[Work]:
    """kernels/ as they are, the second convolution by the library."""
    return [
        Work("gather_warp", s.pixels + 9, s.pixels + 9),
        Work("conv_pool_relu forward", s.pixels, s.pool1 + s.code1, s.conv1_flops),
        Work("conv2", s.pool1, s.conv2, s.conv2_flops),
        Work("bias_pool_relu forward", s.conv2, s.pool2 + s.code2),
        Work("linear layers", s.pool2 + s.hidden, s.hidden + s.logits, s.linear_flops),
        Work("softmax_cross_entropy forward", s.logits + 1, s.logits + 8),
        Work("softmax_cross_entropy backward", s.logits, s.logits),
        Work(
            "gradients of the linear layers",
            s.pool2 + 2 * s.hidden + s.logits,
            s.pool2 + s.hidden,
            2 * s.linear_flops,
        ),
        Work("bias_pool_relu backward", s.pool2 + s.code2, s.conv2),
        Work("conv2 input gradient", s.conv2, s.pool1, s.conv2_flops),
        Work("conv2 weight gradient", s.conv2 + s.pool1, 0, s.conv2_flops),
        Work("conv_pool_relu backward", s.pool1 + s.code1 + s.pixels, 0, s.conv1_flops),
    ]


def head(s: Shapes) -> list[Work]:
    """linear_cross_entropy, in which forward makes the gradients, and backward scales them."""
    return [
        Work("linear_cross_entropy forward", s.hidden + 1, s.hidden),
        Work("linear_cross_entropy backward", s.hidden, s.hidden),
    ]


def eager(s: Shapes) -> list[Work]:
    """PyTorch's operations of the `fast` model under autocast, channels-last.

    Nothing is fused, and the pools keep int64 indices.
    """
    fp32 = 4 * s.pixels
    return [
        Work("gather", 2 * 9 + s.pixels, s.pixels + 9),
        Work("to fp32, scale, cast", s.pixels + 2 * fp32, 2 * fp32 + s.image),
        Work("conv1 and its bias", s.image + s.conv1, 2 * s.conv1, s.conv1_flops),
        Work("pool 1", s.conv1, s.pool1 + s.index1),
        Work("ReLU 1", s.pool1, s.pool1),
        Work("conv2 and its bias", s.pool1 + s.conv2, 2 * s.conv2, s.conv2_flops),
        Work("pool 2", s.conv2, s.pool2 + s.index2),
        Work("ReLU 2", s.pool2, s.pool2),
        Work(
            "linear layers, ReLU", s.pool2 + 3 * s.hidden, 2 * s.hidden + s.logits, s.linear_flops
        ),
        Work("softmax, loss", 5 * s.logits, 5 * s.logits),
        Work(
            "gradients of linear layers",
            2 * (s.pool2 + 2 * s.hidden + s.logits),
            s.pool2 + s.hidden,
            2 * s.linear_flops,
        ),
        Work("ReLU 2 backward", 2 * s.pool2, s.pool2),
        Work("pool 2 backward", s.pool2 + s.index2, s.conv2),
        Work("conv2 input gradient", s.conv2, s.pool1, s.conv2_flops),
        Work("conv2 weight and bias gradient", 2 * s.conv2 + s.pool1, 0, s.conv2_flops),
        Work("ReLU 1 backward", 2 * s.pool1, s.pool1),
        Work("pool 1 backward", s.pool1 + s.index1, s.conv1),
        Work("conv1 weight and bias gradient", 2 * s.conv1 + s.image, 0, s.conv1_flops),
    ]


def predicted_s(works: Iterable[Work], bandwidth_bytes_per_s: float, flops_per_s: float) -> float:
    """Seconds per sample: kernel after kernel, each as its bytes or its FLOPs let it."""
    return sum(max(w.num_bytes / bandwidth_bytes_per_s, w.flops / flops_per_s) for w in works)


def peak_flops(device_name: str | None, precision: str) -> float | None:
    """FLOP/s of the device in this precision; None for one that is not listed."""
    return PEAK_FLOPS.get(device_name or "", {}).get(precision)


def roofline_fraction(
    samples_per_s: float,
    device_name: str | None,
    precision: str,
    bandwidth_bytes_per_s: float | None,
    works: Callable[[int], Iterable[Work]],
) -> float | None:
    """What a measured rate of one device is of the predicted; None where there is no prediction.

    Args:
        works: a sample's kernels, by the bytes of a number; `studys_floor` of the study's network.
    """
    peak = peak_flops(device_name, precision)
    if peak is None or bandwidth_bytes_per_s is None:
        return None
    item_bytes = 2 if precision in ("bf16", "fp16") else 4
    return samples_per_s * predicted_s(works(item_bytes), bandwidth_bytes_per_s, peak)


def studys_floor(
    height: int, width: int, num_classes: int, item_bytes: int, *, is_frozen: bool
) -> list[Work]:
    """The floor for numbers of so many bytes, its first layer frozen or trained."""
    shapes = Shapes(height, width, num_classes, item_bytes, FLOOR_BITS)
    return frozen_floor(shapes) if is_frozen else floor(shapes)


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes read and written per second by a copy of 1 GiB, median of 9; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target, watch, times_s = torch.empty_like(source), Stopwatch(device), []
    for _ in range(10):
        watch.start()
        target.copy_(source)
        times_s.append(watch.stop())
    return 2 * len(source) / median(times_s[1:])


def table(height: int, width: int, num_classes: int) -> str:
    """The bytes of a sample in bf16 as Markdown; kernels/README.md shows it, held by a test."""
    sizes, fewest = (Shapes(height, width, num_classes, code_bits=bits) for bits in (3, FLOOR_BITS))
    rows = [
        (w.name, f"{w.read_bytes:,.0f}", f"{w.write_bytes:,.0f}", f"{w.num_bytes / 1000:.1f}")
        for w in kernels(sizes)
    ]
    sums = {
        "**in all**": kernels(sizes),
        "PyTorch's own operations, one after the other": eager(sizes),
        "the floor: eight kernels that fuse all that can be": floor(fewest),
    }
    rows += [
        (name, "", "", f"{sum(w.num_bytes for w in works) / 1000:.0f}")
        for name, works in sums.items()
    ]
    return (
        "\n".join(markdown_table("| kernel | reads | writes | KB a sample |", "lrrr", rows)) + "\n"
    )
