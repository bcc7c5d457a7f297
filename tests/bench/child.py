"""One measurement in processes of its own: no side of a comparison inherits the other's heap."""

from dataclasses import replace
from pathlib import Path
from typing import Required, TypedDict, Unpack

from engine.config import flatten
from engine.config_text import read_toml
from engine.host import ROOT
from tools.measure.matrix import config_cell
from tools.measure.results import Repetition, Settings
from tools.measure.runner import Job, Run, in_child


class Given(TypedDict, total=False):
    """What is measured of a configuration."""

    batch_size: Required[int]
    """Samples of a rank."""
    num_steps: Required[int]
    num_ranks: int
    """By default 1."""
    num_threads: int
    """By default as many as torch takes."""
    changed: Settings
    """Settings beside those of the file."""


def job_of(config: str, **given: Unpack[Given]) -> Job:
    """bench_configs/`config`.toml on the CPU, as tools/profile would measure it."""
    file = ROOT / "bench_configs" / f"{config}.toml"
    settings = flatten(read_toml(file)) | given.get("changed", {})
    batch_size, num_ranks = given["batch_size"], given.get("num_ranks", 1)
    cell = replace(
        config_cell(config, settings, batch_size * num_ranks),
        axes={"batch": batch_size, "ranks": num_ranks},
        num_steps=given["num_steps"],
        num_threads=given.get("num_threads", 0),
    )
    return Run(title=config, cells=[cell], out=Path(), device="cpu").job(cell, 0)


def measured(config: str, **given: Unpack[Given]) -> Repetition:
    """What `job_of` the same comes to.

    Raises:
        RuntimeError: it failed.
    """
    found = in_child(job_of(config, **given))
    if found.failed:
        raise RuntimeError(found.failed)
    return found
