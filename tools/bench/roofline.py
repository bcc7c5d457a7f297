"""The roofline of the baseline network's training step: bytes through device memory and FLOPs of each kernel.

Every tensor is counted once for each kernel that reads or writes it; weights and the optimiser are left out (1.7 MB a
step, not a sample). Three ways to run: `eager`, as PyTorch's operations come after one another; `kernels`, with all of
kernels/ around the library's second convolution; `floor`, eight kernels that fuse all that can be. What is predicted is
the sum over the kernels of the longer of two times: bytes over a measured copy bandwidth, FLOPs over the datasheet's
peak. There is no prediction for hardware whose peak is not listed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from engine.model import CONV1_CHANNELS, CONV2_CHANNELS, HIDDEN

PEAK_FLOPS = {
    "H100 PCIe": {"bf16": 756e12, "fp16": 756e12, "tf32": 378e12, "fp32": 51e12},
    "H100": {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12},
    "H200": {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
}
"""Dense peaks by NVIDIA's datasheets, by a part of the device's name; the first that fits counts."""
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


@dataclass(frozen=True)
class Shapes:
    """Sizes in bytes of a sample's tensors."""

    pixels: int
    image: int
    """Normalised."""
    conv1: int
    pool1: int
    conv2: int
    pool2: int
    hidden: int
    logits: int
    code_bits: int
    """What a pool keeps of each value; PyTorch's own keeps an int64 index."""
    activation_bytes: int
    flops: dict[str, float]
    """Of the forward of each layer."""

    def code(self, pooled: int) -> float:
        return pooled / self.activation_bytes * self.code_bits / 8

    def index(self, pooled: int) -> float:
        return pooled / self.activation_bytes * 8


