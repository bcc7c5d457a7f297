"""Where a run stands, what it has found so far, and its report.

Positions are values: a checkpoint in the writing keeps its own while the run goes on.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from engine import meters
from engine.config import RunConfig
from engine.report import EpochBatch, RunReport, Segment, without_folders
from engine.train.folder import Manifest, Position
from engine.train.session import Session, switches
from engine.train.step import TrainLog

CLOCK_INCLUDES = (
    "every training step with its data, and checkpoints within an epoch; "
    "not: start-up, warm-up, capture, evaluation, checkpoints at an epoch's end, reports"
)


@dataclass
class Progress:
    """A run's position, at the last reading of the log, and how it got there."""

    session: Session
    asked: RunConfig
    """What the whole run is; the session's config is of a part of it."""
    position: Position = field(default_factory=Position)
    start: Position = field(default_factory=Position)
    """Where this process began."""
    log: TrainLog = field(default_factory=TrainLog.empty)
    """Of the steps done of the epoch in hand."""
    earlier: list[Segment] = field(default_factory=list)
    """What was trained before this session."""
    batches: list[EpochBatch] = field(default_factory=list)
    """Of each epoch done."""
    wait_s: float = 0.0
    """Time that this process waited for the feed."""
    utilisation_percent: list[float] = field(default_factory=list)

    def trained(self, log: TrainLog, step: int, lap_s: float) -> None:
        """Take in the log of the steps up to `step` of the epoch, which took `lap_s`."""
        position = self.position
        self.log = self.log.and_then(log)
        steps_per_epoch = self.session.feed.order.steps_per_epoch
        self.position = replace(
            position,
            step=step,
            num_steps=position.epoch * steps_per_epoch + step,
            train_s=position.train_s + lap_s,
            num_skipped_steps=position.num_skipped_steps + log.num_skipped,
            num_skipped_in_a_row=self.session.step.num_skipped_in_a_row,
            epoch_train_s=position.epoch_train_s + lap_s,
            epoch_correct=self.log.num_correct,
            noise=position.noise.after(
                log.norm_2S,
                self.session.step.part_samples,
                self.session.feed.order.global_batch,
            ),
        )

    def end_epoch(self) -> None:
        """The epoch in hand is trained; its log is read no more."""
        position, noise = self.position, self.position.noise
        done = EpochBatch(
            epoch=position.epoch + 1,
            global_batch=self.session.config.global_batch,
            learning_rate=self.session.config.optim.learning_rate,
            num_steps=position.step,
            train_s=position.epoch_train_s,
            critical_batch=noise.critical_batch,
            gradient_variance=noise.gradient_variance,
            gradient_squared_norm=noise.gradient_squared_norm,
        )
        self.batches = [*self.batches, done]
        self.log = TrainLog.empty()
        self.position = replace(
            position, epoch=position.epoch + 1, step=0, epoch_train_s=0.0, epoch_correct=0
        )

    def validated(self, accuracy: float, target: float) -> None:
        """Keep the best accuracy, and the time at which the target was reached first."""
        position = self.position
        if accuracy > (position.best_val_accuracy_fraction or -1.0):
            position = replace(
                position, best_val_accuracy_fraction=accuracy, best_number=position.number
            )
        if 0 < target <= accuracy and not position.time_to_target_s:
            position = replace(position, time_to_target_s=position.train_s)
        self.position = position

    def evaluated(self, eval_s: float) -> None:
        """Add the seconds of an evaluation."""
        self.position = replace(self.position, eval_s=self.position.eval_s + eval_s)

    @property
    def is_best(self) -> bool:
        """Whether no earlier epoch was better on the validation split."""
        return self.position.best_number == self.position.number

    def segments(self) -> list[Segment]:
        """What the run consists of so far, this process's part last."""
        start, position = self.start, self.position
        if position.num_steps == start.num_steps:
            return self.earlier
        mine = Segment(
            first_step=start.number,
            num_steps=position.num_steps - start.num_steps,
            train_s=position.train_s - start.train_s,
            wait_s=self.wait_s,
            num_ranks=self.session.world.size,
            effective=switches(self.session.config),
            environment=self.session.environment,
            global_batch=self.session.config.global_batch,
        )
        return [*self.earlier, mine]

    def manifest(self) -> Manifest:
        """What a checkpoint of this position says."""
        return Manifest(
            training=self.asked.training_settings(),
            dataset_fingerprint=self.session.records.fingerprint,
            position=self.position,
            segments=self.segments(),
            batches=self.batches,
            scaler=self.session.step.state.scaler_numbers(),
            sha256={},
        )


def run_report(
    progress: Progress,
    status: Literal["finished", "stopped", "unfinished"],
    nvml: meters.Nvml,
    test: tuple[float, float] | None = None,
    energy_j: float | None = None,
) -> RunReport:
    """The report of a run as it stands; `test` is loss and accuracy."""
    session, position = progress.session, progress.position
    config, device = progress.asked, session.world.device
    segments = progress.segments()
    utilisation = sorted(progress.utilisation_percent)
    waited_s = sum(segment.wait_s for segment in segments)
    num_samples = position.num_steps * session.config.global_batch
    data = replace(config.data, path=without_folders(config.data.path))
    return RunReport(
        environment=session.environment,
        config=replace(config, data=data),
        config_digest=config.digest(),
        dataset_fingerprint=session.records.fingerprint,
        requested=switches(config),
        effective=switches(session.config),
        notes=without_folders(session.notes),
        clock_includes=CLOCK_INCLUDES,
        num_ranks=session.world.size,
        num_parameters=sum(p.numel() for p in session.step.model.parameters()),
        num_train_samples=len(session.records.split("train")),
        num_epochs=position.epoch,
        num_steps=position.number,
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
        device_used_gib=nvml.used_gib(),
        gpu_utilisation_percent=utilisation[len(utilisation) // 2] if utilisation else None,
        gpu_energy_j=energy_j,
        status=status,
        segments=segments,
        batches=progress.batches,
        kept=session.kept,
        kept_under_ddp=session.kept_under_ddp,
        network=session.network_facts,
    )
