"""The trackers by their own packages: TensorBoard, wandb, MLflow, trackio.

Each has an epoch's figures at the step that is the epoch's number, so that all draw the same curve.
Where each keeps a run, under which project, and what it records of the machine by itself, is set as
its own documentation says; the project is `PROJECT` where that says nothing.

They import their packages when they are opened, and know no threads: that is train/track.py.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, get_type_hints

from engine.config import TrackerName
from engine.report import RunReport

PROJECT = "tmnist-engine"
EVENTS = "tensorboard"
RUN_TAG = "tmnist_engine_run"
"""Of an MLflow run, whose own id it chooses itself."""
Figures = dict[str, float]
RENAMED = {"step": "num_steps"}
"""Of an epoch: trackio keeps `step` for its axis, and report.json has the other word."""
PREFIX = "report/"
"""Before report.json's figures: some have the name of an epoch's, and are of the whole run."""
KINDS = (int, float, float | None)
SUMMARY = tuple(
    n for n, kind in get_type_hints(RunReport).items() if kind in KINDS if n != "format"
)
"""Those figures of report.json that are a number."""


def epoch_figures(metrics: Figures) -> Figures:
    """A line of metrics.jsonl under the names that trackers show."""
    return {RENAMED.get(name, name): value for name, value in metrics.items()}


def final_figures(report: RunReport) -> Figures:
    """The numbers of report.json under the names that trackers show; without those not known."""
    values = {name: getattr(report, name) for name in SUMMARY}
    return {f"{PREFIX}{name}": value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """What a tracker is given of a run as it opens it."""

    out: Path
    name: str
    """To be shown; no other run's."""
    id: str
    """Kept in the run's folder: under it a run that goes on is found again."""
    settings: dict[str, str | int | float | bool]
    """Dotted, as in config.toml."""
    num_epochs_done: int
    """Where the run goes on."""


class Tracker(Protocol):
    """A run as a tracker has it. Whatever its package raises comes through."""

    num_epochs: int
    """So many it has already; these are not given again."""

    def epoch(self, number: int, figures: Figures) -> None:
        """Take the figures of epoch `number`, from 1."""

    def end(self, number: int, figures: Figures, is_finished: bool) -> None:
        """Take the figures of the whole run, after epoch `number`, and close; none if it is cut."""


class TensorBoard:
    """Events in OUT/tensorboard; those after the place where a run goes on are forgotten."""

    num_epochs = 0

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = str(run.out / EVENTS)
        writer = SummaryWriter(folder, purge_step=run.num_epochs_done + 1)
        self._writer = cast(Any, writer)  # file_writer has no type
        names = [f"{PREFIX}{name}" for name in SUMMARY]
        names_of_settings, values, self._end = hparams(run.settings, dict.fromkeys(names))
        self._writer.file_writer.add_summary(names_of_settings)
        self._writer.file_writer.add_summary(values)
        self._writer.flush()

    def epoch(self, number: int, figures: Figures) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def end(self, number: int, figures: Figures, is_finished: bool) -> None:
        self.epoch(number, figures)
        if is_finished:
            self._writer.file_writer.add_summary(self._end, number)
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, under the id; its steps only grow, so none comes twice."""

    def __init__(self, run: Tracked) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.name,
            config=run.settings,
            resume="allow",
            reinit="create_new",  # members of a sweep have one each
        )
        self.num_epochs = self._run.starting_step - 1

    def epoch(self, number: int, figures: Figures) -> None:
        self._run.log(figures, step=number, commit=True)

    def end(self, number: int, figures: Figures, is_finished: bool) -> None:
        self._run.summary.update(figures)
        self._run.finish(exit_code=0 if is_finished else 1)


class MLflow:
    """A run of MLflow, found again by a tag; its parameters stay those it began with."""

    def __init__(self, run: Tracked) -> None:
        import mlflow
        from mlflow.entities import Param

        self._client = mlflow.MlflowClient()
        ids = [_experiment_id(self._client)]
        found = self._client.search_runs(ids, f"tags.{RUN_TAG} = '{run.id}'")
        if found:
            self._id = found[0].info.run_id
            self.num_epochs = int(found[0].data.metrics.get("epoch", 0))
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {RUN_TAG: run.id}
        self._id = self._client.create_run(ids[0], run_name=run.name, tags=tags).info.run_id
        self.num_epochs = 0
        settings = [Param(name, str(value)) for name, value in run.settings.items()]
        self._client.log_batch(self._id, params=settings)

    def epoch(self, number: int, figures: Figures) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, number) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def end(self, number: int, figures: Figures, is_finished: bool) -> None:
        self.epoch(number, figures)
        self._client.set_terminated(self._id, "FINISHED" if is_finished else "KILLED")


def _experiment_id(client: Any) -> str:
    """Found as mlflow.set_experiment does, which would set it for the whole process, too."""
    from mlflow.exceptions import MlflowException

    if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return given
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    try:
        return str(client.create_experiment(name))
    except MlflowException:  # it is there
        return str(client.get_experiment_by_name(name).experiment_id)


class Trackio:
    """A run of trackio, found again by its name."""

    def __init__(self, run: Tracked) -> None:
        import trackio

        self._run = trackio.init(PROJECT, name=run.name, config=run.settings, resume="allow")
        self.num_epochs = self._run._next_step - 1  # it has no public word for it

    def epoch(self, number: int, figures: Figures) -> None:
        self._run.log(figures, step=number)

    def end(self, number: int, figures: Figures, is_finished: bool) -> None:
        if figures:
            self.epoch(number, figures)
        self._run.finish()


TRACKERS: dict[TrackerName, Callable[[Tracked], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""By the names of their packages, too."""
