"""The trainer: the one loop and its clock.

Evaluation and reports are off the clock; within an epoch, what a checkpoint costs is on it.

Shapes: B samples of one rank, H x W pixels, S steps.
"""

import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from engine import meters
from engine.config import RunConfig
from engine.data.records import Records
from engine.errors import UserError
from engine.report import RunReport, Segment, without_folders
from engine.stop import STOP
from engine.train import idlog
from engine.train.checkpoint import checkpoint_tensors, load_checkpoint
from engine.train.folder import (
    Manifest,
    Position,
    check_same_records,
    checkpoint_path,
    newest_manifest,
)
from engine.train.journal import Journal
from engine.train.pulse import Cadence, Pulse
from engine.train.saver import Saver
from engine.train.session import Session, evaluate, open_session, switches
from engine.train.step import TrainLog
from engine.typed import typed
from engine.ui import progress_bar
from engine.world import World, check_ranks

CLOCK_INCLUDES = (
    "every training step with its data, and checkpoints within an epoch; "
    "not: start-up, warm-up, capture, evaluation, checkpoints at an epoch's end, reports"
)
NUM_CHECKPOINTS_AT_ONCE = 4
"""On the disk at the same moment: two kept, the best, and the one being written."""
Say = Callable[[str], None]


def check_run(config: RunConfig, device_name: str) -> None:
    """UserError if a run needs what is not here; asked before anything is opened or written."""
    check_ranks(device_name)
    Cadence.of(config.checkpoint_every)
    if config.tensorboard and find_spec("tensorboard") is None:
        remedy = "pip install tensorboard, or leave it out"
        raise UserError(f"--tensorboard: the package is not installed; {remedy}")


def fit(
    config: RunConfig, records: Records, world: World, out: Path, *, resume: bool, say: Say
) -> tuple[RunReport, int]:
    """Open a session of `config`, train it as `Trainer.fit` does, and close it.

    Where a run goes on with another global batch in the middle of an epoch, that epoch is finished
    with the old one first.

    Returns:
        The report, and the signal that stopped the run, 0 if it is finished.
    """
    batch, epoch = (int(n) for n in world.most(list(_unfinished(config, out, resume, world))))
    if batch:
        say(f"note: epoch {epoch + 1} is finished with its global batch of {batch} first")
        old = replace(config, global_batch=batch)
        report, signal = _fit(old, records, world, out, resume=True, say=say, last=epoch + 1)
        if signal:
            return report, signal
    return _fit(config, records, world, out, resume=resume, say=say, last=config.epochs)


def _unfinished(config: RunConfig, out: Path, resume: bool, world: World) -> tuple[float, float]:
    """(global batch, epoch) of an epoch begun with another batch; zeros if there is none."""
    manifest = newest_manifest(out) if resume and world.is_first else None
    if manifest is None or not manifest.position.step:
        return 0, 0
    batch = manifest.training["global_batch"]
    return (0, 0) if batch == config.global_batch else (batch, manifest.position.epoch)


def _fit(
    config: RunConfig,
    records: Records,
    world: World,
    out: Path,
    *,
    resume: bool,
    say: Say,
    last: int,
) -> tuple[RunReport, int]:
    with world.on_stream(), closing(open_session(config, records, world)) as session:
        trainer = Trainer(session, out, say)
        return trainer.fit(resume, last), trainer.stopped_by


