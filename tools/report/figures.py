"""The figures that results have: what each is called, its unit, how it is written; one table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np

from tools.measure.results import RATE, Repetition
from tools.report.rows import number

Form = Callable[[float], str]


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def times(value: float) -> str:
    return f"{value:.2f} x"


@dataclass(frozen=True)
class Figure:
    """How a figure is called and written."""

    title: str
    unit: str = ""
    form: Form = number

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


FIGURES = {
    "num": Figure("n"),
    "batch": Figure("batch per rank"),
    "samples_per_s": Figure("samples/s"),
    "samples_per_s_p10": Figure("p10"),
    "samples_per_s_p90": Figure("p90"),
    "samples_per_s_low95": Figure("95 % from"),
    "samples_per_s_high95": Figure("to"),
    "gain": Figure("over its base", form=times),
    "speedup": Figure("speed-up", form=times),
    "efficiency": Figure("efficiency", form=percent),
    "steps_per_launch": Figure("steps per launch"),
    "step_ms": Figure("step", "ms"),
    "step_p10_ms": Figure("step p10", "ms"),
    "step_p90_ms": Figure("step p90", "ms"),
    "data_wait_fraction": Figure("waiting for data", form=percent),
    "host_peak_rss_gib": Figure("peak host memory", "GiB"),
    "torch_peak_gib": Figure("peak GPU memory of torch", "GiB"),
    "device_used_gib": Figure("GPU memory in use", "GiB"),
    "gpu_utilisation_percent": Figure("GPU utilisation", "%"),
    "power_w": Figure("power", "W"),
    "energy_j_per_ksample": Figure("J per 1,000 samples"),
    "roofline_fraction": Figure("roofline", form=percent),
    "train_s": Figure("training time", "s"),
    "time_to_target_s": Figure("time to target", "s"),
    "train_accuracy_fraction": Figure("train accuracy", form=percent),
    "val_accuracy_fraction": Figure("val accuracy", form=percent),
    "test_accuracy_fraction": Figure("test accuracy", form=percent),
    "accuracy_fraction": Figure("accuracy", form=percent),
    "share_fraction": Figure("share", form=percent),
    "num_epochs": Figure("epochs"),
    "global_batch": Figure("global batch"),
    "precision": Figure("precision"),
    "feed": Figure("feed"),
    "cuda_graphs": Figure("CUDA graphs"),
}
MEDIANS = tuple(
    name
    for name, kind in get_type_hints(Repetition).items()
    if kind == float | None and name != RATE
)
"""Figures of a repetition of which a cell shows the median, beside the throughput."""


def heading(column: str) -> str:
    """What a table calls a column, with its unit; one that is no figure goes by its own words."""
    known = FIGURES.get(column.removeprefix("published "))
    if known:
        return known.heading if column in FIGURES else f"published {known.heading}"
    return column.replace("_", " ")


def show(column: str, value: Any) -> str:
    """A value as tables tell it."""
    if value is None or value != value:
        return "-"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        return str(value)
    known = FIGURES.get(column.removeprefix("published "))
    return known.form(float(value)) if known else number(float(value))
