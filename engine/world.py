"""The process: its rank among others, its device, its threads and allocator. The only reader of RANK and friends.

Does not train; the trainer passes a World to everything that must know where it runs.
"""

import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import kernels
from engine.clock import Ledger
from engine.errors import UserError
from engine.publish import writing

COLLECTIVE_TIMEOUT = timedelta(seconds=120)
HEAP_THRESHOLD_BYTES = 32 * 2**20
"""glibc's largest mmap threshold on 64 bit (HEAP_MAX_SIZE / 2); smaller blocks are kept, not returned after a step."""


@dataclass(frozen=True, kw_only=True)
class World:
    """One process of a run."""

    rank: int
    size: int
    device: torch.device
    stream: "torch.cuda.Stream | None"
    """The side stream on which everything of the run is done (a graph must be warmed up and captured on one stream)."""
    allocator: str = "default"
    """What `keep_large_blocks` reached."""
    ledger: Ledger = field(default_factory=Ledger)
    """GPU memory by owner; empty on a CPU."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over all ranks, a new tensor on the device."""
        total = values.to(self.device, copy=True)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def synchronize(self) -> None:
        """Wait for the device, then for the other ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.size > 1:
            dist.barrier()

    def first_reason(self, reason: str) -> str:
        """The reason of the lowest rank that has one, on every rank; empty where none has. Collective."""
        if self.size == 1:
            return reason
        text_RX = torch.zeros(self.size, 400, dtype=torch.uint8)
        text = torch.tensor(list(reason.encode()[:400]), dtype=torch.uint8)
        text_RX[self.rank, : len(text)] = text
        texts = [
            bytes(row).rstrip(b"\0").decode(errors="replace") for row in self.sum(text_RX).tolist()
        ]
        return next((f"rank {rank}: {text}" for rank, text in enumerate(texts) if text), "")

    def first(self, work: Callable[[], None]) -> None:
        """Let rank 0 do `work` while the others wait; where it fails, every rank ends.

        Raises:
            Exception: on rank 0 its own.
            UserError: on the other ranks.
        """
        failed: Exception | None = None
        if self.is_first:
            try:
                work()
            except Exception as error:  # handed on below, after the others were told
                failed = error
        if self.sum(torch.tensor([float(failed is not None)])).item() > 0:
            if failed:
                raise failed
            raise UserError("rank 0 could not go on")


def env_rank() -> int:
    """This process's rank as torchrun gave it; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def env_world_size() -> int:
    """Number of processes as torchrun gave it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def start_world(device_name: str = "") -> Iterator[World]:
    """Join the process group and leave it at the end, also on errors.

    Args:
        device_name: "cpu" or "cuda"; empty: CUDA where there is a GPU.
    Raises:
        UserError: more ranks on this machine than GPUs.
    """
    check_ranks(device_name)
    allocator = "glibc, freed blocks up to 32 MiB kept" if keep_large_blocks() else "default"
    on_gpu = torch.cuda.is_available() and device_name != "cpu"
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if on_gpu
        else torch.device("cpu")
    )
    size, ledger = env_world_size(), Ledger(device)
    if on_gpu:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # makes the context
        ledger.mark("context")
    if size > 1:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if on_gpu else None,
        )
        ledger.mark("NCCL")
    stream = torch.cuda.Stream(device) if on_gpu else None
    try:
        yield World(
            rank=env_rank(),
            size=size,
            device=device,
            stream=stream,
            allocator=allocator,
            ledger=ledger,
        )
    finally:
        if size > 1:
            dist.destroy_process_group()


def end_rank() -> None:
    """End a rank of several at once, with success, without the interpreter's shutdown.

    Gloo's threads may still be letting go of the last collective's tensors; one that asks for the interpreter while it
    shuts down aborts the process ("terminate called without an active exception": once in some 70 runs of two ranks).
    """
    if env_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def check_ranks(device_name: str = "") -> None:
    """Refuse what cannot work before any process group exists."""
    if device_name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch sees no GPU; check the driver and torch.version.cuda, or use --device cpu"
        )
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if (
        torch.cuda.is_available()
        and device_name != "cpu"
        and local_ranks > torch.cuda.device_count()
    ):
        raise UserError(
            f"{local_ranks} ranks on a machine with {torch.cuda.device_count()} GPUs; "
            "start torchrun with --nproc-per-node of at most that number"
        )


def keep_large_blocks() -> bool:
    """Make glibc keep freed blocks of up to 32 MiB instead of unmapping them.

    A CPU step at batch 512 frees some 200 MB of activations; by default each step maps and zeroes them anew, and page
    faults cost a third of its time. As MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ would, without a restart.

    Call it at the process's start: after records were read it is worth less (9.9k, 11.2k, 12.1k against 11.8k, 12.8k,
    13.3k samples/s, medians of interleaved processes on two cores, 2026-11-22).

    Returns:
        Whether the setting took (false where the C library is not glibc).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    m_mmap_threshold, m_trim_threshold, m_top_pad = -3, -1, -2  # malloc.h
    settings = (
        (m_mmap_threshold, HEAP_THRESHOLD_BYTES),
        (m_trim_threshold, 2**31 - 1),
        (m_top_pad, 64 * 2**20),
    )
    return all(mallopt(name, value) == 1 for name, value in settings)


def user_cache() -> Path:
    """The user's own folder for what may be made anew: $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tmnist-engine"


def keep_compiled_code_private() -> None:
    """Let torch.compile and Triton keep their files in folders that are the user's alone; inductor's lies in /tmp."""
    for name, folder_name in (
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("TRITON_CACHE_DIR", "triton"),
    ):
        if name not in os.environ:
            folder = user_cache() / folder_name
            with writing(folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.environ[name] = str(folder)


def cannot_compile(device: torch.device) -> str:
    """Why torch.compile would fail here; empty where it has what it needs."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"it needs a C++ compiler, and there is no {compiler}"
    return kernels.missing() if device.type == "cuda" else ""


def cannot_fuse(device: torch.device) -> str:
    """Why the Triton kernels would fail here, or not be worth it; empty where they run.

    Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU, some thousand times slower: for proofs.
    """
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU"
    if why := kernels.missing():
        return why
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "they need a GPU of compute capability 8.0 (Ampere) or newer"
    return ""


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 instructions (without them a CPU is 6 times slower than in fp32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            flags = next(line for line in info if line.startswith(("flags", "Features"))).split()
    except (OSError, StopIteration):
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