@dataclass
class Trainer:
    """Trains an open session, which stays open."""

    session: Session
    out: Path
    """The folder for report.json, metrics.jsonl, model.safetensors, config.toml, checkpoints/."""
    say: Say
    """Prints a line on rank 0."""
    position: Position = field(default_factory=Position)
    """Where the run stands at the last reading of the log."""
    segments: list[Segment] = field(default_factory=list)
    """Those before this process."""
    wait_s: float = 0.0
    utilisation_percent: list[float] = field(default_factory=list)
    stopped_by: int = 0
    """The signal that all ranks stop by."""

    def __post_init__(self) -> None:
        session = self.session
        self.world, self.step = session.world, session.step
        self.config = session.requested
        self.watch = meters.Stopwatch(self.world.device)
        self.nvml = meters.Nvml(self.world.device)
        self.steps_per_epoch = session.feed.order.steps_per_epoch
        self.has_val = "val" in session.records.splits
        self.cadence = Cadence.of(self.config.checkpoint_every)
        self.pulse = Pulse(self.world, self.cadence)
        self.journal = Journal(self.out, self.say)
        self.saver = Saver(self.out, self.step.state) if self.world.is_first else None
        self.log = TrainLog.empty()

    def fit(self, resume: bool, last_epoch: int | None = None) -> RunReport:
        """Train all epochs that are left, evaluate, and write OUT.

        Args:
            resume: go on from OUT's newest checkpoint.
            last_epoch: stop after so many epochs, saved, as if by a signal; None: train all.
        Returns:
            The report; its status says whether the run is finished.
        Raises:
            UserError: no checkpoint can be read, a number is not finite, or the disk is full.
        """
        for note in self.session.notes:
            self.say(f"note: {note}")
        if resume:
            self._resume()
        self.start = self.position
        self.world.first(self._start_files)
        self.pulse.start(self.position.num_steps)
        energy_j = self.nvml.energy_j()
        with STOP.polled():
            self._train(min(last_epoch or self.config.epochs, self.config.epochs))
        used_j = self.nvml.energy_since(energy_j)
        if self.saver:
            self.saver.wait()
            if self.saver.failure:
                self.journal.refused(self.saver.failure)
        if self.stopped_by or self.position.epoch < self._last_epoch():
            return self._stop(used_j)
        return self._end(used_j)

    def _last_epoch(self) -> int:
        """Where the training ends: the target may be reached before the last one."""
        return self.position.epoch if self.position.time_to_target_s else self.config.epochs

    def _train(self, last_epoch: int) -> None:
        while self.position.epoch < min(last_epoch, self._last_epoch()):
            self._train_epoch()
            if self.stopped_by:
                return
            self._end_epoch()
            wishes = self.pulse.meet(self.position.num_steps)
            self.stopped_by = wishes.signal
            if wishes.save and not self.pulse.is_saved(self.position.num_steps):
                self._save(wait=True)
            if self.stopped_by:
                return

    def _train_epoch(self) -> None:
        """Train what is left of an epoch, on the clock."""
        epoch, first_step = self.position.epoch, self.position.step
        before = epoch * self.steps_per_epoch
        self.world.synchronize()
        self.watch.start()
        title = f"epoch {epoch + 1}"
        with progress_bar(title, self.steps_per_epoch, enabled=self.world.is_first) as show:
            done = first_step
            for launch in self.step.train_epoch(self.session.feed, epoch, first_step):
                self.wait_s += launch.wait_s
                if self.config.log_ids:
                    path = idlog.path_of(self.out, self.world, epoch, first_step)
                    idlog.append(path, launch.batch, first=done == first_step)
                done += launch.num_steps
                if done < self.steps_per_epoch and self.pulse.is_due(before + done):
                    self._meet(epoch, done)
                    if self.stopped_by:
                        break
                    show(done)
        self._read_log(epoch, done)
        self.watch.stop()

    def _meet(self, epoch: int, done: int) -> None:
        """Agree with the other ranks on saving and stopping, in the middle of an epoch."""
        wishes = self.pulse.meet(epoch * self.steps_per_epoch + done)
        self.stopped_by = wishes.signal
        if wishes.save:
            self._read_log(epoch, done)
            self._save(wait=bool(wishes.signal))

    def _read_log(self, epoch: int, done: int) -> None:
        """Add what was trained since the last reading to the position. Collective."""
        log = self.step.read_training()
        self.log = self.log.and_then(log)
        lap_s = self.watch.lap()
        position = self.position
        self.position = replace(
            position,
            step=done,
            num_steps=epoch * self.steps_per_epoch + done,
            train_s=position.train_s + lap_s,
            num_skipped_steps=position.num_skipped_steps + log.num_skipped,
            epoch_train_s=position.epoch_train_s + lap_s,
            epoch_correct=self.log.num_correct,
        )

    def _end_epoch(self) -> None:
        """Evaluate, write the epoch's line, and save."""
        if (percent := self.nvml.utilisation_percent()) is not None:
            self.utilisation_percent.append(percent)
        position, log = self.position, self.log
        rate = log.num_samples / max(position.epoch_train_s, 1e-9)
        metrics: dict[str, Any] = {
            "epoch": position.epoch + 1,
            "step": position.num_steps,
            "train_s": position.train_s,
            "train_loss": log.loss,
            "train_accuracy_fraction": log.accuracy,
            "samples_per_s": rate,
        }
        line = f"epoch {position.epoch + 1:>3}/{self.config.epochs}"
        line += f"  loss {log.loss:.4f}  train {log.accuracy:7.2%}"
        self.position = replace(
            position, epoch=position.epoch + 1, step=0, epoch_train_s=0.0, epoch_correct=0
        )
        self.log = TrainLog.empty()
        if self.has_val:
            val_loss, val = self._validate()
            metrics |= {"val_loss": val_loss, "val_accuracy_fraction": val}
            line += f"  val {val:7.2%}"
        if self.world.is_first:
            self.journal.epoch(metrics)
        if self._saves_epoch():
            self._save(wait=True)
        self.say(f"{line}  {rate:>9,.0f} samples/s  {position.train_s:7.2f} s")

    def _validate(self) -> tuple[float, float]:
        """Evaluate the validation split, and keep the best."""
        loss, accuracy = self._timed_evaluate("val")
        position = self.position
        if not math.isfinite(loss):
            where = f"after epoch {position.epoch}"
            raise UserError(f"the validation loss is not finite {where}; lower optim.learning_rate")
        if accuracy > (position.best_val_accuracy_fraction or -1.0):
            position = replace(
                position, best_val_accuracy_fraction=accuracy, best_num_steps=position.num_steps
            )
        if 0 < self.config.target_accuracy <= accuracy and not position.time_to_target_s:
            position = replace(position, time_to_target_s=position.train_s)
        self.position = position
        return loss, accuracy

    def _saves_epoch(self) -> bool:
        """Whether a checkpoint is due at an epoch's end: the last is, and the best so far."""
        every, position = self.cadence.epochs, self.position
        by_count = bool(every) and position.epoch % every == 0
        is_best = position.best_num_steps == position.num_steps
        return by_count or is_best or position.epoch >= self.config.epochs

    def _timed_evaluate(self, split: str) -> tuple[float, float]:
        start = time.perf_counter()
        loss, accuracy = evaluate(self.session, split)
        eval_s = self.position.eval_s + time.perf_counter() - start
        self.position = replace(self.position, eval_s=eval_s)
        return loss, accuracy

    def _save(self, wait: bool) -> None:
        """Begin a checkpoint of the position, which all ranks have reached."""
        if self.saver:
            if self.saver.failure:
                self.journal.refused(self.saver.failure)
            loss_S = torch.from_numpy(self.log.loss_S.copy())
            self.saver.save(self._manifest(), loss_S, wait)
        self.pulse.saved(self.position.num_steps)

    def _manifest(self) -> Manifest:
        return Manifest(
            training=self.config.training_settings(),
            dataset_fingerprint=self.session.records.fingerprint,
            position=self.position,
            segments=self._segments(),
            scaler=self.step.state.scaler_numbers(),
            sha256={},
        )

    def _segments(self) -> list[Segment]:
        """What the run consists of so far, this process's part last."""
        start, position = self.start, self.position
        if position.num_steps == start.num_steps:
            return self.segments
        mine = Segment(
            first_step=start.num_steps,
            num_steps=position.num_steps - start.num_steps,
            train_s=position.train_s - start.train_s,
            wait_s=self.wait_s,
            num_ranks=self.world.size,
            effective=switches(self.session.config),
            environment=self.session.environment,
        )
        return [*self.segments, mine]

    def _resume(self) -> None:
        """Load the newest checkpoint on rank 0, and give it to the others. Collective."""
        if not any(True for _ in self.out.glob("checkpoints/step-*")):
            self.say("the run was stopped before its first checkpoint; it starts at step 0")
            return
        found = self.world.first(lambda: load_checkpoint(self.out, self.step.state))
        text, loss_S = "", torch.zeros(0, dtype=torch.float64)
        if found:
            manifest, loss_S, skipped = found
            for sentence in skipped:
                self.say(f"note: {sentence}")
            text = json.dumps(asdict(manifest))
        manifest = typed(Manifest, json.loads(self.world.text_of_first(text)), "manifest.json")
        self._share(manifest)
        check_same_records(self.out, manifest, self.session.records.fingerprint)
        self._take_up(manifest, loss_S)

    def _share(self, manifest: Manifest) -> None:
        """Rank 0's tensors on every rank, in place."""
        for tensors in checkpoint_tensors(self.step.state).values():
            for tensor in tensors.values():
                self.world.copy_from_first(tensor)
        if self.step.state.scaler.is_enabled():
            self.step.state.load_scaler(manifest.scaler)

    def _take_up(self, manifest: Manifest, loss_S: torch.Tensor) -> None:
        """Go on where a checkpoint ends; with another batch, from its epoch's beginning."""
        position = manifest.position
        if position.epoch > self.config.epochs or position.step >= self.steps_per_epoch:
            what = f"stands after epoch {position.epoch}, step {position.step}"
            raise UserError(
                f"{self.out}: {what}; this run has {self.config.epochs} epochs of "
                f"{self.steps_per_epoch} steps: give --epochs of more"
            )
        num_steps = position.epoch * self.steps_per_epoch + position.step
        best = position.best_val_accuracy_fraction
        reached = self.config.target_accuracy and best and best >= self.config.target_accuracy
        self.position = replace(
            position,
            num_steps=num_steps,
            time_to_target_s=position.time_to_target_s if reached else None,
        )
        batch = self.session.feed.order.global_batch
        self.log = TrainLog.of_part(loss_S.numpy(), position.epoch_correct, batch)
        self.segments = manifest.segments
        self.step.resume_at(num_steps)
        if self.saver:
            self.saver.trust(checkpoint_path(self.out, position.num_steps))
        place = f"epoch {position.epoch} of {self.config.epochs}"
        inside = f", step {position.step} of the next" if position.step else ""
        self.say(f"resumed after {place}{inside}")

    def _start_files(self) -> None:
        state_bytes = sum(
            tensor.numel() * tensor.element_size()
            for tensors in checkpoint_tensors(self.step.state).values()
            for tensor in tensors.values()
        )
        wanted = NUM_CHECKPOINTS_AT_ONCE * state_bytes
        free = shutil.disk_usage(self.out).free
        if free < wanted:
            what = f"{free / 1e6:.1f} MB are free, checkpoints need {wanted / 1e6:.1f} MB"
            raise UserError(f"{self.out}: {what}; free space or choose another --out")
        self.journal.start(self.config, self.position.epoch)
        self.journal.report(self._report("unfinished", None, None))

    def _end(self, energy_j: float | None) -> RunReport:
        """Evaluate the test split, and write the weights and the report."""
        test = self._timed_evaluate("test") if "test" in self.session.records.splits else None
        report = self._report("finished", test, energy_j)
        self.world.first(lambda: self.journal.end(report, self.step.model))
        return report

    def _stop(self, energy_j: float | None) -> RunReport:
        """Say where the run stands, and how it goes on."""
        report = self._report("stopped", None, energy_j)
        if self.world.is_first:
            self.journal.report(report)
        if self.stopped_by:
            name = signal.Signals(self.stopped_by).name
            position = self.position
            where = f"epoch {position.epoch + 1}, step {position.step}"
            saved = "not saved" if self.saver and self.saver.failure else "saved"
            self.say(f"stopped by {name} in {where}, {saved}; go on with --resume {self.out}")
            facts = {"signal": name, "epoch": position.epoch, "step": position.step}
            if self.world.is_first:
                self.journal.stopped(json.dumps(facts) + "\n")
        return report

    def _report(
        self, status: Any, test: tuple[float, float] | None, energy_j: float | None
    ) -> RunReport:
        session, device, position = self.session, self.world.device, self.position
        segments = self._segments()
        utilisation = sorted(self.utilisation_percent)
        data = replace(self.config.data, path=without_folders(self.config.data.path))
        waited_s = sum(segment.wait_s for segment in segments)
        num_samples = position.num_steps * self.config.global_batch
        return RunReport(
            environment=session.environment,
            config=replace(self.config, data=data),
            config_digest=self.config.digest(),
            dataset_fingerprint=session.records.fingerprint,
            requested=switches(session.requested),
            effective=switches(session.config),
            notes=without_folders(session.notes),
            clock_includes=CLOCK_INCLUDES,
            num_ranks=self.world.size,
            num_parameters=sum(p.numel() for p in self.step.model.parameters()),
            num_train_samples=len(session.records.split("train")),
            num_epochs=position.epoch,
            num_steps=position.num_steps,
            num_skipped_steps=position.num_skipped_steps,
            train_s=position.train_s,
            samples_per_s=num_samples / max(position.train_s, 1e-9),
            data_wait_fraction=waited_s / max(position.train_s, 1e-9),
            order_reach_fraction=session.feed.order.reach_fraction,
            warmup_s=session.warmup_s,
            eval_s=position.eval_s,
            val_accuracy_fraction=position.best_val_accuracy_fraction,
            test_accuracy_fraction=test[1] if test else None,
            test_loss=test[0] if test else None,
            time_to_target_s=position.time_to_target_s,
            host_peak_rss_gib=meters.host_peak_rss_gib(),
            torch_peak_gib=meters.torch_peak_gib(device),
            device_used_gib=self.nvml.used_gib(),
            gpu_utilisation_percent=utilisation[len(utilisation) // 2] if utilisation else None,
            gpu_energy_j=energy_j,
            status=status,
            segments=segments,
        )
