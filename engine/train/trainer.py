"""The trainer: the one loop and its clock.

Evaluation and reports are off the clock; within an epoch, what a checkpoint costs is on it.

Shapes: B samples of one rank, H x W pixels, S steps.
"""

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
)
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine import meters
from engine.config import NO_PAGE, RunConfig
from engine.data.records import Records
from engine.durable import take_folder
from engine.errors import UserError
from engine.feeds.batch import Batch
from engine.feeds.shared import SharedFeeds
from engine.heart import SAVING
from engine.report import RunReport
from engine.stop import STOP
from engine.train import idlog
from engine.train.checkpoint import (
    Found,
    deal_out,
    find_checkpoint,
    newest_sound_manifest,
    whole_tensors,
)
from engine.train.folder import (
    Manifest,
    Position,
    check_new,
    check_same_records,
    checkpoint_path,
    checkpoints,
)
from engine.train.journal import CHECKPOINTS, Journal
from engine.train.live import Live, Memory
from engine.train.parts import Handover, copies_of, put_back, stored_position, with_timings
from engine.train.progress import Progress, run_report
from engine.train.pulse import Cadence, Pulse
from engine.train.saver import Saver
from engine.train.schedule import (
    Timing,
    check_schedule,
    choose_batch,
    part_config,
    planned_batches,
    ramp_batch,
    timings_text,
)
from engine.train.session import Session, evaluate, open_session, switches
from engine.train.step import TrainLog
from engine.train.track import check_trackers
from engine.typed import typed
from engine.ui import progress_bar
from engine.world import World, check_ranks, fused_on_cpu, start_world

NUM_CHECKPOINTS_AT_ONCE = 4
"""On the disk at the same moment: two kept, the best, and the one being written."""
CHANCE = 1.5
"""Times the share of one class, of equal ones: what accuracy is no better than guessing."""
Say = Callable[[str], None]
T = TypeVar("T")
Done = tuple[RunReport, int]
"""The report, and the signal that stopped the run, 0 if it is finished."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training to be done."""

    config: RunConfig
    records: Records
    world: World
    out: Path
    resume: bool
    say: Say
    shared: SharedFeeds | None = None
    """Of the trainings that take turns in this process."""
    is_alone: bool = True
    """False: others train in this process, too, and no bar is shown."""
    note: str = ""
    """What the reports of all its sessions say."""

    def open_session(self, config: RunConfig) -> Session:
        """A session of `config`, which is the job's own or of a part of it."""
        session = open_session(config, self.records, self.world, self.shared)
        if self.note:
            session.notes.append(self.note)
        return session


def check_run(config: RunConfig, device_name: str) -> None:
    """UserError if a run needs what is not here; asked before anything is opened or written."""
    check_ranks(device_name)
    Cadence.of(config.checkpoint_every)
    check_schedule(config)
    check_trackers(config.track)


def fit(
    config: RunConfig, records: Records, world: World, out: Path, *, resume: bool, say: Say
) -> Done:
    """Open a session of `config`, train it as `Trainer.fit` does, and close it.

    Where a run goes on with another global batch in the middle of an epoch, that epoch is finished
    with the old one first.

    Returns:
        The report, and the signal that stopped the run, 0 if it is finished.
    """
    job = Job(config=config, records=records, world=world, out=out, resume=resume, say=say)
    return to_the_end(launches(job))


def to_the_end(work: Generator[Any, None, T]) -> T:
    """What a generator returns in the end."""
    with closing(work):
        while True:
            try:
                next(work)
            except StopIteration as end:
                result: T = end.value
                return result


def launches(job: Job) -> Generator["Trainer", None, Done]:
    """`fit`, a launch at a time, so that several trainings can take turns.

    Yields the trainer in charge as `Trainer.launches` does. Whatever is the whole process's (random
    numbers, switches of torch's libraries, the current stream) is the caller's to keep meanwhile.
    """
    with _saying_what_is_compiled(job):
        if job.config.optim.batch_schedule != "fixed":
            return (yield from _launch_parts(job))
        return (yield from _launch_whole(job))


def _saying_what_is_compiled(job: Job) -> AbstractContextManager[None]:
    is_used = job.config.kernels or job.config.augment.is_on
    if not is_used or not fused_on_cpu(job.world.device):
        return nullcontext()
    from kernels.cpu import before_compiling

    return before_compiling(
        lambda: job.say("note: functions are compiled for this CPU, which is done once: some 10 s")
    )


