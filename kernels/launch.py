"""What the kernels share: where they run, checks that are sentences, what starts them.

On CUDA tensors a kernel runs, on CPU tensors its reference does, unless Triton's interpreter is on
(TRITON_INTERPRET=1 before the import): then the kernel runs everywhere, slowly, for proofs. While
`listening` nothing runs: who listens gets what would have been started.

A *code* is what a pool keeps for its backward: for each pooled position and channel two bits that
name the winner of four, 2 y + x in its window, and one that says whether the ReLU let it pass.
32 channels are a word: int32 [3, positions, channels / 32], the planes being the winner's low bits,
its high bits, and the passing bits.

Shapes: B samples, H x W pixels, P pooled positions of all samples, C channels, G = C / 32 groups.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
LANES = 32
"""Channels of a group: one bit each in a word of the code."""
LARGEST = 2**31
"""Elements that 32-bit offsets reach."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Listener = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
"""Gets a kernel, its arguments and its constants."""
_listener: tuple[Listener, int] | None = None


@contextmanager
def listening(listener: Listener, processors: int) -> Iterator[None]:
    """While this is entered, launchers start nothing: they tell the listener what they would start.

    They do so for tensors of any device, as on a GPU of so many multiprocessors; results stay
    uninitialised. For counting launches and bytes where there is no GPU; one listener at a time.
    """
    global _listener
    assert _listener is None, "somebody listens already"
    _listener = (listener, processors)
    try:
        yield
    finally:
        _listener = None


def on_triton(tensor: torch.Tensor) -> bool:
    """Whether the kernel runs for this tensor, rather than its reference."""
    return tensor.is_cuda or INTERPRETED or _listener is not None


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Start a kernel on the current stream."""
    if _listener is not None:
        _listener[0](kernel, args, constants)
        return
    kernel[grid](*args, **constants)


def num_processors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's GPU; 1 elsewhere."""
    if _listener is not None:
        return _listener[1]
    if not tensor.is_cuda:
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def share(tensor: torch.Tensor, num_items: int, block: int, per_processor: int) -> tuple[int, int]:
    """(programs, turns of each) that walk over items in blocks.

    There are at most `per_processor` programs a multiprocessor. Turns are a constant of the kernel:
    with numpy 2.4 the interpreter cannot loop to a number it reads.
    """
    num_blocks = -(-num_items // block)
    programs = min(num_blocks, per_processor * num_processors(tensor))
    return programs, -(-num_blocks // programs)


def check(
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    like: torch.Tensor,
    any_size: bool = False,
) -> None:
    """Raise ValueError with a sentence unless the tensor fits.

    It must have one of the types, the shape (None: any size), and like's device. It must also be
    reached by 32-bit offsets, but for `any_size`.
    """
    fits = len(shape) == tensor.dim() and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{name} has shape {list(tensor.shape)}; give {wanted}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; give {' or '.join(map(str, dtypes))}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; move it to {like.device}")
    if tensor.numel() >= LARGEST and not any_size:
        raise ValueError(
            f"{name} has {tensor.numel():,} elements; give fewer than 2^31, e.g. a smaller batch"
        )


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; give .contiguous()")


def check_channels(num_channels: int) -> None:
    if num_channels % LANES:
        raise ValueError(
            f"{num_channels} channels are not a multiple of {LANES}; leave this kernel off for them"
        )


def empty_pooled(
    like: torch.Tensor, dtype: torch.dtype, shape_BCHW: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y_BCYX in channels-last memory, code_3PG) of a pooled [B, C, H, W].

    Both are uninitialised, on the device of `like`.
    """
    batch_size, channels, height, width = shape_BCHW
    y_BYXC = like.new_empty((batch_size, height // 2, width // 2, channels), dtype=dtype)
    num_positions = batch_size * (height // 2) * (width // 2)
    code_3PG = like.new_empty((3, num_positions, channels // LANES), dtype=torch.int32)
    return y_BYXC.permute(0, 3, 1, 2), code_3PG


def pack_code(winner_PC: torch.Tensor, passes_PC: torch.Tensor) -> torch.Tensor:
    """The code of winners 0..3 and passing bits, in PyTorch."""
    lane = torch.arange(LANES, device=winner_PC.device)
    planes_3PC = torch.stack([winner_PC & 1, winner_PC >> 1, passes_PC.long()])
    planes_3PGL = planes_3PC.view(3, len(winner_PC), -1, LANES)
    return (planes_3PGL << lane).sum(3).to(torch.int32)  # bit 31 wraps into the sign


def unpack_code(code_3PG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(winner_PC int64 in 0..3, passes_PC bool), in PyTorch."""
    lane = torch.arange(LANES, device=code_3PG.device)
    low, high, passes = (code_3PG.long()[..., None] >> lane & 1).flatten(2)
    return low + 2 * high, passes.bool()


def pool_reference(x_BCHW: torch.Tensor, bias_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(relu(max_pool2d(x, 2) + bias), its code); of equal values the first wins, NaN always."""
    batch_size, channels, height, width = x_BCHW.shape
    shape = (batch_size, channels, height // 2, 2, width // 2, 2)
    window_BCY2X2 = x_BCHW[:, :, : height // 2 * 2, : width // 2 * 2].reshape(shape)
    four_BCYX4 = window_BCY2X2.permute(0, 1, 2, 4, 3, 5).flatten(4)
    winner = four_BCYX4.argmax(4)  # the first of equals, by its documentation
    y = four_BCYX4.amax(4) + bias_C.to(x_BCHW.dtype)[:, None, None]
    passes = ~(y <= 0)
    winner_PC = winner.permute(0, 2, 3, 1).reshape(-1, channels)
    passes_PC = passes.permute(0, 2, 3, 1).reshape(-1, channels)
    return torch.where(passes, y, 0), pack_code(winner_PC, passes_PC)


def unpool_reference(
    grad_BCYX: torch.Tensor, code_3PG: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of x [B, C, H, W], of the bias [C]) of pool_reference."""
    batch_size, channels, rows, columns = grad_BCYX.shape
    shape = (batch_size, rows, columns, channels)
    winner, passes = (t.view(shape).permute(0, 3, 1, 2) for t in unpack_code(code_3PG))
    live = torch.where(passes, grad_BCYX, 0)
    place_4 = torch.arange(4, device=live.device)
    four_BCYX4 = torch.where(winner[..., None] == place_4, live[..., None], 0)
    window_BCYX22 = four_BCYX4.view(batch_size, channels, rows, columns, 2, 2)
    window_BCY2X2 = window_BCYX22.permute(0, 1, 2, 4, 3, 5)
    inside_BCHW = window_BCY2X2.reshape(batch_size, channels, 2 * rows, 2 * columns)
    grad_BCHW = live.new_zeros((batch_size, channels, height, width))
    grad_BCHW[:, :, : 2 * rows, : 2 * columns] = inside_BCHW
    return grad_BCHW, live.sum((0, 2, 3))
