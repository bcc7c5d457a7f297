"""One repetition of one cell: the child of tools/measure/runner.py, alone or under torchrun.

python -m tools.measure.cell JOB RESULT reads what to measure from JOB and leaves figures in RESULT,
both JSON. In this order: whole epochs and evaluation (where accuracy is asked for), the timed
steps, and (once a cell) the traced ones. Each figure is of rank 0 where it says nothing else.
"""

import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch

from engine import meters
from engine.config import RunConfig, override
from engine.data.sample import ensure_sample
from engine.durable import writing
from engine.errors import UserError, exit_on_user_error, sentence
from engine.feeds.build import open_for
from engine.host import end_rank, prepare_process
from engine.models import make_model
from engine.models.baseline import GlyphNet
from engine.paths import PATH
from engine.report import RunReport, write_json
from engine.train.session import Session, open_session
from engine.train.trainer import Trainer
from engine.typed import read_as
from engine.world import World, start_world
from tools.measure.products import products
from tools.measure.results import Confusion, Epoch, Repetition, read_epochs
from tools.measure.roofline import Work, copy_bandwidth, roofline_fraction, studys_floor
from tools.measure.runner import Job
from tools.measure.steps import Measured, measure
from tools.measure.trace import stages, traced
from tools.report.confusion import confusion_of

NUM_TRACED = 10
LEAST_ENERGY_S = 2.0
"""NVML's energy counter is too coarse for less."""
Bandwidth = Callable[[torch.device], float | None]


@click.command()
@click.argument("job_file", metavar="JOB", type=PATH)
@click.argument("result", type=PATH)
def main(job_file: Path, result: Path) -> None:
    """Measure as JOB says and write RESULT."""
    job = read_as(Job, job_file)
    with exit_on_user_error(end_rank):
        prepare_process()
        try:
            with start_world(job.device) as world, world.on_stream():
                found = repetition(job, world)
                with writing(result):
                    world.first(lambda: write_json(found, result))
        except UserError:
            raise
        except Exception as error:  # the parent reports it in one line and goes on with other cells
            raise SystemExit(f"error: {sentence(error)}") from None
    end_rank()


def repetition(job: Job, world: World) -> Repetition:
    """Everything measured of a job; collective."""
    config = override(RunConfig(), job.settings, "the cell")
    records = open_for(config.data, config.data.path or job.data or ensure_sample())
    with closing(open_session(config, records, world)) as session:
        trained = _trained(session) if job.accuracy else None
        confusion = _confusion(session) if job.accuracy and job.first else None
        found = replace(timed(session, job.num_steps), confusion=confusion)
        if trained:
            found = _with_training(found, *trained)
        if job.first:
            trace = traced(session, min(job.num_steps, NUM_TRACED))
            found = replace(found, stage_ms=stages(trace, world.device))
    return found


def _trained(session: Session) -> tuple[RunReport, list[Epoch]]:
    """Whole epochs as engine.run trains them; the epochs on rank 0 only."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        report = Trainer(session, out, lambda line: None).fit(resume=False)
        return report, read_epochs(out) if session.world.is_first else []


def _with_training(found: Repetition, report: RunReport, epochs: list[Epoch]) -> Repetition:
    return replace(
        found,
        train_s=report.train_s,
        time_to_target_s=report.time_to_target_s,
        val_accuracy_fraction=report.val_accuracy_fraction,
        test_accuracy_fraction=report.test_accuracy_fraction,
        epochs=epochs,
    )


def timed(session: Session, num_steps: int, bandwidth: Bandwidth = copy_bandwidth) -> Repetition:
    """Throughput, step times, waiting, memory, power; collective.

    Args:
        bandwidth: measures the device's memory, at the end: it takes 2 GiB.
    Raises:
        UserError: the loss was not finite: a cell trained to NaN is no result.
    """
    world, nvml = session.world, meters.Nvml(session.world.device)
    measured = measure(session, num_steps, nvml)
    session.step.read_training()
    p10, median, p90 = np.percentile(measured.step_ms_S, [10, 50, 90])
    return Repetition(
        seed=session.config.seed,
        environment=session.environment,
        effective=session.effective,
        notes=session.notes,
        num_ranks=world.size,
        global_batch=session.config.global_batch,
        num_steps=len(measured.step_ms_S),
        steps_per_launch=measured.steps_per_launch,
        samples_per_s=measured.samples_per_s,
        step_ms=float(median),
        step_p10_ms=float(p10),
        step_p90_ms=float(p90),
        data_wait_fraction=float(measured.wait_ms / measured.step_ms_S.sum()),
        host_peak_rss_gib=meters.host_peak_rss_gib(),
        torch_peak_gib=meters.torch_peak_gib(world.device),
        device_used_gib=nvml.used_gib(),
        gpu_utilisation_percent=measured.gpu_utilisation_percent,
        power_w=measured.power_w,
        energy_j_per_ksample=_energy(session, measured),
        kept=session.kept,
        memory_gib_by_owner=world.ledger.gib or None,
        roofline_fraction=_roofline(session, measured.samples_per_s, bandwidth(world.device)),
    )


def _energy(session: Session, measured: Measured) -> float | None:
    """J of all GPUs per thousand samples; None where a rank's NVML does not tell it."""
    used_j = measured.energy_j
    if used_j is None or measured.step_ms_S.sum() < 1000 * LEAST_ENERGY_S:
        used_j = np.nan
    all_j = session.world.sum(torch.tensor([used_j])).item()
    num_samples = len(measured.step_ms_S) * session.config.global_batch
    return None if np.isnan(all_j) else all_j / num_samples * 1000


def _roofline(session: Session, samples_per_s: float, bandwidth: float | None) -> float | None:
    """One rank's rate of what its GPU's bandwidth (bytes/s) and FLOPs allow."""
    world, records = session.world, session.records
    name, precision = session.environment.gpu_name, session.config.step.precision
    shape = (*records.height_width, len(records.classes))

    def works(item_bytes: int) -> list[Work]:
        model = make_model(session.config.model, *shape, seed=0)
        if isinstance(model, GlyphNet):
            is_frozen = not model.conv1.weight.requires_grad
            return studys_floor(*shape, item_bytes, is_frozen=is_frozen)
        return products(model, *shape, item_bytes)

    return roofline_fraction(samples_per_s / world.size, name, precision, bandwidth, works)


def _confusion(session: Session) -> Confusion | None:
    """What rank 0 reads in the test split, where there is one in memory, and it has the network."""
    test = session.records.splits.get("test")
    readable = test is not None and isinstance(test.image_NHW, np.ndarray)
    readable = readable and session.config.step.parallel != "fsdp"
    return confusion_of(session) if readable and session.world.is_first else None


if __name__ == "__main__":
    main()
