"""What the proofs in Triton's interpreter share: poisoned memory, and a record of all launches.

fp32 and fp16 are proven in full. bf16 only where it is loaded, cast at once and stored, and to one
unit in the last place: the interpreter of triton 3.6 computes bf16 on raw bits (a product would be
silently wrong) and truncates its stores. Memory that a kernel should write is poisoned before (NaN,
largest integers): torch's fill_uninitialized_memory.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kernels import adamw as optimiser
from kernels import bias_pool_relu as second
from kernels import conv2_pool_relu as whole
from kernels import conv_pool_relu as first
from kernels import gather_warp as gather
from kernels import launch
from kernels import linear_cross_entropy as head_file
from kernels import softmax_cross_entropy as loss_file

UNIT = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Distance of neighbours at 1."""
LAUNCHED: set[str] = set()
"""Kernel, types and switches of every launch."""


@pytest.fixture(autouse=True)
def poisoned_and_recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert launch.INTERPRETED, "run me with TRITON_INTERPRET=1"
    assert os.environ["TRITON_INTERPRET"] == "1", "run me with TRITON_INTERPRET=1"

    def start(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        types = [str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, torch.Tensor)]
        named = ("WARPED", "CODED", "AFTER_RELU")
        switches = [f"{name}={value}" for name, value in constants.items() if name in named]
        LAUNCHED.add(" ".join([kernel.__name__, *types, *switches]))
        launch.start(kernel, grid, *args, **constants)

    for file in (first, second, whole, gather, loss_file, head_file, optimiser):
        monkeypatch.setattr(file, "start", start)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.zeros(1).new_empty(3).isnan().all(), "poison works"
    yield
    torch.use_deterministic_algorithms(False)


def close(
    got: torch.Tensor,
    wanted: torch.Tensor,
    dtype: torch.dtype,
    scale: float = 1.0,
    units: float = 1.0,
) -> None:
    """Within so many units in the last place of `dtype`, and of fp32 sums of size `scale`."""
    error = (got.double() - wanted.double()).abs()
    allowed = units * UNIT[dtype] * wanted.double().abs() + 4e-6 * scale
    if dtype == torch.float16:
        allowed += 1e-7  # its smallest numbers
    assert got.shape == wanted.shape
    assert (error <= allowed).all(), f"{(error - allowed).max()} too much"
