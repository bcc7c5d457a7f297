"""The process in its group: rank, device, sums over all ranks; and what this machine supports.

Does not train; the trainer passes a World to everything that must know where it runs. What needs no
torch (variables, home, memory) is host.py's.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import kernels
from engine.errors import UserError
from engine.heart import Heart
from engine.host import (
    env_local_rank,
    env_local_world_size,
    keep_large_blocks,
    limit_threads,
)
from engine.meters import Ledger, gpu_facts
from engine.ranks import OtherRankFailed, Ranks, join_ranks
from engine.report import Environment, environment

TIMEOUT_S = 60.0
BEYOND_WATCH = timedelta(seconds=300)
"""A collective's own time-out is later than engine/heart.py's, which knows whom to name."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """One process of a run."""

    rank: int
    size: int
    device: torch.device
    stream: "torch.cuda.Stream | None"
    """The side stream of all the run's work: a graph is warmed up and captured on one stream."""
    allocator: str = "default"
    """What `keep_large_blocks` reached."""
    ledger: Ledger = field(default_factory=Ledger)
    """GPU memory by owner; empty on a CPU."""
    hosts: Any = None
    """The process group of collectives between the hosts; None: the default one, on a CPU."""
    heart: Heart = field(default_factory=Heart)
    """What this rank is doing, for the others to see."""

    def at(self, step: int, doing: str) -> None:
        """Note what this rank is doing, and that it goes on."""
        self.heart.step = step
        self.heart.doing = doing
        self.heart.num_signs += 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def environment(self) -> Environment:
        """The circumstances of what this process trains or measures."""
        gpu, num_threads = gpu_facts(self.device), torch.get_num_threads()
        return environment(num_threads=num_threads, allocator=self.allocator, gpu=gpu)

    def on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over all ranks, a new tensor on the device."""
        total = values.to(self.device, copy=True)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def most(self, values: list[float]) -> list[float]:
        """The greatest of each number over all ranks.

        Collective, on the hosts alone: the device goes on meanwhile.
        """
        if self.size == 1:
            return values
        greatest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(greatest, dist.ReduceOp.MAX, group=self.hosts)
        return list(greatest.tolist())

    def text_of_first(self, text: str) -> str:
        """Rank 0's text on every rank. Collective."""
        if self.size == 1:
            return text
        data = text.encode()
        length = torch.tensor(len(data))
        dist.broadcast(length, 0, group=self.hosts)
        if not length:
            return ""  # torch makes no tensor of an empty buffer
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_first:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, 0, group=self.hosts)
        return bytes(buffer.tolist()).decode()

    def copy_from_first(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with rank 0's. Collective."""
        if self.size > 1:
            same = tensor.detach().to(self.device, copy=True)
            dist.broadcast(same, 0)
            tensor.detach().copy_(same)

    def synchronize(self) -> None:
        """Wait for the device, then for the other ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.size > 1:
            dist.barrier()

    def first_reason(self, reason: str) -> str:
        """The reason of the lowest rank that has one, on every rank, or "". Collective."""
        if self.size == 1:
            return reason
        text_RX = torch.zeros(self.size, 400, dtype=torch.uint8)
        text = torch.tensor(list(reason.encode()[:400]), dtype=torch.uint8)
        text_RX[self.rank, : len(text)] = text
        texts = [
            bytes(row).rstrip(b"\0").decode(errors="replace") for row in self.sum(text_RX).tolist()
        ]
        return next((f"rank {rank}: {text}" for rank, text in enumerate(texts) if text), "")

    def first(self, work: Callable[[], T]) -> T | None:
        """What rank 0 gets from `work` while the others wait; they get None.

        Where it fails, every rank ends.

        Raises:
            Exception: on rank 0 its own.
            OtherRankFailed: on the other ranks.
        """
        failed: Exception | None = None
        result: T | None = None
        if self.is_first:
            try:
                result = work()
            except Exception as error:  # raised below, after the others know
                failed = error
        if self.sum(torch.tensor([float(failed is not None)])).item() > 0:
            if failed:
                raise failed
            raise OtherRankFailed("rank 0 could not go on")
        return result


@contextmanager
def start_world(
    device_name: str = "", ranks: Ranks | None = None, timeout_s: float = TIMEOUT_S
) -> Iterator[World]:
    """Join the process group and leave it at the end, also on errors.

    Args:
        device_name: "cpu" or "cuda"; empty: CUDA where there is a GPU.
        ranks: those already met; None: meet them.
        timeout_s: how long ranks wait for one that hangs.
    Raises:
        UserError: more ranks on a machine than GPUs; or what another rank ended with.
    """
    ranks = ranks or join_ranks()
    ranks.agree(lambda: check_ranks(device_name))
    allocator = "glibc, freed blocks up to 32 MiB kept" if keep_large_blocks() else "default"
    limit_threads()
    # Adam's moments of weights that get no more gradients fade to denormal numbers, with which a
    # CPU computes many times slower. OpenMP's threads take this over when they are started.
    torch.set_flush_denormal(True)
    on_gpu = torch.cuda.is_available() and device_name != "cpu"
    device = torch.device("cuda", env_local_rank()) if on_gpu else torch.device("cpu")
    ledger = Ledger(device)
    if on_gpu:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # makes the context
        ledger.mark("context")
    heart = Heart()
    with ranks.explaining(), ranks.watching(heart, timeout_s):
        try:
            hosts = _join_group(ranks, device, timeout_s)
            ledger.mark("NCCL")
            yield World(
                rank=ranks.rank,
                size=ranks.size,
                device=device,
                stream=torch.cuda.Stream(device) if on_gpu else None,
                allocator=allocator,
                ledger=ledger,
                hosts=hosts,
                heart=heart,
            )
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _join_group(ranks: Ranks, device: torch.device, timeout_s: float) -> Any:
    """Join the process group; the group of the hosts, None where it is the same."""
    if ranks.size == 1:
        return None
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=ranks.store,
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=timedelta(seconds=timeout_s) + BEYOND_WATCH,
        device_id=device if on_gpu else None,
    )
    return dist.new_group(backend="gloo") if on_gpu else None


def check_ranks(device_name: str = "") -> None:
    """Refuse what cannot work before any process group exists."""
    if device_name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch sees no GPU; check the driver and torch.version.cuda, "
            "or use --device cpu"
        )
    local_ranks = env_local_world_size()
    on_gpu = torch.cuda.is_available() and device_name != "cpu"
    if on_gpu and local_ranks > torch.cuda.device_count():
        raise UserError(
            f"{local_ranks} ranks on a machine with {torch.cuda.device_count()} GPUs; "
            "start torchrun with --nproc-per-node of at most that number"
        )


def cannot_compile(device: torch.device) -> str:
    """Why torch.compile would fail here; empty where it has what it needs."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"it needs a C++ compiler, and there is no {compiler}"
    return kernels.missing() if device.type == "cuda" else ""


def fused_on_cpu(device: torch.device) -> tuple[str, ...]:
    """Those of kernels.NAMES that are compiled for a CPU, if it is one and numba is here."""
    if device.type != "cpu":
        return ()
    from kernels import cpu

    return kernels.ON_CPU if cpu.is_here() else ()


def cannot_fuse(device: torch.device) -> str:
    """Why the Triton kernels would fail here, or not be worth it; empty where they run.

    Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU, some thousand times slower: for
    proofs.
    """
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU"
    if why := kernels.missing():
        return why
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "they need a GPU of compute capability 8.0 (Ampere) or newer"
    return ""


def cannot_fp8(device: torch.device) -> str:
    """Why products of 8-bit floats would fail here; empty where they run, by a CPU emulated."""
    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no such products"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "it needs a GPU of compute capability 8.9 (Ada, Hopper) or newer"
    return ""


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 instructions; without, a CPU is 6 times slower than in fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            flags = next(line for line in info if line.startswith(("flags", "Features"))).split()
    except (OSError, StopIteration):
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
