"""What a GPU launches for each of PyTorch's operations: ONE table of assumptions, with reasons.

A CPU cannot show it, and a dispatch mode sees operations, not kernels. What the table does not name
is one launch that reads its inputs once and writes its results once. Here are the figures of a
launch, too: bytes, FLOPs, and how often its programs wait for memory, one load after the other.

It does not count: operations.py does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

MULTI_TENSOR_CHUNK = 65_536
"""Numbers that one block of torch's multi-tensor kernels takes (MultiTensorApply.cuh)."""
MULTI_TENSOR_BLOCKS = 320
MULTI_TENSOR_LISTS = (110, 64, 48, 36, 30)
"""Tensors of one launch, by how many lists of tensors it walks; blocks are MULTI_TENSOR_BLOCKS."""
NUMBERS_A_TURN = 2048
"""Of such a block: 512 threads of 4 numbers, each turn waiting for the loads of its own."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One launch, or several like it in a step."""

    name: str
    launches: float = 1.0
    """A step's; below 1 for what a launch of K steps does once."""
    read_bytes: float
    """Of all of them, as are the next two."""
    write_bytes: float
    flops: float = 0.0
    turns: int = 1
    """Times that a program of it waits for memory, one after the other."""
    dtype: str = "fp32"
    """Of its numbers: what peak its products have."""

    @property
    def num_bytes(self) -> float:
        return self.read_bytes + self.write_bytes

    @property
    def is_convolution(self) -> bool:
        return self.flops > 0 and "conv" in self.name


@dataclass(frozen=True, kw_only=True)
class Call:
    """An operation of PyTorch as the mode sees it."""

    name: str
    reads: list[torch.Tensor]
    writes: list[torch.Tensor]
    inputs: list[Any]
    """All arguments in their order."""
    result: Any
    flops: int

    def launch(
        self,
        suffix: str = "",
        reads: list[Any] | None = None,
        writes: list[Any] | None = None,
        flops: float | None = None,
        turns: int = 1,
    ) -> Operation:
        """A launch of it; what is left out is that of the whole operation."""
        read = self.reads if reads is None else reads
        written = self.writes if writes is None else writes
        return Operation(
            name=self.name + suffix,
            read_bytes=sum(map(num_bytes, distinct(read))),
            write_bytes=sum(map(num_bytes, distinct(written))),
            flops=self.flops if flops is None else flops,
            turns=turns,
            dtype=dtype_of(self.reads + self.writes),
        )


def num_bytes(tensor: torch.Tensor) -> int:
    """Of the numbers that a tensor holds; one that is expanded holds each once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    sizes = [size for size, stride in pairs if stride or not size]
    return int(np.prod(sizes, dtype=np.int64)) * tensor.element_size()


def distinct(tensors: list[Any]) -> list[torch.Tensor]:
    return list({id(t): t for t in tensors if isinstance(t, torch.Tensor)}.values())


def dtype_of(tensors: list[torch.Tensor]) -> str:
    """Of the first float: a product's operand, or the narrowest tensor of a Triton kernel."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    names |= {torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8"}
    floats = [tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point]
    return names.get(floats[0], "fp32") if floats else "fp32"


Launches = Callable[[Call], list[Operation]]


@dataclass(frozen=True)
class Assumption:
    """What a GPU launches for an operation, where that is not one kernel; and how that is known."""

    launches: Launches = field(repr=False)
    text: str
    reason: str


def _one(call: Call) -> list[Operation]:
    return [call.launch()]


def _convolution(call: Call) -> list[Operation]:
    x, weight, bias = call.inputs[:3]
    product = call.launch(reads=[x, weight])
    if bias is None:
        return [product]
    result = [call.result]
    return [product, call.launch(" (bias)", [*result, bias], result, 0)]


def _convolution_backward(call: Call) -> list[Operation]:
    grad, x, weight = call.inputs[:3]
    grad_x, grad_weight, grad_bias = call.result
    num_products = sum(made is not None for made in (grad_x, grad_weight))
    flops = call.flops / max(num_products, 1)
    found = []
    if grad_x is not None:
        found.append(call.launch(" (input)", [grad, weight], [grad_x], flops))
    if grad_weight is not None:
        found.append(call.launch(" (weight)", [grad, x], [grad_weight], flops))
    if grad_bias is not None:
        found.append(call.launch(" (bias)", [grad], [grad_bias], 0))
    return found


