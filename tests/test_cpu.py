"""kernels/cpu.py: what is compiled for a CPU, against PyTorch's own operations and float64."""

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
from kernels import cpu, gather_warp

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


WARPED = [(28, 28), (9, 7), (33, 3), (5, 40), (1, 1), (17, 16)]


def distortions(num: int, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Random matrices about the image; the last three look far outside, or nowhere."""
    rng = np.random.default_rng(seed)
    matrix_M23 = np.eye(2, 3) + 0.3 * rng.standard_normal((num, 2, 3))
    matrix_M23[:, :, 2] *= max(shape)
    matrix_M23[-3] = [[1, 0, 1e9], [0, 1, -1e9]]
    matrix_M23[-2] = [[1, 0, np.inf], [0, 1, 0]]
    matrix_M23[-1] = np.nan
    return torch.from_numpy(matrix_M23.astype(np.float32))


def exactly(image_HW: np.ndarray, matrix_23: np.ndarray) -> np.ndarray:
    """One image through its matrix, bilinear in float64, not rounded."""
    height, width = image_HW.shape
    padded = np.pad(image_HW.astype(np.float64), 2)
    y, x = np.mgrid[:height, :width] + 0.5
    u, v = (row[0] * x + row[1] * y + row[2] - 0.5 for row in matrix_23.astype(np.float64))
    u, v = np.clip(u, -2, width), np.clip(v, -2, height)
    left, top = np.floor(u).astype(int), np.floor(v).astype(int)
    beside, below = u - left, v - top
    upper, lower = ((1 - beside) * padded[top + dy, left + 2] + beside * padded[top + dy, left + 3]
                    for dy in (2, 3))  # fmt: skip
    return np.asarray((1 - below) * upper + below * lower)


@pytest.mark.parametrize("shape", WARPED, ids=str)
def test_a_warped_pixel_is_the_nearest_grey_value(shape: tuple[int, int]) -> None:
    """To the exact one in float64; nothing beside the results is written, any row is read."""
    num, margin = 60, 2
    image_NHW = torch.randint(256, (num + 5, *shape), dtype=torch.uint8)
    row_M = torch.randint(num + 5, (num,))
    row_M[-4:] = num + 4  # the end of the memory
    matrix_M23 = distortions(num, shape)
    whole = torch.full((num + 2 * margin, *shape), 77, dtype=torch.uint8)
    out_MHW = whole[margin:-margin]
    cpu.warp(image_NHW, row_M, matrix_M23, out_MHW)
    assert (whole[:margin] == 77).all() and (whole[-margin:] == 77).all()
    assert not out_MHW[-3:].any(), "what lies far outside is black, and so is nowhere"
    for out_HW, row, matrix_23 in zip(out_MHW[:-3], row_M, matrix_M23, strict=False):
        exact_HW = exactly(image_NHW[row].numpy(), matrix_23.numpy())
        assert np.abs(out_HW.numpy() - exact_HW).max() < 0.505


def test_a_warp_does_not_depend_on_threads_or_what_was_warped_before() -> None:
    image = torch.randint(256, (100, 28, 28), dtype=torch.uint8)
    row, matrix = torch.randint(100, (300,)), distortions(300, (28, 28))
    found = []
    for num in (1, 2):
        torch.set_num_threads(num)
        found.append(torch.empty(300, 28, 28, dtype=torch.uint8))
        cpu.warp(image, row, matrix, found[-1])
    assert torch.equal(*found)
    alone = torch.empty(1, 28, 28, dtype=torch.uint8)
    for m in range(0, 300, 37):
        cpu.warp(image, row[m : m + 1], matrix[m : m + 1].clone(), alone)
        assert torch.equal(alone[0], found[0][m])


def test_the_gathering_operator_warps_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is compiled and without: ids, padding and labels alike, grey values within one."""
    image = torch.randint(256, (20, 28, 28), dtype=torch.uint8)
    label = torch.randint(94, (20,), dtype=torch.uint8)
    table, step = torch.randint(-1, 20, (6, 10)), torch.tensor([5, 0, 3])
    found = []
    for has_numba in (True, False):
        monkeypatch.setattr(cpu, "is_here", lambda has_numba=has_numba: has_numba)
        out = [image.new_empty(30, 28, 28), label.new_empty(30), table.new_empty(30)]
        gather_warp.gather_warp(image, label, table, step, distortions(30, (28, 28)), *out)
        found.append(out)
    assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][2], found[1][2])
    away = (found[0][0].int() - found[1][0].int())[:-3].abs()
    assert away.max() <= 1 and away.float().mean() < 0.01
    assert away.any(), "or the same code ran twice"
