"""What CPU tensors get, compiled by numba: custom operators of the pooled layers, and the warp.

conv_pool_relu.py and bias_pool_relu.py hand CPU tensors of fp32 and bf16 to these where numba can
be imported, and else to their references. A code is a byte a value here (pools_jit.py).
gather_warp.py warps by the same function (warp_jit.py) as every feed on a CPU.

Threads are as many as torch's, set at each call.

Shapes: B samples, H x W pixels or values, Y x X pooled positions, C channels; N images, M samples
of a batch, P = H W.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional

FLOATS = (torch.float32, torch.bfloat16)
SCALE = 1 / 255


@cache
def is_here() -> bool:
    """Whether numba can be imported: it may be missing, or lag behind NumPy."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether these operators compute in `dtype` on the tensor's device."""
    return tensor.device.type == "cpu" and dtype in FLOATS and is_here()


@contextmanager
def before_compiling(call: Callable[[], None]) -> Iterator[None]:
    """While this is entered, `call` is called once, when a function is about to be compiled.

    What a user's cache holds already is not compiled again.
    """
    from numba.core import event

    class First(event.Listener):
        is_over = False

        def on_start(self, event: Any) -> None:
            if not self.is_over:
                self.is_over = True
                call()

        def on_end(self, event: Any) -> None:
            """The next is no news."""

    with event.install_listener("numba:compile", First()):
        yield


def _run(name: str, *arrays: np.ndarray | None) -> None:
    """A function of pools_jit."""
    from kernels import pools_jit

    _start(getattr(pools_jit, name), *arrays)


def _start(compiled: Any, *arrays: np.ndarray | None) -> None:
    """With as many threads as torch; with one, OpenMP is not started."""
    import numba

    num_threads = torch.get_num_threads()
    if num_threads == 1:
        compiled.serial(*arrays)
        return
    numba.set_num_threads(min(num_threads, _start_threads(os.getpid())))
    compiled.parallel(*arrays)


@cache
def _start_threads(pid: int) -> int:
    """Start numba's threads, once in a process; how many there may be.

    Those of OpenMP, where its library is torch's, too: the same threads then take turns, while two
    sets would wait for each other's spinning. Starting them sets torch's number, which is put back.
    """
    import numba
    from numba.np.ufunc import parallel

    config: Any = numba.config
    num_threads = torch.get_num_threads()
    parallel._launch_threads()
    torch.set_num_threads(num_threads)
    return int(config.NUMBA_NUM_THREADS)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's memory; bf16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _copied(parameter: torch.Tensor) -> torch.Tensor:
    """What NumPy may look at: memory that it has seen cannot be freed early, as FSDP does it."""
    return parameter.detach().clone()


def _nhwc(tensor_BCHW: torch.Tensor) -> torch.Tensor:
    """[B, H, W, C], contiguous; copied where it lies otherwise."""
    return tensor_BCHW.detach().permute(0, 2, 3, 1).contiguous()


def _padded(image_BHW: torch.Tensor) -> np.ndarray:
    """float32 [B, H + 2, W + 2] with a border of zeros."""
    return functional.pad(image_BHW.float(), (1, 1, 1, 1)).numpy()


