"""Time and memory: a stopwatch that waits for the device, spans, peak memory, NVML's readings.

These are None where there is no GPU or it does not report them; nothing here guesses.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch

GIB = 2**30
_CPU = torch.device("cpu")


class Stopwatch:
    """Adds up the time between start() and stop(): device events on CUDA, the wall clock elsewhere.

    stop() synchronises the device; call it at an epoch's end, never in the step.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._wall_s = self._paused_s = 0.0
        self.total_s = 0.0

    def start(self) -> None:
        if self._on_gpu:
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()
        else:
            self._wall_s = time.perf_counter()

    def stop(self) -> float:
        """Seconds since start()."""
        if self._on_gpu:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            end.synchronize()
            lap_s = float(self._begin.elapsed_time(end)) / 1000
        else:
            lap_s = time.perf_counter() - self._wall_s
        self.total_s += lap_s
        return lap_s

    def pause(self) -> None:
        """Let a wall clock stand still until `resume`: others have their turn.

        A GPU's goes on: what others do there is done beside this, or before it.
        """
        self._paused_s = time.perf_counter()

    def resume(self) -> None:
        self._wall_s += time.perf_counter() - self._paused_s

    def lap(self) -> float:
        """Seconds since start() or the last lap; goes on."""
        lap_s = self.stop()
        self.start()
        return lap_s


_OFF = nullcontext()
_tracing = False


@contextmanager
def tracing() -> Iterator[None]:
    """Spans of this process open ranges while this is entered (tools/measure/trace.py);
    otherwise they do nothing."""
    global _tracing
    _tracing = True
    try:
        yield
    finally:
        _tracing = False


def span(name: str) -> AbstractContextManager[object]:
    """A named part of the step in torch.profiler's trace and, on a GPU, in Nsight's; off, free."""
    return _range(name) if _tracing else _OFF


@contextmanager
def _range(name: str) -> Iterator[None]:
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else _OFF
    with torch.profiler.record_function(name), nvtx:
        yield


def host_peak_rss_gib() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def torch_peak_gib(device: torch.device) -> float | None:
    """Highest memory torch's allocator held on the GPU."""
    return torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else None


def reset_torch_peak(device: torch.device) -> None:
    """Let torch_peak_gib start anew: what an earlier session cached is given back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Name, power limit, driver and CUDA version of the GPU; empty on a CPU."""
    if device.type != "cuda":
        return {}
    facts: dict[str, Any] = {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts | Nvml(device).facts()


class Nvml:
    """NVML's view of one GPU: a reading that is not supported is None."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        if device.type != "cuda":
            return
        with suppress(Exception):  # no library, no permission, a container without it
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def facts(self) -> dict[str, Any]:
        limit_mw = self._read("nvmlDeviceGetPowerManagementLimit")
        default_mw = self._read("nvmlDeviceGetPowerManagementDefaultLimit")
        driver = None
        if self._handle:
            with suppress(self._nvml.NVMLError):
                driver = self._nvml.nvmlSystemGetDriverVersion()
        return {
            "power_limit_w": None if limit_mw is None else limit_mw / 1000,
            "default_power_limit_w": None if default_mw is None else default_mw / 1000,
            "driver": driver,
        }

    def used_gib(self) -> float | None:
        memory = self._read("nvmlDeviceGetMemoryInfo")
        return None if memory is None else memory.used / GIB

    def utilisation_percent(self) -> float | None:
        """Part of the last sampling period in which a kernel ran."""
        rates = self._read("nvmlDeviceGetUtilizationRates")
        return None if rates is None else float(rates.gpu)

    def power_w(self) -> float | None:
        power_mw = self._read("nvmlDeviceGetPowerUsage")
        return None if power_mw is None else power_mw / 1000

    def energy_j(self) -> float | None:
        """Since the driver was loaded; too coarse for spans under some seconds."""
        energy_mj = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if energy_mj is None else energy_mj / 1000

    def energy_since(self, earlier_j: float | None) -> float | None:
        """What was used since `energy_j` gave `earlier_j`."""
        now_j = self.energy_j()
        return None if earlier_j is None or now_j is None else now_j - earlier_j

    def _read(self, function: str) -> Any:
        if self._handle is None:
            return None
        try:
            return getattr(self._nvml, function)(self._handle)
        except self._nvml.NVMLError:
            return None


class Ledger:
    """GPU memory by owner: what NVML calls used, before and after each owner's creation; a CPU's
    stays empty.

    It is the whole device's, so another process that comes or goes in between falsifies it. "model
    and optimiser" holds the activations of the warm-up too, as torch's allocator keeps them.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self._nvml = Nvml(device)
        self._used_gib = self._nvml.used_gib()
        self.gib: dict[str, float] = {}

    def mark(self, owner: str) -> None:
        """What came since the last mark is `owner`'s."""
        used_gib = self._nvml.used_gib()
        if used_gib is not None and self._used_gib is not None:
            self.gib[owner] = self.gib.get(owner, 0.0) + used_gib - self._used_gib
        self._used_gib = used_gib
