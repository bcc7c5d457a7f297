"""One measurement in processes of its own: no side of a comparison inherits the other's heap."""

from dataclasses import replace
from pathlib import Path

from engine.config import flatten
from engine.config_text import read_toml
from engine.host import ROOT
from tools.measure.matrix import config_cell
from tools.measure.results import Repetition, Settings
from tools.measure.runner import Job, Run, in_child


def job_of(
    config: str,
    *,
    batch_size: int,
    num_steps: int,
    num_ranks: int = 1,
    num_threads: int = 0,
    changed: Settings | None = None,
) -> Job:
    """bench_configs/`config`.toml on the CPU, as tools/profile would measure it.

    Args:
        batch_size: samples of a rank.
        changed: settings beside those of the file.
    """
    settings = flatten(read_toml(ROOT / "bench_configs" / f"{config}.toml")) | (changed or {})
    cell = config_cell(config, settings, batch_size * num_ranks)
    axes = {"batch": batch_size, "ranks": num_ranks}
    cell = replace(cell, axes=axes, num_steps=num_steps, num_threads=num_threads)
    return Run(title=config, cells=[cell], out=Path(), device="cpu").job(cell, 0)


def measured(
    config: str,
    *,
    batch_size: int,
    num_steps: int,
    num_ranks: int = 1,
    num_threads: int = 0,
    changed: Settings | None = None,
) -> Repetition:
    """What `job_of` the same comes to.

    Raises:
        RuntimeError: it failed.
    """
    job = job_of(
        config,
        batch_size=batch_size,
        num_steps=num_steps,
        num_ranks=num_ranks,
        num_threads=num_threads,
        changed=changed,
    )
    found = in_child(job)
    if found.failed:
        raise RuntimeError(found.failed)
    return found
