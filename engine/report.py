"""RunReport: what a run did, with every circumstance a figure needs.

No torch at import, and no sensor is read here.

Names end in their unit: _s, _ms, _per_s, _gib, _bytes, _w, _j, _percent, _fraction (0..1); num_
counts.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from engine.config import ModelConfig, RunConfig
from engine.durable import Damaged, write_file
from engine.errors import UserError
from engine.host import ROOT, num_cpus
from engine.paths import without_credentials
from engine.typed import read_as

UNKNOWN = "unknown"
FORMAT = 1
INPUT = "uint8 [B, H, W], grey values row by row as in the records"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where a figure was made. None means: not there, or the machine does not report it."""

    cpu_name: str
    num_cpus: int
    num_threads: int
    """torch's intra-op threads in each rank."""
    allocator: str
    gpu_name: str | None
    gpu_power_limit_w: float | None
    gpu_driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    dali: str | None
    numpy: str
    python: str
    commit: str
    """Git commit, else $ENGINE_COMMIT, else "unknown"."""
    dirty: bool | None
    """Whether tracked files differed from the commit; None without git."""
    command: str


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Steps that were trained without a stop between them, and under what."""

    first_step: int
    num_steps: int
    train_s: float
    wait_s: float
    """Time the host waited for the feed."""
    num_ranks: int
    effective: dict[str, Any]
    environment: Environment
    global_batch: int = 0
    """0: the config's."""


