"""kernels/cpu.py: the pooled layers compiled for a CPU, against PyTorch's own operations."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from engine.host import ROOT
from kernels import cpu

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(3, 14, 14), (19, 9, 7), (1, 2, 2)]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Few different ones, so that many windows have equal highest; in channels-last memory."""
    x_BCHW = torch.randint(-3, 4, shape).to(dtype) / 2
    return x_BCHW.contiguous(memory_format=torch.channels_last).requires_grad_()


def plain(x_BCHW: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor:
    """The same by PyTorch, the bias added in fp32."""
    y_BCYX = functional.max_pool2d(x_BCHW, 2).float() + bias_C[:, None, None]
    return functional.relu(y_BCYX).to(x_BCHW.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pool_is_pytorchs_to_the_bit(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Values and gradients of x, ties and odd sizes too; the bias's is a sum in another order."""
    num, height, width = size
    ours_x = values((num, 64, height, width), dtype)
    theirs_x = ours_x.detach().clone().requires_grad_()
    ours_bias, theirs_bias = (torch.linspace(-1, 1, 64).requires_grad_() for _ in range(2))
    ours, theirs = cpu.bias_pool_relu(ours_x, ours_bias), plain(theirs_x, theirs_bias)
    assert torch.equal(ours, theirs)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn(*ours.shape).to(dtype)
    ours.backward(grad)
    theirs.backward(grad)
    assert torch.equal(ours_x.grad, theirs_x.grad)
    torch.testing.assert_close(ours_bias.grad, theirs_bias.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_wins_and_passes(dtype: torch.dtype) -> None:
    """Of either sign and at any place, as in PyTorch: a run must not go on as if all were well."""
    x = values((4, 32, 4, 4), dtype).detach()
    for place, number in enumerate((float("nan"), -float("nan"), float("inf"), -float("inf"))):
        x[place, place, place // 2, place % 2] = number
    got, want = cpu.bias_pool_relu(x, torch.zeros(32)), plain(x, torch.zeros(32))
    assert torch.equal(got.isnan(), want.isnan()) and want.isnan().sum() == 2
    assert torch.equal(got.nan_to_num(1.0), want.nan_to_num(1.0))


def test_bf16_is_rounded_as_pytorch_rounds() -> None:
    """Every exponent, halfway cases among them."""
    bits = np.random.default_rng(0).integers(0, 2**32, 64 * 500, dtype=np.uint32)
    bits[: 64 * 100] = bits[: 64 * 100] & 0xFFFF0000 | 0x8000
    bias = torch.from_numpy(bits.view(np.float32)).view(500, 64).nan_to_num(1.0, 1.0, 1.0)
    x = torch.zeros(1, 64, 2, 2, dtype=torch.bfloat16)
    for row in bias.abs():
        assert torch.equal(cpu.bias_pool_relu(x, row).flatten(), row.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_first_layer_is_as_exact_as_pytorchs(
    size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Against float64: within a rounding of the result, and gradients within fp32 sums' errors."""
    image = torch.randint(256, size, dtype=torch.uint8)
    weight, bias = torch.randn(32, 1, 3, 3).requires_grad_(), torch.randn(32).requires_grad_()
    exact = [each.detach().double().requires_grad_() for each in (weight, bias)]
    got = cpu.conv_pool_relu(image, weight, bias, dtype, True)
    frozen = cpu.conv_pool_relu(image, weight.detach(), bias.detach(), dtype, False)
    assert torch.equal(frozen, got), "without a code"
    x = functional.conv2d(image[:, None].double() / 255, *exact, padding=1)
    want = functional.relu(functional.max_pool2d(x, 2))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=2e-5)
    grad = torch.randn(*got.shape).to(dtype)
    got.backward(grad)
    want.backward(grad.double())
    for ours, theirs in zip((weight, bias), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        apart = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert apart < 1e-5


def test_no_bit_depends_on_the_number_of_threads() -> None:
    image = torch.randint(256, (45, 28, 28), dtype=torch.uint8)
    found = []
    for num in (1, 2, 1):
        torch.set_num_threads(num)
        torch.manual_seed(1)
        weight, bias = torch.randn(32, 1, 3, 3).requires_grad_(), torch.randn(32).requires_grad_()
        y = cpu.conv_pool_relu(image, weight, bias, torch.float32, True)
        y = cpu.bias_pool_relu(y, bias)
        y.backward(torch.randn(*y.shape))
        found.append((y.detach(), weight.grad, bias.grad))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


CALL = """
import os, torch
from kernels import cpu
torch.set_num_threads({threads})
call = lambda: cpu.bias_pool_relu(torch.ones(16, 32, 4, 4), torch.zeros(32)).sum().item()
assert call() == 2048
"""


def in_child(code: str, **variables: str) -> None:
    """Run Python in a process of its own: what a library starts stays for good."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_torch_keeps_its_number_of_threads() -> None:
    """Or its sums are shared out otherwise from the first call on, and other in the last bit."""
    code = CALL.format(threads=2) + "assert torch.get_num_threads() == 2"
    in_child(code, NUMBA_NUM_THREADS="3")


def test_a_process_of_one_thread_may_fork() -> None:
    code = CALL.format(threads=1) + "\nif not (pid := os.fork()):\n    os._exit(call() != 2048)"
    in_child(code + "\nassert os.waitpid(pid, 0)[1] == 0")


def test_who_compiles_is_told_once(tmp_path: Path) -> None:
    """In a cache that is empty; what it holds already is not compiled again."""
    code = "\n".join(
        (
            "from kernels import cpu",
            "told = []",
            "with cpu.before_compiling(lambda: told.append(1)):",
            "    import torch; torch.set_num_threads(1)",
            "    for _ in range(2): cpu.bias_pool_relu(torch.ones(1, 32, 2, 2), torch.zeros(32))",
            "assert len(told) == {}",
        )
    )
    for times in (1, 0):
        in_child(code.format(times), NUMBA_CACHE_DIR=str(tmp_path))


def test_any_memory_format_is_read() -> None:
    x = torch.randn(4, 32, 6, 6)
    bias = torch.randn(32)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(cpu.bias_pool_relu(x, bias), cpu.bias_pool_relu(last, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_keep_torchs_contract(dtype: torch.dtype) -> None:
    image = torch.randint(256, (4, 8, 8), dtype=torch.uint8)
    weight, bias = torch.randn(32, 1, 3, 3).requires_grad_(), torch.randn(32).requires_grad_()
    torch.library.opcheck(cpu._conv, (image, weight, bias, dtype, True))
    torch.library.opcheck(cpu._conv, (image, weight.detach(), bias.detach(), dtype, False))
    torch.library.opcheck(cpu._pool, (values((4, 32, 6, 5), dtype), bias))
