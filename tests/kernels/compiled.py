"""Every kernel compiled for GPUs that are not here: pytest tests/kernels/compiled.py.

Run without TRITON_INTERPRET. The launchers are called as in training, at batch 2048 on an H100's
132 multiprocessors, and what they would start is compiled for sm_80, sm_90 and sm_100, in all
types, bf16 included. cuobjdump, which comes with Triton, reports registers, stack, local memory: a
spill is a failure. All three are compared with resources.json, which holds them for each triton
version that the kernels are proven with: `python -m tests.kernels --write` writes it anew.
"""

import json
import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import adamw as optimiser
from kernels import bias_pool_relu as second
from kernels import conv2_pool_relu as whole
from kernels import conv_pool_relu as first
from kernels import gather_warp as gather
from kernels import launch
from kernels import linear_cross_entropy as head_file
from kernels import softmax_cross_entropy as loss_file
from tests.kernels.__main__ import triton_versions

ARCHITECTURES = (80, 90, 100)
EXPECTED = Path(__file__).with_name("resources.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FILES = (first, second, whole, gather, loss_file, head_file, optimiser)
NAMES = {
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
}  # fmt: skip
WITH_PRODUCTS = (
    "conv_pool_relu_forward ",
    "conv_pool_relu_backward ",
    "linear_cross_entropy_forward ",
)
BATCH = 2048
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def launches() -> list[Launch]:
    """(kernel, arguments, constants) of each launch that a training step makes, in every type."""
    assert not launch.INTERPRETED, "run me without TRITON_INTERPRET"
    found: list[Launch] = []

    def start(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        found.append((kernel, args, constants))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "num_processors", lambda tensor: 132)
        for file in FILES:
            patch.setattr(file, "start", start)
            patch.setattr(file, "on_triton", lambda tensor: True)
        for dtype in launch.FLOATS:
            _train(dtype)
        _gather(None)
        _gather(torch.zeros(BATCH, 2, 3))
        _optimise()
    return found


def _train(dtype: torch.dtype) -> None:
    """Forward and backward of every layer and of the loss."""
    image = torch.zeros(BATCH, 28, 28, dtype=torch.uint8)
    label = torch.zeros(BATCH, dtype=torch.uint8)
    weight = torch.zeros(32, 1, 3, 3).requires_grad_()
    first.conv_pool_relu(image, weight, torch.zeros(32), dtype).sum().backward()
    first.conv_pool_relu(image, weight.detach(), torch.zeros(32), dtype)
    x = torch.zeros(BATCH, 64, 14, 14, dtype=dtype).requires_grad_()
    second.bias_pool_relu(x, torch.zeros(64)).sum().backward()
    x = torch.zeros(BATCH, 32, 14, 14, dtype=dtype).requires_grad_()
    weight = torch.zeros(64, 32, 3, 3).requires_grad_()
    whole.conv2_pool_relu(x, weight, torch.zeros(64)).sum().backward()
    logits = torch.zeros(BATCH, 94, dtype=dtype).requires_grad_()
    loss_file.softmax_cross_entropy(logits, label, 0.05)[0].backward()
    hidden = torch.zeros(BATCH, 128, dtype=dtype).requires_grad_()
    last = torch.zeros(94, 128).requires_grad_()
    for relu_bias in (None, torch.zeros(128, dtype=dtype)):
        given = (hidden, last, torch.zeros(94), label, 0.05, relu_bias)
        head_file.linear_cross_entropy(*given)[0].backward()


def _gather(matrix: torch.Tensor | None) -> None:
    image = torch.zeros(BATCH, 28, 28, dtype=torch.uint8)
    label = torch.zeros(BATCH, dtype=torch.uint8)
    table = torch.zeros(5, BATCH, dtype=torch.int64)
    step = torch.zeros(1, dtype=torch.int64)
    gather.gather_warp(image, label, table, step, matrix, image.clone(), label, table[0])


def _optimise() -> None:
    """One step of the study's network, with the shadows that the other kernels leave it."""
    size, num_rounded = 432_512, 401_536
    rate, steps, bad, scalars = (torch.zeros(shape) for shape in ((), 8, (), 4))
    rates = optimiser.Rates(rate, steps, bad, scalars, (0.9, 0.99), 0.01, 1e-8)
    rounded = [torch.zeros(num_rounded, dtype=torch.bfloat16) for _ in range(2)]
    buffers = (*(torch.zeros(size) for _ in range(3)), *rounded, torch.zeros(size - num_rounded))
    optimiser.adamw(optimiser.Flat(*buffers, (401_408, 30_720)), rates)


Compilable = tuple[ASTSource, dict[str, int]]
"""What triton.compile takes, and its options."""


def source(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[str, Compilable]:
    """(name, what is to be compiled), specialised as a launch is.

    Pointers and whole multiples of 16 are marked.
    """
    options = {name: value for name, value in constants.items() if name == "num_warps"}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature: dict[str, str] = {}
    marks: dict[tuple[int, ...], Any] = {}
    for number, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        tensor = isinstance(value, torch.Tensor)
        signature[name] = "*" + NAMES[value.dtype] if tensor else "i32"
        aligned = name not in kernel.do_not_specialize_on_alignment
        if aligned and (tensor or value % 16 == 0):
            marks[(number,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    types = " ".join(t[1:] for t in signature.values() if t.startswith("*"))
    switched = " warped" * constants.get("WARPED", False)
    switched += " uncoded" * (not constants.get("CODED", True))
    switched += " after_relu" * constants.get("AFTER_RELU", False)
    what = ASTSource(kernel, signature, constants, marks)
    return f"{kernel.__name__} {types}{switched}", (what, options)


@cache
def resources(architecture: int) -> dict[str, dict[str, int]]:
    """REG, STACK and LOCAL of each kernel compiled for an architecture; mma is 1 where it has
    tensor-core products."""
    found: dict[str, dict[str, int]] = {}
    for name, (what, options) in dict(source(*launched) for launched in launches()).items():
        compiled = triton.compile(what, target=GPUTarget("cuda", architecture, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
        found[name] = {key: int(usage[key]) for key in ("REG", "STACK", "LOCAL")}
        found[name]["mma"] = int(bool(re.search(r"\b(mma|wgmma|tcgen05)", compiled.asm["ptx"])))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills_and_products_use_tensor_cores(architecture: int) -> None:
    found = resources(architecture)
    twice = 2  # the head's backward, whose relu_bias may be of hidden's 16 bits or not
    assert len(found) == 3 * 13 + 4 + 2 + 2 + twice, "every kernel in every type"
    for name, usage in found.items():
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
        assert usage["mma"] == has_products(name), name


def has_products(name: str) -> bool:
    """Whether a kernel has tensor-core products; conv2_pool_relu computes fp32 as IEEE has it."""
    kernel, kind = name.split()[:2]
    if kernel.startswith("conv2_pool_relu"):
        return kind in ("bf16", "fp16") and not kernel.endswith("_sum")
    return name.startswith(WITH_PRODUCTS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_memory_are_those_expected(architecture: int) -> None:
    expected = json.loads(EXPECTED.read_text()).get(triton.__version__)
    if expected is None and "EXPECTED_TRITON" not in os.environ:
        pytest.skip(f"resources.json knows no triton {triton.__version__}")
    assert expected, "name it in pyproject.toml, [tool.engine]; python -m tests.kernels --write"
    assert kept(resources(architecture)) == expected[str(architecture)]


def test_the_triton_that_is_meant_runs() -> None:
    assert triton.__version__ == os.environ.get("EXPECTED_TRITON", triton.__version__)


def kept(found: dict[str, dict[str, int]]) -> dict[str, str]:
    """What resources.json holds of each kernel."""
    words = "{REG} registers, {STACK} + {LOCAL} bytes of stack + local"
    return {name: words.format(**usage) for name, usage in found.items()}


if __name__ == "__main__":
    known = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    known = {version: known[version] for version in triton_versions() if version in known}
    known[triton.__version__] = {str(a): kept(resources(a)) for a in ARCHITECTURES}
    EXPECTED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