def shapes(height: int, width: int, num_classes: int, activation_bytes: int = 2, code_bits: int = 3) -> Shapes:
    """Of the baseline network. kernels/ keep 3 bits of a pooled value: which of four won, and whether it passed."""
    area, a = height * width, activation_bytes
    half, quarter = (height // 2) * (width // 2), (height // 4) * (width // 4)
    return Shapes(
        pixels=area,
        image=area * a,
        conv1=area * CONV1_CHANNELS * a,
        pool1=half * CONV1_CHANNELS * a,
        conv2=half * CONV2_CHANNELS * a,
        pool2=quarter * CONV2_CHANNELS * a,
        hidden=HIDDEN * a,
        logits=num_classes * a,
        code_bits=code_bits,
        activation_bytes=a,
        flops={
            "conv1": 2 * 9 * CONV1_CHANNELS * area,
            "conv2": 2 * 9 * CONV1_CHANNELS * CONV2_CHANNELS * half,
            "linear": 2 * HIDDEN * (CONV2_CHANNELS * quarter + num_classes),
        },
    )


def floor(s: Shapes) -> list[Work]:
    """Eight kernels, each tensor read or written once by each: what no step with these activations goes below."""
    code1, code2, small = s.code(s.pool1), s.code(s.pool2), s.hidden + s.logits + s.hidden + s.logits
    conv1, conv2, linear = s.flops["conv1"], s.flops["conv2"], s.flops["linear"]
    return [
        Work("gather + normalise", s.pixels, s.image),
        Work("conv1 + bias + ReLU + pool", s.image, s.pool1 + code1, conv1),
        Work("conv2 + bias + ReLU + pool", s.pool1, s.pool2 + code2, conv2),
        Work("linear layers, softmax, loss", s.pool2, small, linear),
        Work("gradients of the linear layers", s.pool2 + s.hidden, s.pool2, 2 * linear),
        Work("conv2 input gradient", s.pool2 + code2, s.pool1, conv2),
        Work("conv2 weight gradient", s.pool2 + code2 + s.pool1, 0, conv2),
        Work("conv1 weight gradient", s.pool1 + code1 + s.image, 0, conv1),
    ]


def kernels(s: Shapes) -> list[Work]:
    """kernels/ as they are, the second convolution by the library."""
    code1, code2 = s.code(s.pool1), s.code(s.pool2)
    conv1, conv2, linear = s.flops["conv1"], s.flops["conv2"], s.flops["linear"]
    return [
        Work("gather_warp", s.pixels + 9, s.pixels + 9),
        Work("conv_pool_relu forward", s.pixels, s.pool1 + code1, conv1),
        Work("conv2", s.pool1, s.conv2, conv2),
        Work("bias_pool_relu forward", s.conv2, s.pool2 + code2),
        Work("linear layers", s.pool2 + s.hidden, s.hidden + s.logits, linear),
        Work("softmax_cross_entropy forward", s.logits + 1, s.logits + 8),
        Work("softmax_cross_entropy backward", s.logits, s.logits),
        Work("gradients of the linear layers", s.pool2 + 2 * s.hidden + s.logits, s.pool2 + s.hidden, 2 * linear),
        Work("bias_pool_relu backward", s.pool2 + code2, s.conv2),
        Work("conv2 input gradient", s.conv2, s.pool1, conv2),
        Work("conv2 weight gradient", s.conv2 + s.pool1, 0, conv2),
        Work("conv_pool_relu backward", s.pool1 + code1 + s.pixels, 0, conv1),
    ]


def eager(s: Shapes) -> list[Work]:
    """PyTorch's operations of the `fast` model under autocast, channels-last: no fusion, int64 indices of the pools."""
    fp32 = 4 * s.pixels
    index1, index2 = s.index(s.pool1), s.index(s.pool2)
    conv1, conv2, linear = s.flops["conv1"], s.flops["conv2"], s.flops["linear"]
    return [
        Work("gather", 2 * 9 + s.pixels, s.pixels + 9),
        Work("to fp32, scale, cast", s.pixels + 2 * fp32, 2 * fp32 + s.image),
        Work("conv1 and its bias", s.image + s.conv1, 2 * s.conv1, conv1),
        Work("pool 1", s.conv1, s.pool1 + index1),
        Work("ReLU 1", s.pool1, s.pool1),
        Work("conv2 and its bias", s.pool1 + s.conv2, 2 * s.conv2, conv2),
        Work("pool 2", s.conv2, s.pool2 + index2),
        Work("ReLU 2", s.pool2, s.pool2),
        Work("linear layers, ReLU", s.pool2 + 3 * s.hidden, 2 * s.hidden + s.logits, linear),
        Work("softmax, loss", 5 * s.logits, 5 * s.logits),
        Work(
            "gradients of the linear layers", 2 * s.pool2 + 4 * s.hidden + 2 * s.logits, s.pool2 + s.hidden, 2 * linear
        ),
        Work("ReLU 2 backward", 2 * s.pool2, s.pool2),
        Work("pool 2 backward", s.pool2 + index2, s.conv2),
        Work("conv2 input gradient", s.conv2, s.pool1, conv2),
        Work("conv2 weight and bias gradient", 2 * s.conv2 + s.pool1, 0, conv2),
        Work("ReLU 1 backward", 2 * s.pool1, s.pool1),
        Work("pool 1 backward", s.pool1 + index1, s.conv1),
        Work("conv1 weight and bias gradient", 2 * s.conv1 + s.image, 0, conv1),
    ]


def predicted_s(works: Iterable[Work], batch: int, bandwidth_bytes_per_s: float, flops_per_s: float) -> float:
    """Seconds of a step of `batch` samples: kernel after kernel, each as its bytes or its FLOPs let it."""
    return sum(batch * max(w.num_bytes / bandwidth_bytes_per_s, w.flops / flops_per_s) for w in works)


def peak_flops(device_name: str | None, precision: str) -> float | None:
    """FLOP/s of the device in this precision; None for one that is not listed."""
    return next((peaks[precision] for part, peaks in PEAK_FLOPS.items() if part in (device_name or "")), None)


def roofline_fraction(
    samples_per_s: float,
    device_name: str | None,
    precision: str,
    bandwidth_bytes_per_s: float | None,
    shape: tuple[int, int, int],
) -> float | None:
    """What a measured rate of one device is of the floor's; None where there is no prediction.

    Args:
        shape: height, width and number of classes.
    """
    peak = peak_flops(device_name, precision)
    if peak is None or bandwidth_bytes_per_s is None:
        return None
    activation_bytes = 2 if precision in ("bf16", "fp16") else 4
    works = floor(shapes(*shape, activation_bytes, FLOOR_BITS))
    return samples_per_s * predicted_s(works, 1, bandwidth_bytes_per_s, peak)


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes read and written a second by a copy of 1 GiB within the GPU's memory, median of 9; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times_ms = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return 2 * len(source) / (sorted(times_ms[1:])[4] / 1000)


def table(height: int, width: int, num_classes: int) -> str:
    """The bytes of a sample in bf16 as Markdown; README shows it, and a test holds it to this."""
    lines = ["| kernel | reads | writes | KB a sample |", "|---|--:|--:|--:|"]
    sizes = shapes(height, width, num_classes)
    ours = kernels(sizes)
    for w in ours:
        lines.append(f"| {w.name} | {w.read_bytes:,.0f} | {w.write_bytes:,.0f} | {w.num_bytes / 1000:.1f} |")
    lowest = floor(shapes(height, width, num_classes, code_bits=FLOOR_BITS))
    for name, works in (
        ("**in all**", ours),
        ("PyTorch's own operations, one after the other", eager(sizes)),
        ("the floor: eight kernels that fuse all that can be", lowest),
    ):
        lines.append(f"| {name} | | | {sum(w.num_bytes for w in works) / 1000:.0f} |")
    return "\n".join(lines) + "\n"