def _pooled(
    like: torch.Tensor, dtype: torch.dtype, shape_BCHW: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y_BCYX in channels-last memory, code_BYXC uint8), uninitialised."""
    num, channels, height, width = shape_BCHW
    y_BYXC = like.new_empty((num, height // 2, width // 2, channels), dtype=dtype)
    return y_BYXC.permute(0, 3, 1, 2), torch.empty_like(y_BYXC, dtype=torch.uint8)


def _blocks(num_samples: int) -> int:
    from kernels.pools_jit import BLOCK

    return -(-num_samples // BLOCK)


def _run_pool(x_BCHW: torch.Tensor, bias_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y_BCYX, code_BYXC = _pool_fake(x_BCHW, bias_C)
    y_BYXC = y_BCYX.permute(0, 2, 3, 1)
    arrays = (_array(t) for t in (_nhwc(x_BCHW), _copied(bias_C), y_BYXC, code_BYXC))
    _run("bias_pool_relu_forward", *arrays)
    return y_BCYX, code_BYXC


_pool = torch.library.custom_op("tmnist::bias_pool_relu_cpu", _run_pool, mutates_args=())


@_pool.register_fake
def _pool_fake(x_BCHW: torch.Tensor, bias_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _pooled(x_BCHW, x_BCHW.dtype, x_BCHW.shape)


def _run_pool_backward(
    grad_BCYX: torch.Tensor, code_BYXC: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_BCHW, grad_bias_C = _pool_backward_fake(grad_BCYX, code_BYXC, height, width)
    bias_KC = grad_bias_C.new_empty((_blocks(len(grad_BCYX)), len(grad_bias_C)))
    tensors = (_nhwc(grad_BCYX), code_BYXC, grad_BCHW.permute(0, 2, 3, 1), bias_KC)
    _run("bias_pool_relu_backward", *map(_array, tensors))
    return grad_BCHW, torch.sum(bias_KC, 0, out=grad_bias_C)


_pool_backward = torch.library.custom_op(
    "tmnist::bias_pool_relu_cpu_backward", _run_pool_backward, mutates_args=()
)


@_pool_backward.register_fake
def _pool_backward_fake(
    grad_BCYX: torch.Tensor, code_BYXC: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num, channels = grad_BCYX.shape[:2]
    grad_BHWC = grad_BCYX.new_empty((num, height, width, channels))
    return grad_BHWC.permute(0, 3, 1, 2), grad_BCYX.new_empty((channels,), dtype=torch.float32)


def _run_conv(
    image_BHW: torch.Tensor,
    weight_C133: torch.Tensor,
    bias_C: torch.Tensor,
    dtype: torch.dtype,
    keeps_code: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    y_BCYX, code_BYXC = _conv_fake(image_BHW, weight_C133, bias_C, dtype, keeps_code)
    weight_TC = (weight_C133.detach().reshape(len(bias_C), 9).T * SCALE).contiguous()
    arrays = map(_array, (weight_TC, _copied(bias_C), y_BCYX.permute(0, 2, 3, 1)))
    code = _array(code_BYXC) if keeps_code else None
    _run("conv_pool_relu_forward", _padded(image_BHW), *arrays, code)
    return y_BCYX, code_BYXC


_conv = torch.library.custom_op("tmnist::conv_pool_relu_cpu", _run_conv, mutates_args=())


@_conv.register_fake
def _conv_fake(
    image_BHW: torch.Tensor,
    weight_C133: torch.Tensor,
    bias_C: torch.Tensor,
    dtype: torch.dtype,
    keeps_code: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    num, height, width = image_BHW.shape
    y_BCYX, code_BYXC = _pooled(image_BHW, dtype, (num, weight_C133.shape[0], height, width))
    return y_BCYX, code_BYXC if keeps_code else code_BYXC.new_empty(0)


def _run_conv_backward(
    grad_BCYX: torch.Tensor, code_BYXC: torch.Tensor, image_BHW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    num, channels = grad_BCYX.shape[:2]
    weight_KTC = torch.empty((_blocks(num), 9, channels))
    bias_KC = torch.empty((_blocks(num), channels))
    grads = (_array(t) for t in (_nhwc(grad_BCYX), code_BYXC))
    sums = (_array(t) for t in (weight_KTC, bias_KC))
    _run("conv_pool_relu_backward", *grads, _padded(image_BHW), *sums)
    weight_TC = weight_KTC.sum(0) * SCALE
    return weight_TC.T.reshape(channels, 1, 3, 3).contiguous(), bias_KC.sum(0)


_conv_backward = torch.library.custom_op(
    "tmnist::conv_pool_relu_cpu_backward", _run_conv_backward, mutates_args=()
)


@_conv_backward.register_fake
def _conv_backward_fake(
    grad_BCYX: torch.Tensor, code_BYXC: torch.Tensor, image_BHW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    channels = grad_BCYX.shape[1]
    new = grad_BCYX.new_empty
    return new((channels, 1, 3, 3), dtype=torch.float32), new((channels,), dtype=torch.float32)


def _save_pool(
    ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]
) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.height_width = inputs[0].shape[2:]


def _differentiate_pool(ctx: Any, grad_BCYX: torch.Tensor, _: None) -> object:
    return _pool_backward(grad_BCYX, *ctx.saved_tensors, *ctx.height_width)


def _save_conv(
    ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]
) -> None:
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_conv(ctx: Any, grad_BCYX: torch.Tensor, _: None) -> tuple[object, ...]:
    return None, *_conv_backward(grad_BCYX, *ctx.saved_tensors), None, None


_pool.register_autograd(_differentiate_pool, setup_context=_save_pool)
_conv.register_autograd(_differentiate_conv, setup_context=_save_conv)


class _Pool(torch.autograd.Function):
    """The operator outside of torch.compile: it spares the way through torch's dispatcher.

    Its forward saves by itself: with a setup_context torch binds the arguments by their signature,
    which takes longer than the way that is spared.
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: torch.Tensor, bias_C: torch.Tensor) -> Any:
        output = _run_pool(x_BCHW, bias_C)
        _save_pool(ctx, (x_BCHW, bias_C), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _run_pool_backward(grads[0], *ctx.saved_tensors, *ctx.height_width)


class _Conv(torch.autograd.Function):
    """Likewise."""

    @staticmethod
    def forward(ctx: Any, image_BHW: torch.Tensor, *others: Any) -> Any:
        output = _run_conv(image_BHW, *others)
        _save_conv(ctx, (image_BHW,), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = _run_conv_backward(grads[0], *ctx.saved_tensors)
        return None, *found, None, None


def bias_pool_relu(x_BCHW: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor:
    """relu(max_pool2d(x, 2) + bias) of fp32 or bf16 on a CPU; see bias_pool_relu.py."""
    operator: Any = _pool if torch.compiler.is_compiling() else _Pool.apply
    y_BCYX: torch.Tensor = operator(x_BCHW, bias_C)[0]
    return y_BCYX


def conv_pool_relu(
    image_BHW: torch.Tensor,
    weight_C133: torch.Tensor,
    bias_C: torch.Tensor,
    dtype: torch.dtype,
    keeps_code: bool,
) -> torch.Tensor:
    """relu(max_pool2d(conv2d(image / 255, weight, padding=1) + bias, 2)); see conv_pool_relu.py."""
    operator: Any = _conv if torch.compiler.is_compiling() else _Conv.apply
    y_BCYX: torch.Tensor = operator(image_BHW, weight_C133, bias_C, dtype, keeps_code)[0]
    return y_BCYX


def warps(image_NHW: torch.Tensor) -> bool:
    """Whether `warp` takes these images: uint8 on a CPU, where numba can be imported."""
    return image_NHW.device.type == "cpu" and image_NHW.dtype == torch.uint8 and is_here()


def warp(
    image_NHW: torch.Tensor, row_M: torch.Tensor, matrix_M23: torch.Tensor, out_MHW: torch.Tensor
) -> None:
    """out[m] = image[row[m]] through matrix[m]; see gather_warp.py. All contiguous, rows trusted.

    A grey value is the nearest to the exact one, but for fp32's rounding of coordinates and sums.
    """
    from kernels import warp_jit

    num_pixels = out_MHW[0].numel() if len(out_MHW) else 0
    if not num_pixels:
        return
    _, height, width = image_NHW.shape
    flat = (image_NHW.view(-1, num_pixels), row_M, matrix_M23.view(-1, 6))
    places = (*_centres(height, width), np.array([height, width]))
    _start(warp_jit.warp, *map(_array, flat), *places, _array(out_MHW.view(-1, num_pixels)))


@lru_cache(maxsize=2)
def _centres(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 (x_P, y_P) of each pixel's centre."""
    y_HW, x_HW = np.mgrid[:height, :width].astype(np.float32) + np.float32(0.5)
    return x_HW.ravel(), y_HW.ravel()
