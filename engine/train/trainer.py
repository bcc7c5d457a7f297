"""The trainer: the one loop and its clock.

Everything slow or fragile (disk, sums, evaluation) is off the clock.

Shapes: B samples of one rank, H x W pixels.
"""

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine import meters
from engine.config import RunConfig, to_toml
from engine.data.records import Records
from engine.durable import write_file, writing
from engine.errors import UserError
from engine.report import RunReport, without_folders, write_json
from engine.train import idlog
from engine.train.checkpoint import Position, load_checkpoint, save_checkpoint, save_model
from engine.train.session import Session, evaluate, open_session, switches
from engine.ui import progress_bar
from engine.world import World, check_ranks

CLOCK_INCLUDES = (
    "every training step with its data; "
    "not: start-up, warm-up, capture, evaluation, checkpoints, reports"
)
Say = Callable[[str], None]


def check_run(config: RunConfig, device_name: str) -> None:
    """UserError if a run needs what is not here; asked before anything is opened or written."""
    check_ranks(device_name)
    if config.tensorboard and find_spec("tensorboard") is None:
        remedy = "pip install tensorboard, or leave it out"
        raise UserError(f"--tensorboard: the package is not installed; {remedy}")


def fit(
    config: RunConfig, records: Records, world: World, out: Path, *, resume: bool, say: Say
) -> RunReport:
    """Open a session of `config`, train it as `Trainer.fit` does, and close it."""
    with world.on_stream(), closing(open_session(config, records, world)) as session:
        return Trainer(session, out, say).fit(resume)