def _zeros_first(call: Call) -> list[Operation]:
    return [call.launch(" (zeros)", reads=[]), call.launch()]


def _by_index(call: Call) -> list[Operation]:
    """Rows chosen by an index: as many are read as are written."""
    whole = max(call.reads, key=num_bytes)
    others = [tensor for tensor in call.reads if tensor is not whole]
    return [call.launch(reads=[*others, *call.writes])]


def _multi_tensor(call: Call) -> list[Operation]:
    """Launches of MultiTensorApply: chunks of the tensors' numbers fill one after the other."""
    lists = [given for given in call.inputs if _is_tensor_list(given)]
    sizes = [tensor.numel() for tensor in lists[0]]
    most = MULTI_TENSOR_LISTS[min(len(lists), len(MULTI_TENSOR_LISTS)) - 1]
    launches, tensors, blocks = 1, 0, 0
    for size in sizes:
        chunks = max(1, -(-size // MULTI_TENSOR_CHUNK))
        if tensors == most or blocks + chunks > MULTI_TENSOR_BLOCKS:
            launches, tensors, blocks = launches + 1, 0, 0
        tensors, blocks = tensors + 1, blocks + chunks
    turns = -(-min(max(sizes), MULTI_TENSOR_CHUNK) // NUMBERS_A_TURN)
    return [replace(call.launch(turns=turns), launches=float(launches))]


def _fused_optimizer(call: Call) -> list[Operation]:
    """Gradients are read alone: they are written where they are unscaled, too, as in fp16."""
    (whole,) = _multi_tensor(call)
    parameters, _, averages, squares, *_ = call.inputs
    written = call.launch(writes=[*parameters, *averages, *squares]).write_bytes
    return [replace(whole, write_bytes=written)]


def _is_tensor_list(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and any(isinstance(t, torch.Tensor) for t in given)


_INDEXED = Assumption(_by_index, "1, which reads what it writes", "it reads the chosen rows alone")
_ZEROED = Assumption(
    _zeros_first, "2: zeros, then the gradient", "torch's CUDA source zeroes the result first"
)
_MULTI = Assumption(
    _multi_tensor,
    "1 for each 320 chunks of 65,536 numbers, or 30 to 110 tensors",
    "MultiTensorApply.cuh; the program of a full chunk waits for memory 32 times in turn",
)
_PRODUCT = Assumption(
    _one, "1", "cuBLAS's product with its bias; the sum of one that is split is not counted"
)
FOREACH = "_foreach_..."
"""Stands for every operator whose name begins so."""
_FUSED = replace(_MULTI, launches=_fused_optimizer)
ASSUMED: dict[str, Assumption] = {
    "convolution": Assumption(
        _convolution,
        "1, and 1 for a bias",
        "cuDNN's product; torch adds the bias by a kernel of its own. NCHW conversions inside "
        "cuDNN, and halves of one that is split, are not counted",
    ),
    "convolution_backward": Assumption(
        _convolution_backward,
        "1 for each gradient: input, weight, bias",
        "cuDNN's two products and torch's sum; the sum of a split weight gradient is not counted",
    ),
    "mm": _PRODUCT,
    "addmm": _PRODUCT,
    "max_pool2d_with_indices_backward": _ZEROED,
    "nll_loss_backward": _ZEROED,
    "index_select": _INDEXED,
    "index": _INDEXED,
    "embedding": _INDEXED,
    FOREACH: _MULTI,
    "_amp_foreach_non_finite_check_and_unscale_": _MULTI,
    "_fused_adam_": _FUSED,
    "_fused_adamw_": _FUSED,
}
"""By the operator's name, without its overload. All others are one launch, views none."""
LEFT_OUT = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach",
            "lift_fresh", "is_pinned", "_unsafe_view")  # fmt: skip
"""Operators that launch nothing although their result is no view."""
SAME_FLOPS = {"_addmm_activation": torch.ops.aten.addmm}
"""Products that torch does not count, and those that are as large."""
UNREAD = ("zero_", "fill_", "copy_")
"""Their first tensor is written and not read; so is every `out`."""
