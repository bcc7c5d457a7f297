"""The files of a run's folder that people read: config, metrics, report, weights; on rank 0.

A disk that refuses does not end the training: it is said once, and what could not be written is
written with what comes next. At the end a second place is tried.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import RunConfig
from engine.config_text import to_toml
from engine.durable import remove_leftovers, write_file, writing
from engine.errors import UserError
from engine.host import user_cache
from engine.report import RunReport, write_json
from engine.train.checkpoint import remove_unfinished
from engine.train.folder import CONFIG, METRICS, PREEMPTED, REPORT, WEIGHTS
from engine.train.state import Tensors
from engine.train.track import Tracking
from engine.train.weights import save_model

FILES, CHECKPOINTS = "files", "checkpoints"
Say = Callable[[str], None]


@dataclass
class Journal:
    """Writes RUN's files."""

    out: Path
    say: Say
    refusing: set[str] = field(default_factory=set)
    """Which of FILES and CHECKPOINTS the disk refused last; said when the first did."""
    lines: list[bytes] = field(default_factory=list)
    """All of metrics.jsonl."""
    is_behind: bool = False
    """Whether the last of them are not on the disk."""

    def __post_init__(self) -> None:
        self.tracking = Tracking(self.say)

    def start(self, config: RunConfig, num_epochs_done: int) -> None:
        """Write config.toml, cut metrics back to what the checkpoint knows, and open trackers.

        Raises:
            UserError: the folder cannot be written.
        """
        metrics = self.out / METRICS
        with writing(self.out):
            remove_unfinished(self.out)
            for name in (CONFIG, METRICS, REPORT, WEIGHTS, PREEMPTED):
                remove_leftovers(self.out / name)
            write_file(self.out / CONFIG, to_toml(config).encode())  # from now on it is a run
            (self.out / PREEMPTED).unlink(missing_ok=True)
            if metrics.exists():
                self.lines = metrics.read_bytes().splitlines(keepends=True)[:num_epochs_done]
            write_file(metrics, b"".join(self.lines))
            self.tracking.start(config, self.out, num_epochs_done)

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Add an epoch's line."""
        self.lines.append(json.dumps(metrics, allow_nan=False).encode() + b"\n")
        self.is_behind = True
        self.attempt(lambda: self._write_lines(self.out))
        self.tracking.epoch(metrics)

    def report(self, report: RunReport) -> None:
        """Write report.json of a run that goes on."""

        def write() -> None:
            self._write_lines(self.out)
            write_json(report, self.out / REPORT)

        self.attempt(write)

    def _write_lines(self, folder: Path) -> None:
        """Write metrics.jsonl where it lacks lines."""
        if self.is_behind:
            write_file(folder / METRICS, b"".join(self.lines))
            self.is_behind = False

    def attempt(self, write: Callable[[], None]) -> None:
        """Write if the disk lets us; say the first time that it does not."""
        try:
            write()
        except OSError as error:
            self.refused(error)
        else:
            self.accepted()

    def accepted(self, what: str = FILES) -> None:
        """The disk takes this: where it refuses again, that is said again."""
        self.refusing.discard(what)

    def refused(self, error: OSError, what: str = FILES) -> None:
        """The disk refused: say so, once until it takes all again.

        A full disk has room for a line of metrics.jsonl and none for a checkpoint.
        """
        if not self.refusing:
            why = f"cannot be written ({error.strerror or error})"
            self.say(
                f"note: {self.out}: {why}; training goes on, nothing new is saved until it can"
            )
        self.refusing.add(what)

    def ids_end(self, error: OSError) -> None:
        """The disk refused the log of ids, which ends with that."""
        why = f"cannot be written ({error.strerror or error})"
        self.say(f"note: {self.out}: {why}; the log of ids ends here, training goes on")

    def stopped(self, text: str) -> None:
        """Leave the file that says why a run ended early."""
        self.attempt(lambda: write_file(self.out / PREEMPTED, text.encode()))

    def end(self, report: RunReport, model: Tensors) -> Path:
        """Write the weights and the report; in the cache folder if the run's own refuses.

        Args:
            model: parameters and buffers, whole.
        Returns:
            The folder they are in.
        Raises:
            UserError: neither can be written.
        """
        folder = self._end_anywhere(report, model)
        self.tracking.end(report)
        return folder

    def close(self) -> None:
        """End what has not ended with the run."""
        self.tracking.end()

    def _end_anywhere(self, report: RunReport, model: Tensors) -> Path:
        try:
            self._write_end(self.out, report, model)
            return self.out
        except OSError as error:
            why = f"{self.out}: cannot be written ({error.strerror or error})"
        try:
            name = f"{self.out.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
            second = user_cache() / "rescued" / name
            second.mkdir(parents=True)
            self._write_end(second, report, model)
        except (OSError, UserError) as error:
            also = f"nor can the cache folder ({error})"
            raise UserError(f"{why}, {also}; free space, then go on with --resume") from None
        self.say(f"note: {why}; weights and report are in {second}")
        return second

    def _write_end(self, folder: Path, report: RunReport, model: Tensors) -> None:
        self._write_lines(folder)
        save_model(folder / WEIGHTS, model, report.network)
        write_json(report, folder / REPORT)