def _launch_whole(job: Job) -> Generator["Trainer", None, Done]:
    """Train in one session; after what was left of an epoch of another batch."""
    world, say = job.world, job.say

    def part(config: RunConfig, resume: bool, last_epoch: int) -> Generator["Trainer", None, Done]:
        with world.on_stream(), closing(job.open_session(config)) as session:
            trainer = Trainer(session, job.out, say, is_alone=job.is_alone)
            report = yield from trainer.launches(resume, last_epoch)
            return report, trainer.stopped_by

    unfinished = _unfinished(job.config, job.out, job.resume, world)
    batch, epoch = (int(n) for n in world.most(list(unfinished)))
    if batch:
        say(f"note: epoch {epoch + 1} is finished with its global batch of {batch} first")
        config = replace(job.config, global_batch=batch)
        report, signal = yield from part(config, True, epoch + 1)
        if signal:
            return report, signal
    return (yield from part(job.config, job.resume, job.config.epochs))


def _launch_parts(job: Job) -> Generator["Trainer", None, Done]:
    """Train part after part, each in a session of its own, as the batch's schedule has it.

    A signal that comes between two parts stops the next at its first step.
    """
    config, world = job.config, job.world
    position = stored_position(job.out, job.resume, world)
    handed: Handover | None = None
    with STOP.polled():
        while True:
            batch, timings = position.global_batch or planned_batches(config)[0], position.timings
            with world.on_stream():
                if config.optim.batch_schedule == "noise":
                    timings = with_timings(config, batch, timings, job.records, world)
                    job.say(f"steps timed: {timings_text(timings)}")
                part = part_config(config, batch)
                with closing(job.open_session(part)) as session:
                    trainer = Trainer(
                        session, job.out, job.say, config, timings, handed, is_alone=job.is_alone
                    )
                    report = yield from trainer.launches(job.resume and handed is None)
                    if not trainer.hands_over:
                        return report, trainer.stopped_by
                    handed = trainer.handover(report)
            position = handed.manifest.position


def _unfinished(config: RunConfig, out: Path, resume: bool, world: World) -> tuple[float, float]:
    """(global batch, epoch) of an epoch begun with another batch; zeros if there is none."""
    manifest = newest_sound_manifest(out) if resume and world.is_first else None
    if manifest is None or not manifest.position.step:
        return 0, 0
    batch = manifest.training["global_batch"]
    return (0, 0) if batch == config.global_batch else (batch, manifest.position.epoch)