@dataclass(frozen=True, kw_only=True)
class EpochBatch:
    """An epoch of the curve of batches: what it was trained with, and the noise scale at its end.

    None: not measured, or not known yet.
    """

    epoch: int
    """From 1."""
    global_batch: int
    learning_rate: float
    """Highest of the schedule with this batch."""
    num_steps: int
    train_s: float
    critical_batch: float | None
    """Samples beyond which larger batches save few steps: variance over squared norm."""
    gradient_variance: float | None
    """Of one sample's gradient, summed over the parameters."""
    gradient_squared_norm: float | None
    """Of the true gradient."""


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """What training keeps on one rank between two steps; what FSDP gathers in them is not in it."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes


@dataclass(frozen=True, kw_only=True)
class NetworkFacts:
    """What a network takes and what its answers mean; its weights' file says it, too."""

    model: ModelConfig
    """Which network; without the place of a file of the user's own."""
    classes: list[str]
    """Logit number k is of classes[k]."""
    height_pixels: int
    width_pixels: int
    input: str = INPUT
    scaling: str
    """How grey values become numbers; the network does it itself."""
    pixel_mean: float
    """Of the training images, 0..255: low where what is drawn is light on a dark ground."""
    dataset_fingerprint: str
    """Of the records it was trained on."""
    version: str
    """Of the engine that trained it."""
    commit: str
    dirty: bool | None
    """Whether tracked files differed from the commit; None without git."""


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What one training run did: its report.json."""

    format: int = FORMAT
    environment: Environment
    config: RunConfig
    """As asked for; of its path the last part only."""
    config_digest: str
    dataset_fingerprint: str
    requested: dict[str, Any]
    """Precision, graphs and feed as asked for."""
    effective: dict[str, Any]
    """The same as they were."""
    notes: list[str]
    """Why the two differ, a sentence each."""
    clock_includes: str
    num_ranks: int
    num_parameters: int
    num_train_samples: int
    num_epochs: int
    num_steps: int
    num_skipped_steps: int
    """Of this process: fp16 steps whose gradients overflowed."""
    train_s: float
    """Training time of all epochs, resumed parts included."""
    samples_per_s: float
    data_wait_fraction: float
    """Part of the training time the host waited for the feed."""
    order_reach_fraction: float
    """Part of all samples that a batch may draw from: 1 in the exact order, less in blocked."""
    warmup_s: float
    eval_s: float
    val_accuracy_fraction: float | None
    test_accuracy_fraction: float | None
    test_loss: float | None
    time_to_target_s: float | None
    host_peak_rss_gib: float
    torch_peak_gib: float | None
    device_used_gib: float | None
    """Memory in use on the whole device, by NVML."""
    gpu_utilisation_percent: float | None
    gpu_energy_j: float | None
    status: Literal["finished", "stopped", "unfinished"] = "finished"
    """stopped: by a signal, saved; unfinished: still running, or killed."""
    segments: list[Segment] = field(default_factory=list)
    """What the run consists of; more than one where it was resumed, or its batch changed."""
    batches: list[EpochBatch] = field(default_factory=list)
    """Of each epoch."""
    kept: RankBytes | None = None
    """On rank 0, which keeps as much as any other."""
    kept_under_ddp: RankBytes | None = None
    """What each rank would keep there."""
    network: NetworkFacts | None = None
    """None: an earlier version wrote this."""

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this engine reads {FORMAT}")


def write_json(value: Any, path: Path) -> None:
    """Write a report dataclass or plain tree as strict JSON (no NaN), whole or not at all."""
    tree = value if isinstance(value, (dict, list)) else asdict(value)
    write_file(path, (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode())


SWEEP = "sweep.toml"
"""Of a folder whose folders are runs (train/sweep.py); they hold the reports."""


def read_report(run_folder: Path) -> RunReport:
    """The report of a finished run.

    Raises:
        UserError: the folder holds none, or one that is damaged or of another format.
    """
    path = run_folder / "report.json"
    remedy = "name the folder of a finished run"
    try:
        return read_as(RunReport, path)
    except OSError as error:
        why = f"holds no report.json that can be read ({error.strerror})"
        if not run_folder.exists():
            why = "no such file or folder"
        elif (run_folder / SWEEP).is_file():
            why, remedy = "is a sweep", "name the folder of one of its members"
        raise UserError(f"{run_folder}: {why}; {remedy}") from None
    except (Damaged, RecursionError) as error:
        raise UserError(f"{path}: is no report of a run ({error}); {remedy}") from None


def environment(*, num_threads: int, allocator: str, gpu: dict[str, Any]) -> Environment:
    """Collect the circumstances.

    Args:
        gpu: name, power_limit_w, driver and cuda as clock.gpu_facts gives them; empty without a
            GPU.
    """
    commit, dirty = git_state()
    return Environment(
        cpu_name=_cpu_name(),
        num_cpus=num_cpus(),
        num_threads=num_threads,
        allocator=allocator,
        gpu_name=gpu.get("name"),
        gpu_power_limit_w=gpu.get("power_limit_w"),
        gpu_driver=gpu.get("driver"),
        cuda=gpu.get("cuda"),
        torch=_version("torch") or UNKNOWN,
        triton=_version("triton"),
        dali=_version("nvidia-dali-cuda120"),
        numpy=_version("numpy") or UNKNOWN,
        python=platform.python_version(),
        commit=commit,
        dirty=dirty,
        command=command_line(),
    )


def command_line() -> str:
    """This process's command, of absolute paths the last part: reports carry no user's folders."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    words = [without_credentials(word) for word in sys.argv[1:]]
    words = [re.sub(r"(^|=)~?/(?:.*/)?", r"\1", word) for word in words]
    return f"{program} {shlex.join(words)}".strip()


def without_folders(value: Any) -> Any:
    """A text, or what a tree holds of texts, with of each absolute path the last part only."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(?<![\w.:/~-])~?/(?:[^/:;,\s]+/)+", "", without_credentials(value))
    return value


def git_state() -> tuple[str, bool | None]:
    """The commit the code runs from, and whether tracked files differ from it.

    Only of this project's own repository: a wheel may be installed inside another's working tree.
    """
    top = _git("rev-parse", "--show-toplevel")
    is_ours = (
        top is not None and Path(top).resolve() == ROOT and _git("ls-files", "engine/report.py")
    )
    commit = _git("rev-parse", "HEAD") if is_ours else None
    if commit is None:
        return os.environ.get("ENGINE_COMMIT", UNKNOWN), None
    return commit, bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str | None:
    """What git prints of ROOT, whatever repository a hook's variables name; None if it fails."""
    variables = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            env=variables,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            return next(
                line.split(":", 1)[1].strip() for line in info if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or UNKNOWN
