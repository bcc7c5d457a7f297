"""A run's folder, read without torch: is it free, and does it hold a run that can go on?

RUN/checkpoints/step-000001200/ is a checkpoint after 1,200 steps; folders of other names there are
not ours and stay as they are. Its manifest says where the run stood and what training it is.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import RunConfig
from engine.durable import Damaged, is_empty, parse_json, read_manifest, remove_leftovers
from engine.errors import UserError
from engine.report import SWEEP, EpochBatch, Segment
from engine.train.noise import NoiseScale
from engine.train.schedule import Timing
from engine.typed import typed

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
REPORT = "report.json"
WEIGHTS = "model.safetensors"
CHECKPOINTS = "checkpoints"
PREEMPTED = "preempted"
"""A file that says by which signal a run was stopped; the next start removes it."""
FORMAT = "glyph-checkpoint"
VERSION = 2
NAME = re.compile(r"step-([0-9]{9})")
MAY_CHANGE = ("epochs", "global_batch", "schedule_epochs")
"""Settings of the training that a resumed run may have otherwise; the trainer says what follows.

A schedule of batches keeps its global_batch, which its learning rates go by."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands, and what it had found by then."""

    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Steps done of the next one."""
    num_steps: int = 0
    """Steps of the learning rate's schedule: of all epochs done, and `step`."""
    renumbered: int = 0
    """What other global batches add to `num_steps`, so that `number` grows all the same."""
    train_s: float = 0.0
    eval_s: float = 0.0
    num_skipped_steps: int = 0
    num_skipped_in_a_row: int = 0
    """Of these, the last ones: as many as the step counts before it gives up."""
    epoch_train_s: float = 0.0
    epoch_correct: int = 0
    """Right answers in the steps done of the next epoch; their losses are in the log."""
    best_val_accuracy_fraction: float | None = None
    best_number: int | None = None
    """Of the checkpoint with that accuracy."""
    time_to_target_s: float | None = None
    global_batch: int = 0
    """Of the next epoch, as its schedule decided; 0: the config's."""
    noise: NoiseScale = field(default_factory=NoiseScale)
    timings: list[Timing] = field(default_factory=list)
    """What the schedule noise decides by, timed on this machine."""

    def __post_init__(self) -> None:
        numbers = (self.epoch, self.step, self.num_steps, self.train_s, self.epoch_correct)
        if min(numbers) < 0 or not all(map(math.isfinite, numbers)):
            raise ValueError("a position is negative or not finite")

    @property
    def number(self) -> int:
        """Of its checkpoint's folder: steps trained, of whichever batch."""
        return self.num_steps + self.renumbered


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json of a checkpoint."""

    format: str = FORMAT
    version: int = VERSION
    training: dict[str, Any]
    """The settings that decide what is computed, dotted."""
    dataset_fingerprint: str
    position: Position
    segments: list[Segment] = field(default_factory=list)
    batches: list[EpochBatch] = field(default_factory=list)
    """Of each epoch done."""
    scaler: dict[str, float]
    """Loss scale and growth counter of fp16; empty without."""
    sha256: dict[str, str]


def checkpoint_path(run: Path, number: int) -> Path:
    return run / CHECKPOINTS / f"step-{number:09}"


def checkpoints(run: Path) -> list[Path]:
    """The folders with a checkpoint's name, the newest first."""
    found = (run / CHECKPOINTS).glob("step-*")
    ours = [path for path in found if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(ours, key=lambda path: path.name, reverse=True)


def manifest_of(checkpoint: Path) -> Manifest:
    """A checkpoint's manifest; Damaged or OSError if there is none that verifies."""
    return typed(Manifest, read_manifest(checkpoint, FORMAT, VERSION), "manifest.json")


def newest_manifest(run: Path) -> Manifest | None:
    """The manifest of the newest checkpoint that has one that verifies."""
    for checkpoint in checkpoints(run):
        try:
            return manifest_of(checkpoint)
        except (Damaged, OSError):
            continue
    return None


def holds_run(out: Path) -> bool:
    """Whether a run was started in `out`."""
    return (out / CONFIG).is_file()


def holds_sweep(out: Path) -> bool:
    """Whether a sweep was started in `out`."""
    return (out / SWEEP).is_file()


def check_new(out: Path) -> None:
    """UserError if a new run or sweep may not write to `out`; the caller holds its lock."""
    for name in (CONFIG, SWEEP):
        remove_leftovers(out / name)  # of a start that was killed before it was one
    if is_empty(out):
        return
    for kind, holds in (("run", holds_run), ("sweep", holds_sweep)):
        if holds(out):
            remedy = f"name another --out, or go on with --resume {out}"
            raise UserError(f"{out}: is not empty, it holds a {kind}; {remedy}")
    raise UserError(f"{out}: is not empty, and holds no run to resume; name another --out")


def check_resumable(run: Path) -> None:
    """UserError if `run` is no folder of a run, or of a sweep, that can go on."""
    remedy = "give --resume the folder of an earlier run"
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; {remedy}")
    if not holds_run(run) and not holds_sweep(run):
        raise UserError(f"{run}: holds no {CONFIG}, so it is no run's folder; {remedy}")


def read_config_text(run: Path) -> str:
    """The config.toml of a run."""
    try:
        return (run / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{run / CONFIG}: cannot be read ({error}); start anew") from None


def finished_text(run: Path, config: RunConfig) -> str:
    """That a run has done all that `config` asks for, or "" if there is something left to do."""
    manifest = newest_manifest(run)
    if manifest is None or not _has_ended(run):
        return ""
    position, target = manifest.position, config.target_accuracy
    if 0 < target <= (position.best_val_accuracy_fraction or 0.0):
        return f"this run reached its target in epoch {position.epoch}; it is left as it is"
    if position.epoch >= config.epochs:
        what = f"this run has done its {position.epoch} epochs and is left as it is"
        return f"{what}; give --epochs of more to go on"
    return ""


def _has_ended(run: Path) -> bool:
    """Whether its weights are there, and its report, which is written last, says so."""
    if not (run / WEIGHTS).exists():
        return False
    try:
        report = parse_json((run / REPORT).read_bytes(), REPORT)
    except (OSError, Damaged):
        return False
    return isinstance(report, dict) and report.get("status") == "finished"


def check_records(run: Path, fingerprint: str, resume: bool) -> None:
    """UserError if a run that goes on was trained on other records."""
    if resume and (manifest := newest_manifest(run)):
        check_same_records(run, manifest, fingerprint)


def check_same_training(run: Path, manifest: Manifest, config: RunConfig) -> None:
    """UserError, naming each setting, if the run would go on as another training.

    A setting that the checkpoint does not know had its default.
    """
    ours, default = config.training_settings(), RunConfig().training_settings()
    theirs = default | manifest.training
    kept = {"global_batch"} if config.optim.batch_schedule != "fixed" else set()
    may_change = set(MAY_CHANGE) - kept
    found = [name for name in ours if name not in may_change and ours[name] != theirs[name]]
    if found:
        changes = ", ".join(f"{name} was {theirs[name]} and is {ours[name]}" for name in found)
        remedy = "leave the flags out that change it, or start anew with another --out"
        raise UserError(f"{run}: another training cannot go on from it: {changes}; {remedy}")


def check_same_records(run: Path, manifest: Manifest, fingerprint: str) -> None:
    """UserError if the run was trained on other records."""
    if manifest.dataset_fingerprint != fingerprint:
        what = f"was trained on records {manifest.dataset_fingerprint[:12]}"
        remedy = "give the --data the run was started with"
        raise UserError(f"{run}: {what}, these are {fingerprint[:12]}; {remedy}")