@dataclass
class Trainer:
    """Trains an open session, which stays open."""

    session: Session
    out: Path
    """The folder for report.json, metrics.jsonl, model.safetensors, config.toml, checkpoints/."""
    say: Say
    """Prints a line on rank 0."""
    wait_s: float = 0.0
    eval_s: float = 0.0
    num_skipped: int = 0
    best_val: float | None = None
    time_to_target_s: float | None = None
    utilisation_percent: list[float] = field(default_factory=list)
    events: Any = None
    """TensorBoard's writer, on rank 0 and where asked for."""

    def __post_init__(self) -> None:
        self.config = self.session.requested
        self.watch = meters.Stopwatch(self.session.world.device)
        self.nvml = meters.Nvml(self.session.world.device)
        self.steps_per_epoch = self.session.feed.order.steps_per_epoch
        self.has_val = "val" in self.session.records.splits

    def fit(self, resume: bool) -> RunReport:
        """Train all epochs that are left, evaluate, and write OUT.

        Args:
            resume: go on from OUT's newest checkpoint.
        Raises:
            UserError: a checkpoint is missing or foreign, the loss is not finite, or the disk is
                full.
        """
        for note in self.session.notes:
            self.say(f"note: {note}")
        first_epoch = self._resume() if resume else 0
        resumed_s = self.watch.total_s
        self.session.world.first(lambda: self._start_files(first_epoch))
        energy_j = self.nvml.energy_j()
        epoch = first_epoch
        while epoch < self.config.epochs and not self.time_to_target_s:
            self._epoch(epoch)
            epoch += 1
        energy_end_j = self.nvml.energy_j()
        used_j = None if energy_j is None or energy_end_j is None else energy_end_j - energy_j
        test = self._timed_evaluate("test") if "test" in self.session.records.splits else None
        wait = self.wait_s / max(self.watch.total_s - resumed_s, 1e-9)
        report = self._report(epoch, test, wait, used_j)
        self.session.world.first(lambda: self._end_files(report))
        return report

    def _epoch(self, epoch: int) -> None:
        lap_s = self._train_epoch(epoch)
        if (percent := self.nvml.utilisation_percent()) is not None:
            self.utilisation_percent.append(percent)
        log = self.session.step.read_training()
        self.num_skipped += log.num_skipped
        rate = log.num_samples / lap_s
        metrics: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * self.steps_per_epoch,
            "train_s": self.watch.total_s,
            "train_loss": log.loss,
            "train_accuracy_fraction": log.accuracy,
            "samples_per_s": rate,
        }
        line = f"epoch {epoch + 1:>3}/{self.config.epochs}"
        line += f"  loss {log.loss:.4f}  train {log.accuracy:7.2%}"
        if self.has_val:
            val_loss, val = self._timed_evaluate("val")
            metrics |= {"val_loss": val_loss, "val_accuracy_fraction": val}
            line += f"  val {val:7.2%}"
            self.best_val = max(val, self.best_val or 0.0)
            if 0 < self.config.target_accuracy <= val:
                self.time_to_target_s = self.watch.total_s
        self._save(epoch + 1, metrics)
        self.say(f"{line}  {rate:>9,.0f} samples/s  {self.watch.total_s:7.2f} s")

    def _train_epoch(self, epoch: int) -> float:
        """Train one epoch on the clock; returns its seconds."""
        step, world = self.session.step, self.session.world
        world.synchronize()
        with progress_bar(
            f"epoch {epoch + 1}", self.steps_per_epoch, enabled=world.is_first
        ) as show:
            self.watch.start()
            num_steps = 0
            for launch in step.train_epoch(self.session.feed, epoch):
                self.wait_s += launch.wait_s
                if self.config.log_ids:
                    idlog.append(
                        idlog.path_of(self.out, world.rank, epoch),
                        launch.batch,
                        first=not num_steps,
                    )
                num_steps += launch.num_steps
                if num_steps % 50 < launch.num_steps:
                    show(num_steps)
            return self.watch.stop()

    def _timed_evaluate(self, split: str) -> tuple[float, float]:
        start = time.perf_counter()
        result = evaluate(self.session, split)
        self.eval_s += time.perf_counter() - start
        return result

    def _resume(self) -> int:
        step = self.session.step
        position, skipped = load_checkpoint(
            self.out,
            step.state,
            digest=self.config.digest(),
            fingerprint=self.session.records.fingerprint,
        )
        for sentence in skipped:
            self.say(f"note: {sentence}")
        step.resume_at(position.num_steps)
        self.watch.total_s = position.train_s
        self.best_val = position.best_val_accuracy_fraction
        self.time_to_target_s = position.time_to_target_s
        self.say(f"resumed after epoch {position.num_epochs} of {self.config.epochs}")
        return position.num_epochs

    def _start_files(self, num_epochs_done: int) -> None:
        """Write config.toml, and cut metrics and events back to what the checkpoint knows."""
        metrics = self.out / "metrics.jsonl"
        with writing(self.out):
            lines = (
                metrics.read_bytes().splitlines(keepends=True)[:num_epochs_done]
                if metrics.exists()
                else []
            )
            write_file(metrics, b"".join(lines))
            write_file(self.out / "config.toml", to_toml(self.config).encode())
            if self.config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.events = SummaryWriter(
                    str(self.out / "tensorboard"), purge_step=num_epochs_done + 1
                )

    def _end_files(self, report: RunReport) -> None:
        if self.events:
            self.events.close()
        with writing(self.out):
            save_model(self.out / "model.safetensors", self.session.step.model)
            write_json(report, self.out / "report.json")

    def _save(self, num_epochs: int, metrics: dict[str, Any]) -> None:
        def write() -> None:
            step = self.session.step
            position = Position(
                num_epochs=num_epochs,
                num_steps=num_epochs * self.steps_per_epoch,
                train_s=self.watch.total_s,
                best_val_accuracy_fraction=self.best_val,
                time_to_target_s=self.time_to_target_s,
            )
            with writing(self.out):
                with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(metrics, allow_nan=False) + "\n")
                if self.events:
                    for name, value in metrics.items():
                        self.events.add_scalar(name, value, num_epochs)
                    self.events.flush()
                save_checkpoint(
                    self.out,
                    position,
                    step.state,
                    digest=self.config.digest(),
                    fingerprint=self.session.records.fingerprint,
                )

        self.session.world.first(write)

    def _report(
        self,
        num_epochs: int,
        test: tuple[float, float] | None,
        wait_fraction: float,
        energy_j: float | None,
    ) -> RunReport:
        session, device = self.session, self.session.world.device
        num_steps = num_epochs * self.steps_per_epoch
        utilisation = sorted(self.utilisation_percent)
        data = replace(self.config.data, path=without_folders(self.config.data.path))
        return RunReport(
            environment=session.environment,
            config=replace(self.config, data=data),
            config_digest=self.config.digest(),
            dataset_fingerprint=session.records.fingerprint,
            requested=switches(session.requested),
            effective=switches(session.config),
            notes=without_folders(session.notes),
            clock_includes=CLOCK_INCLUDES,
            num_ranks=session.world.size,
            num_parameters=sum(p.numel() for p in session.step.model.parameters()),
            num_train_samples=len(session.records.split("train")),
            num_epochs=num_epochs,
            num_steps=num_steps,
            num_skipped_steps=self.num_skipped,
            train_s=self.watch.total_s,
            samples_per_s=num_steps * self.config.global_batch / max(self.watch.total_s, 1e-9),
            data_wait_fraction=wait_fraction,
            order_reach_fraction=session.feed.order.reach_fraction,
            warmup_s=session.warmup_s,
            eval_s=self.eval_s,
            val_accuracy_fraction=self.best_val,
            test_accuracy_fraction=test[1] if test else None,
            test_loss=test[0] if test else None,
            time_to_target_s=self.time_to_target_s,
            host_peak_rss_gib=meters.host_peak_rss_gib(),
            torch_peak_gib=meters.torch_peak_gib(device),
            device_used_gib=self.nvml.used_gib(),
            gpu_utilisation_percent=utilisation[len(utilisation) // 2] if utilisation else None,
            gpu_energy_j=energy_j,
        )
