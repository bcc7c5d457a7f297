"""tools/verify doctor: whether this machine can train as fast as it should, check by check.

A check gives a grade, what it looked at, and what it found, with what to do where it is not well.
Nothing is changed.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import meters
from engine.config import RunConfig, override
from engine.data.records import Records
from engine.host import num_cpus
from engine.train.session import open_session
from engine.world import World, cannot_compile, cannot_fuse, has_fast_bf16

Grade = Literal["ok", "note", "BAD"]


class Finding(NamedTuple):
    grade: Grade
    name: str
    text: str


def graded(good: bool, name: str, text: str, otherwise: Grade = "note") -> Finding:
    """Well, or `otherwise`."""
    return Finding("ok" if good else otherwise, name, text)


LOWEST = {
    "torch": (2, 11),
    "triton": (3, 6),
    "numpy": (2, 0),
    "nvidia-dali-cuda120": (2, 4),
    "numba": (0, 61),
}
NEEDED = {"torch", "numpy"}
"""Without the others the engine runs, with less."""
ENVIRONMENT: dict[str, tuple[str, Grade, str]] = {
    "CUDA_LAUNCH_BLOCKING": (
        "1",
        "BAD",
        "every launch waits for the GPU, and graphs cannot be captured; unset it",
    ),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (
        "1",
        "BAD",
        "graphs need torch's caching allocator; unset it",
    ),
    "TORCH_NCCL_BLOCKING_WAIT": (
        "1",
        "BAD",
        "the host waits for each all-reduce, which cannot be captured; unset it",
    ),
    "NCCL_BLOCKING_WAIT": (
        "1",
        "BAD",
        "the host waits for each all-reduce, which cannot be captured; unset it",
    ),
    "TORCH_DISTRIBUTED_DEBUG": (
        "DETAIL",
        "BAD",
        "each collective is checked on the host first; unset it",
    ),
    "NVIDIA_TF32_OVERRIDE": (".*", "note", "overrules step.precision for fp32 and TF32; unset it"),
    "TORCHDYNAMO_DISABLE": ("1", "note", "--compile does nothing; unset it"),
    "PYTORCH_CUDA_ALLOC_CONF": (
        ".*backend:cudaMallocAsync.*",
        "note",
        "graphs hold more memory; take the backend out",
    ),
    "TRITON_INTERPRET": (
        "1",
        "note",
        "Triton kernels run in an interpreter, thousands of times slower; unset it",
    ),
}
"""Variable: the values that harm, how much, and why."""


def doctor(
    records: Records, world: World, environ: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """All findings; the last ones train a few steps."""
    yield from _versions()
    yield from _variables(environ)
    yield from _device(world)
    yield from _compiler(world.device)
    yield from _step(records, world)


def _versions() -> Iterator[Finding]:
    for package, lowest in LOWEST.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            yield Finding(
                "BAD" if package in NEEDED else "note", package, "is not installed; pip install it"
            )
            continue
        numbers = tuple(map(int, found.split("+")[0].split(".")[:2]))
        wanted = ".".join(map(str, lowest))
        if numbers < lowest or (package == "torch" and numbers >= (2, 15)):
            yield Finding(
                "BAD",
                package,
                f"{found}: tested from {wanted} on, torch below 2.15; install such a one",
            )
        else:
            yield Finding("ok", package, found)
    for module, without in (
        ("numba", "records are packed 200 times slower"),
        ("pynvml", "no power or utilisation"),
    ):
        try:
            if find_spec(module):
                __import__(module)
        except Exception as error:  # a module may fail in any way
            why = str(error).partition("\n")[0] or type(error).__name__
            yield Finding("note", module, f"cannot be imported ({why}): {without}")


def _variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    harmful = [
        Finding(grade, name, f"is {environ[name]}: {why}")
        for name, (value, grade, why) in ENVIRONMENT.items()
        if name in environ and re.fullmatch(value, environ[name])
    ]
    yield from harmful or [Finding("ok", "environment", "no variable that harms")]
    threads = torch.get_num_threads()
    cores = num_cpus()
    few = threads <= cores
    yield graded(
        few,
        "threads",
        f"{threads} of torch's on {cores} cores" + "; set OMP_NUM_THREADS" * (not few),
    )


def _device(world: World) -> Iterator[Finding]:
    device = world.device
    bf16 = has_fast_bf16(device)
    yield graded(bf16, "bf16", "has instructions" if bf16 else "none: --amp trains in fp32 here")
    if device.type == "cpu":
        kept = world.allocator != "default"
        yield graded(kept, "allocator", world.allocator if kept else "is not glibc's: slower steps")
        yield Finding("note", "GPU", "torch sees none: CUDA graphs, NCCL and Triton are not used")
        return
    facts = meters.gpu_facts(device)
    memory_gib = torch.cuda.get_device_properties(device).total_memory / meters.GIB
    yield Finding(
        "ok",
        "GPU",
        f"{facts['name']}, {memory_gib:.0f} GiB, CUDA {facts['cuda']}, driver {facts['driver']}",
    )
    limit_w = facts.get("power_limit_w")
    default_w = facts.get("default_power_limit_w")
    if limit_w and default_w and limit_w < 0.95 * default_w:
        yield Finding(
            "note", "power", f"limited to {limit_w:.0f} of {default_w:.0f} W: figures will be lower"
        )
    else:
        yield Finding(
            "ok", "power", f"limit {limit_w:.0f} W" if limit_w else "NVML reports no limit"
        )
    nccl = torch.cuda.nccl.version()
    yield Finding("ok", "NCCL", ".".join(map(str, nccl)))


def _compiler(device: torch.device) -> Iterator[Finding]:
    why = cannot_compile(device)
    yield graded(not why, "torch.compile", why or "has its compiler")
    why = cannot_fuse(device)
    yield graded(not why, "Triton kernels", why or "can be compiled")


def _step(records: Records, world: World) -> Iterator[Finding]:
    on_gpu = world.device.type == "cuda"
    settings = {
        "global_batch": 32 * world.size,
        "step.precision": "bf16",
        "step.cuda_graphs": on_gpu,
    }
    with closing(
        open_session(override(RunConfig(), settings, "doctor"), records, world)
    ) as session:
        reads = host_reads(session.step.train_epoch(session.feed, 0), world.device)
        text = (
            f"the step waits for the device in {', '.join(reads)}; look there"
            if reads
            else "none in 5 steps"
        )
        yield graded(not reads, "hidden waits", text, "BAD")
        if on_gpu:
            failure = session.step.capture_failure
            yield graded(not failure, "CUDA graph", failure or "the whole step was captured", "BAD")
            capturable = all(group["capturable"] for group in session.step.optimizer.param_groups)
            yield graded(capturable, "optimiser", f"capturable: {capturable}", "BAD")


def host_reads(launches: Iterator[Any], device: torch.device, num_launches: int = 5) -> list[str]:
    """The operations of some launches that read a device value on the host, each once.

    On a GPU torch's own watch raises at the first; elsewhere every operation is looked at as it is
    dispatched.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in islice(launches, num_launches):
                pass
        except RuntimeError as error:
            return [str(error).splitlines()[0]]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return []
    with _Watch() as watch:
        for _ in islice(launches, num_launches):
            pass
    return sorted(watch.reads)


class _Watch(TorchDispatchMode):
    """Notes operations that hand a tensor's value to Python: item(), tolist(), bool() and kin."""

    HOST = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.reads: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.HOST:
            self.reads.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
