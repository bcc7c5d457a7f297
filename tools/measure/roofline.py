"""The roofline of a training step: the fewest bytes and FLOPs of the study's network.

What a step of ours moves is counted by operations.py, launch by launch; of other networks,
products.py counts what each product reads and writes.

Bytes are those through device memory. Every tensor is counted once for each kernel that reads or
writes it. Weights and the optimiser are left out: they are 1.7 MB per step, not per sample.

`floor` is eight kernels that fuse all that can be.

What is predicted is the sum over the kernels of the longer of two times: bytes over a measured copy
bandwidth, FLOPs over the datasheet's peak. Hardware whose peak is not listed has no prediction.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import torch

from engine.meters import Stopwatch
from engine.models.baseline import CONV1_CHANNELS, CONV2_CHANNELS, HIDDEN

_HOPPER_SXM = {"fp8": 1979e12, "bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}
_HOPPER_NVL = {"fp8": 1671e12, "bf16": 835e12, "fp16": 835e12, "tf32": 417e12, "fp32": 60e12}
_HOPPER_PCIE = {"fp8": 1513e12, "bf16": 756e12, "fp16": 756e12, "tf32": 378e12, "fp32": 51e12}
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
    """Bytes of a sample's tensors in the baseline network, and FLOPs of each layer's forward."""

    def __init__(self, height: int, width: int, num_classes: int, item_bytes: int = 2) -> None:
        area, half, quarter = (
            height * width,
            (height // 2) * (width // 2),
            (height // 4) * (width // 4),
        )
        pooled1, pooled2 = half * CONV1_CHANNELS, quarter * CONV2_CHANNELS
        self.pixels = area
        self.image = area * item_bytes  # normalised
        self.pool1 = pooled1 * item_bytes
        self.pool2 = pooled2 * item_bytes
        self.hidden = HIDDEN * item_bytes
        self.logits = num_classes * item_bytes
        self.code1, self.code2 = pooled1 * FLOOR_BITS / 8, pooled2 * FLOOR_BITS / 8
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

    There is none of fp8, in which only some layers compute, each tensor in a width of its own.

    Args:
        works: a sample's kernels, by the bytes of a number; `studys_floor` of the study's network.
    """
    peak = peak_flops(device_name, precision)
    if peak is None or bandwidth_bytes_per_s is None or precision == "fp8":
        return None
    item_bytes = 2 if precision in ("bf16", "fp16") else 4
    return samples_per_s * predicted_s(works(item_bytes), bandwidth_bytes_per_s, peak)


def studys_floor(
    height: int, width: int, num_classes: int, item_bytes: int, *, is_frozen: bool
) -> list[Work]:
    """The floor for numbers of so many bytes, its first layer frozen or trained."""
    shapes = Shapes(height, width, num_classes, item_bytes)
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