@dataclass
class Trainer:
    """Trains an open session, which stays open."""

    session: Session
    out: Path
    """The folder for report.json, metrics.jsonl, model.safetensors, config.toml, checkpoints/."""
    say: Say
    """Prints a line on rank 0."""
    asked: RunConfig | None = None
    """What the whole run is, where the session is of a part of it; None: the session's."""
    timings: list[Timing] = field(default_factory=list)
    """Of the batches that may come next."""
    handed: Handover | None = None
    """What an earlier part of this run left; None: it starts, or goes on from a checkpoint."""
    is_alone: bool = True
    """False: others train in this process, too, and no bar is shown."""
    stopped_by: int = 0
    """The signal that all ranks stop by."""

    def __post_init__(self) -> None:
        session = self.session
        self.world, self.step = session.world, session.step
        self.config = self.asked or session.requested
        self.log_ids = self.config.log_ids
        self.watch = meters.Stopwatch(self.world.device)
        self.nvml = meters.Nvml(self.world.device)
        self.steps_per_epoch = session.feed.order.steps_per_epoch
        self.cadence = Cadence.of(self.config.checkpoint_every)
        self.pulse = Pulse(self.world, self.cadence)
        self.journal = self.handed.journal if self.handed else Journal(self.out, self.say)
        facts = session.network_facts
        self.saver = Saver(self.out, self.step.state, facts) if self.world.is_first else None
        is_shown = self.config.serve != NO_PAGE and self.world.is_first
        self.live = Live(self.out, self.steps_per_epoch, self.say) if is_shown else None
        self.progress = Progress(session, self.config)
        self.said_notes = list(self.handed.notes) if self.handed else []
        self.said: OSError | None = None

    @classmethod
    @contextmanager
    def opened(cls, config: RunConfig, records: Records, out: Path) -> "Iterator[Trainer]":
        """A trainer of a new run, alone or on torchrun's ranks, for `fit(resume=False)`.

        Args:
            config: with a global batch that stays; engine.run trains those that change it.
            out: the run's folder: new, or empty.
        Raises:
            UserError: what the config needs is not here, or `out` may not be written.
        """
        if config.optim.batch_schedule != "fixed":
            remedy = "train it with engine.run, or set optim.batch_schedule=fixed"
            raise UserError(f"a Trainer alone has one global batch; {remedy}")
        check_run(config, "")
        with ExitStack() as stack:
            world = stack.enter_context(start_world(timeout_s=config.timeout_s))
            world.first(lambda: stack.enter_context(take_folder(out, check=check_new)))
            stack.enter_context(world.on_stream())
            session = stack.enter_context(closing(open_session(config, records, world)))
            yield cls(session, out, print if world.is_first else lambda line: None)

    @property
    def position(self) -> Position:
        return self.progress.position

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
        return to_the_end(self.launches(resume, last_epoch))

    def launches(
        self, resume: bool, last_epoch: int | None = None
    ) -> Generator["Trainer", None, RunReport]:
        """As `fit`; yields before the first launch, and at each before anything reads its results.

        A launch that several trainers have together is over when the last of them has come to it.
        """
        self._say_notes()
        if self.handed:
            self._take_over(self.handed)
        elif resume:
            self._resume()
        self._set_batch()
        self.progress.start = self.position
        self.world.first(self._start_files)
        self.pulse.start(self.position.num_steps)
        energy_j = self.nvml.energy_j()
        try:
            with STOP.polled():
                yield self
                yield from self._train(min(last_epoch or self.config.epochs, self.config.epochs))
                used_j = self._with_earlier(self.nvml.energy_since(energy_j))
                self._wait_for_disk()
                if self.hands_over:
                    return run_report(self.progress, "unfinished", self.nvml, energy_j=used_j)
                if self.stopped_by or self.position.epoch < self._last_epoch():
                    return self._stop(used_j)
                return self._end(used_j)
        finally:
            if self.saver:
                self.saver.close()
            if not self.hands_over:
                self.journal.close()

    @property
    def hands_over(self) -> bool:
        """Whether the run goes on in another session, with another global batch."""
        next_batch = self.position.global_batch or self.session.config.global_batch
        is_other = next_batch != self.session.config.global_batch
        return is_other and not self.stopped_by and self.position.epoch < self._last_epoch()

    def handover(self, report: RunReport) -> Handover:
        """What the next part goes on from."""
        return Handover(
            manifest=self.progress.manifest(),
            files=copies_of(self.step.state),
            journal=self.journal,
            notes=self.said_notes,
            utilisation_percent=self.progress.utilisation_percent,
            energy_j=report.gpu_energy_j,
        )

    def _say_notes(self) -> None:
        """What this session does otherwise; not what an earlier part has said."""
        for note in self.session.notes:
            if note not in self.said_notes:
                self.say(f"note: {note}")
                self.said_notes.append(note)

    def _with_earlier(self, energy_j: float | None) -> float | None:
        """With what the parts before took."""
        if energy_j is None or self.handed is None:
            return energy_j
        return energy_j + (self.handed.energy_j or 0.0)

    def _set_batch(self) -> None:
        """Note, for checkpoints, which batch the schedule has now, and what it decides by."""
        if self.config.optim.batch_schedule != "fixed":
            batch = self.session.config.global_batch
            position = replace(self.position, global_batch=batch, timings=self.timings)
            self.progress.position = position

    def _next_batch(self) -> int:
        """The global batch of the next epoch, by rank 0; 0: the config's. Collective."""
        position, kind = self.position, self.config.optim.batch_schedule
        if kind == "ramp":
            return ramp_batch(self.config, position.epoch)
        if kind == "fixed":
            return 0
        batch, critical = self.session.config.global_batch, position.noise.critical_batch
        return int(self.world.text_of_first(str(choose_batch(batch, critical, self.timings))))

    def _last_epoch(self) -> int:
        """Where the training ends: the target may be reached before the last one."""
        return self.position.epoch if self.position.time_to_target_s else self.config.epochs

    def _train(self, last_epoch: int) -> Generator["Trainer", None, None]:
        while self.position.epoch < min(last_epoch, self._last_epoch()):
            yield from self._train_epoch()
            if self.position.step < self.steps_per_epoch:
                return  # stopped, or at its target
            self._end_epoch()
            self._meet_after_epoch()
            if self.stopped_by or self.hands_over:
                return

    def _train_epoch(self) -> Generator["Trainer", None, None]:
        """Train what is left of an epoch, on the clock."""
        epoch, first_step = self.position.epoch, self.position.step
        before = epoch * self.steps_per_epoch
        self.world.synchronize()
        self.watch.start()
        title = f"epoch {epoch + 1}"
        is_shown = self.world.is_first and self.is_alone
        with progress_bar(title, self.steps_per_epoch, enabled=is_shown) as show:
            done = first_step
            for launch in self.step.train_epoch(self.session.feed, epoch, first_step):
                yield self
                self.progress.wait_s += launch.wait_s
                if self.log_ids:
                    path = idlog.path_of(self.out, self.world, epoch, first_step)
                    self._log_ids(path, launch.batch, first=done == first_step)
                done += launch.num_steps
                if done == self.steps_per_epoch:
                    continue  # the feed is let end
                if self._is_evaluated(before + done, launch.num_steps):
                    self._evaluate_inside(done)
                if self.pulse.is_due(before + done):
                    show(done)
                    self._meet(done)
                if self.stopped_by or self.position.time_to_target_s:
                    break
        self._read_log(done)
        self.watch.stop()

    def _is_evaluated(self, step: int, num_steps: int) -> bool:
        """Whether an evaluation is due after a launch of `num_steps` that ended with `step`."""
        every = self.config.evaluate_every
        return bool(every) and step % every < num_steps and "val" in self.session.records.splits

    def _evaluate_inside(self, done: int) -> None:
        """Evaluate in the middle of an epoch, while the clock stands still."""
        self._read_log(done)
        _, accuracy = self._validate()
        self.say(f"step {self.position.num_steps}  val {accuracy:7.2%}")
        if self.progress.is_best or self.position.time_to_target_s:
            self._save(wait=True)
        self.watch.start()

    def _log_ids(self, path: Path, batch: Batch, first: bool) -> None:
        """Where the disk refuses, this rank's log of ids ends: a gap would tell untruths."""
        try:
            idlog.append(path, batch, first)
        except OSError as error:
            self.log_ids = False
            self.journal.ids_end(error)

    def _meet_after_epoch(self) -> None:
        """Agree on stopping, saved, also where the cadence asks for no checkpoint here."""
        wishes = self.pulse.meet(self.position.num_steps)
        self.stopped_by = wishes.signal
        if wishes.save and not self.pulse.is_saved(self.position.num_steps):
            self._save(wait=True)

    def _meet(self, done: int) -> None:
        """Agree with the other ranks on saving and stopping, in the middle of an epoch."""
        wishes = self.pulse.meet(self.position.epoch * self.steps_per_epoch + done)
        self.stopped_by = wishes.signal
        if wishes.save:
            self._read_log(done)
            self._save(wait=bool(wishes.signal))

    def _read_log(self, done: int) -> None:
        """Add what was trained since the last reading to the position. Collective."""
        log = self.step.read_training()
        lap_s = self.watch.lap()
        self.progress.trained(log, done, lap_s)
        if self.live:
            rate = log.num_samples / max(lap_s, 1e-9)
            self.live.trained(self.position, log.loss_S, rate, self._memory())

    def _memory(self) -> Memory:
        return Memory(
            host_peak_rss_gib=meters.host_peak_rss_gib(),
            device_used_gib=self.nvml.used_gib(),
            gpu_utilisation_percent=self.nvml.utilisation_percent(),
            power_w=self.nvml.power_w(),
        )

    def _end_epoch(self) -> None:
        """Evaluate, write the epoch's line, and save."""
        if (percent := self.nvml.utilisation_percent()) is not None:
            self.progress.utilisation_percent.append(percent)
        position, log = self.position, self.progress.log
        rate = log.num_samples / max(position.epoch_train_s, 1e-9)
        metrics: dict[str, Any] = {
            "epoch": position.epoch + 1,
            "step": position.number,
            "global_batch": self.session.config.global_batch,
            "train_s": position.train_s,
            "train_loss": log.loss,
            "train_accuracy_fraction": log.accuracy,
            "samples_per_s": rate,
        }
        line = f"epoch {position.epoch + 1:>3}/{self.config.epochs}"
        line += f"  loss {log.loss:.4f}  train {log.accuracy:7.2%}"
        self.progress.end_epoch()
        metrics |= self.position.noise.known()
        self.progress.position = replace(self.position, global_batch=self._next_batch())
        if "val" in self.session.records.splits:
            val_loss, val = self._validate()
            metrics |= {"val_loss": val_loss, "val_accuracy_fraction": val}
            line += f"  val {val:7.2%}"
        if self.world.is_first:
            self.world.at(self.position.num_steps, SAVING)
            self.journal.epoch(metrics)
        if self._saves_epoch():
            self._save(wait=True)
        self.say(f"{line}  {rate:>9,.0f} samples/s  {position.train_s:7.2f} s")

    def _validate(self) -> tuple[float, float]:
        """Evaluate the validation split, and keep the best."""
        loss, accuracy = self._evaluate("val")
        if not math.isfinite(loss):
            where = f"after epoch {self.position.epoch}"
            raise UserError(f"the validation loss is not finite {where}; lower optim.learning_rate")
        self.progress.validated(accuracy, self.config.target_accuracy)
        return loss, accuracy

    def _saves_epoch(self) -> bool:
        """Whether a checkpoint is due at an epoch's end: the last is, and the best so far."""
        every, epoch = self.cadence.epochs, self.position.epoch
        by_count = bool(every) and epoch % every == 0
        is_end = epoch >= self.config.epochs or self.hands_over
        return by_count or self.progress.is_best or is_end

    def _evaluate(self, split: str) -> tuple[float, float]:
        """Loss and accuracy of a whole split."""
        start = time.perf_counter()
        loss, accuracy = evaluate(self.session, split)
        self.progress.evaluated(time.perf_counter() - start)
        if self.config.serve != NO_PAGE:
            count_CC = self.step.read_confusion()
            if self.live:
                self.live.evaluated(self.position, split, (loss, accuracy), count_CC)
        return loss, accuracy

    def _save(self, wait: bool) -> None:
        """Begin a checkpoint of the position, which all ranks have reached. Collective."""
        tensors = whole_tensors(self.step.state)
        if self.saver:
            if wait:
                self._wait_for_disk()
            loss_S = torch.from_numpy(self.progress.log.loss_S.copy())
            self.saver.save(self.progress.manifest(), loss_S, tensors)
            self._say_failure(self.saver)
        for _ in tensors:
            pass  # gathered with the first rank, which keeps them, or leaves them if it is busy
        self.pulse.saved(self.position.num_steps)

    def _say_failure(self, saver: Saver) -> None:
        """Say why a checkpoint was not written; it may be asked for again before the next is."""
        failure = saver.failure
        if failure is self.said:
            return
        self.said = failure
        if failure:
            self.journal.refused(failure, CHECKPOINTS)
        else:
            self.journal.accepted(CHECKPOINTS)

    def _wait_for_disk(self) -> None:
        if self.saver:
            self.world.at(self.position.num_steps, SAVING)
            self.saver.wait()
            self._say_failure(self.saver)

    def _resume(self) -> None:
        """Load the newest checkpoint on rank 0, and give it to the others. Collective."""
        found = self.world.first(self._find)
        text = self.world.text_of_first(json.dumps(asdict(found.manifest)) if found else "")
        if not text:
            self.say("the run was stopped before its first checkpoint; it starts at step 0")
            return
        manifest = typed(Manifest, json.loads(text), "manifest.json")
        check_same_records(self.out, manifest, self.session.records.fingerprint)
        deal_out(self.step.state, found.files if found else {}, self.world)
        self.step.state.load_scaler(manifest.scaler)
        self._take_up(manifest, found.loss_S if found else torch.zeros(0, dtype=torch.float64))
        inside = f", step {self.position.step} of the next" if self.position.step else ""
        self.say(f"resumed after epoch {self.position.epoch} of {self.config.epochs}{inside}")

    def _take_over(self, handed: Handover) -> None:
        """Go on from what the part before left."""
        put_back(handed.files, self.step.state)
        self.step.state.load_scaler(handed.manifest.scaler)
        self.progress.utilisation_percent = handed.utilisation_percent
        self._take_up(handed.manifest, torch.zeros(0, dtype=torch.float64))
        batch, epoch = self.session.config.global_batch, self.position.epoch + 1
        self.say(f"from epoch {epoch} on: global batch {batch}")

    def _find(self) -> Found | None:
        """The newest checkpoint, on rank 0; None if the run has none yet."""
        if not checkpoints(self.out):
            return None
        found = find_checkpoint(self.out, self.step.state)
        for sentence in found.skipped:
            self.say(f"note: {sentence}")
        if self.saver:
            self.saver.trust(checkpoint_path(self.out, found.manifest.position.number))
        return found

    def _take_up(self, manifest: Manifest, loss_S: torch.Tensor) -> None:
        """Go on where a checkpoint ends; with another batch, from its epoch's beginning."""
        position, order = manifest.position, self.session.feed.order
        if position.epoch > self.config.epochs or position.step >= self.steps_per_epoch:
            where = f"its checkpoint stands after epoch {position.epoch}, step {position.step}"
            plan = f"of {self.config.epochs} epochs of {self.steps_per_epoch} steps"
            raise UserError(f"{self.out}: {where} {plan}; give more --epochs")
        num_steps = position.epoch * self.steps_per_epoch + position.step
        target, best = self.config.target_accuracy, position.best_val_accuracy_fraction or 0.0
        is_reached = 0 < target <= best
        self.progress.position = replace(
            position,
            num_steps=num_steps,
            renumbered=position.number - num_steps,
            time_to_target_s=position.time_to_target_s if is_reached else None,
        )
        batch = order.global_batch
        self.progress.log = TrainLog.of_part(loss_S.numpy(), position.epoch_correct, batch)
        self.progress.earlier = manifest.segments
        self.progress.batches = manifest.batches
        self.step.resume_at(num_steps, position.num_skipped_in_a_row)
        for change in changes(manifest, self.session, self.config):
            self.session.notes.append(change)
            self.say(f"note: {change}")

    def _start_files(self) -> None:
        num_missing = max(NUM_CHECKPOINTS_AT_ONCE - len(checkpoints(self.out)), 1)
        wanted = num_missing * self.step.state.num_bytes()
        free = shutil.disk_usage(self.out).free
        if free < wanted:
            what = f"{free / 1e6:.1f} MB are free, checkpoints need {wanted / 1e6:.1f} MB"
            raise UserError(f"{self.out}: {what}; free space or choose another --out")
        if self.handed is None:
            self.journal.start(self.config, self.position.epoch)
            self._start_live()
        self.journal.report(run_report(self.progress, "unfinished", self.nvml))

    def _start_live(self) -> None:
        records = self.session.records
        if self.live:
            self.live.start(self.position, records.split("train"), len(records.classes))

    def _end(self, energy_j: float | None) -> RunReport:
        """Evaluate the test split, and write the weights and the report."""
        test = self._evaluate("test") if "test" in self.session.records.splits else None
        self._warn_of_chance()
        report = run_report(self.progress, "finished", self.nvml, test, energy_j)
        model = self.step.state.whole_model()
        self.world.at(self.position.num_steps, SAVING)
        self.world.first(lambda: self.journal.end(report, model))
        return report

    def _warn_of_chance(self) -> None:
        """Say so where the network has learnt nothing."""
        best, num_classes = self.position.best_val_accuracy_fraction, self.session.records.classes
        if best is not None and best < CHANCE / len(num_classes):
            what = f"the best validation accuracy is {best:.2%}, no better than guessing"
            self.say(f"note: {what}; lower optim.learning_rate, or look at the labels")

    def _stop(self, energy_j: float | None) -> RunReport:
        """Say where the run stands, and how it goes on."""
        report = run_report(self.progress, "stopped", self.nvml, energy_j=energy_j)
        if not self.world.is_first:
            return report
        self.journal.report(report)
        if self.stopped_by:
            name, position = signal.Signals(self.stopped_by).name, self.position
            facts = {"signal": name, "epoch": position.epoch, "step": position.step}
            self.journal.stopped(json.dumps(facts) + "\n")
            saved = "not saved" if self.saver and self.saver.failure else "saved"
            where = f"epoch {position.epoch + 1}, step {position.step}"
            self.say(f"stopped by {name} in {where}, {saved}; go on with --resume {self.out}")
        return report


def changes(manifest: Manifest, session: Session, asked: RunConfig) -> list[str]:
    """What is otherwise than before a run was stopped, a sentence each."""
    found = []
    for name, is_now in asked.training_settings().items():
        was = manifest.training.get(name, is_now)
        if was != is_now:
            found.append(f"{name} was {was} and is {is_now} from here on")
    if manifest.segments:
        last = manifest.segments[-1]
        if last.num_ranks != session.world.size:
            ranks = f"{session.world.size} ranks go on where {last.num_ranks} stopped"
            found.append(f"{ranks}: the same samples in the same order, summed in another")
        for name, is_now in switches(session.config).items():
            if last.effective.get(name, is_now) != is_now:  # earlier versions know fewer
                found.append(f"{name} was {last.effective.get(name)} and is {is_now} from here on")
    return found
