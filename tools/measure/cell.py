"""One repetition of one cell: the child that tools/measure/matrix.py starts, alone or under torchrun.

python -m tools.measure.cell JOB RESULT reads what to measure from JOB and leaves figures in RESULT, both JSON. In this
order: whole epochs and evaluation (where accuracy is asked for), the timed steps, and (once a cell) the traced ones.
Each figure is of rank 0 where it says nothing else.
"""

import json
import tempfile
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from engine import meters
from engine.config import RunConfig, override
from engine.data.sample import ensure_sample
from engine.durable import writing
from engine.errors import UserError, exit_on_user_error
from engine.feeds.build import open_for
from engine.host import prepare_process
from engine.paths import PATH
from engine.report import write_json
from engine.train.session import Session, open_session
from engine.train.trainer import Trainer
from engine.world import World, end_rank, start_world
from tools.measure.roofline import copy_bandwidth, roofline_fraction
from tools.measure.steps import measure
from tools.measure.trace import stages, traced
from tools.report.confusion import confusion_of

NUM_TRACED = 10
NOT_ASKED: dict[str, Any] = {
    "train_s": None, "time_to_target_s": None, "val_accuracy_fraction": None, "test_accuracy_fraction": None,
    "epochs": [],
}  # fmt: skip
"""What only training to the end tells."""


@click.command()
@click.argument("job_file", metavar="JOB", type=PATH)
@click.argument("result", type=PATH)
def main(job_file: Path, result: Path) -> None:
    """Measure as JOB says and write RESULT."""
    job = json.loads(job_file.read_bytes())
    with exit_on_user_error():
        prepare_process()
        try:
            with start_world(job["device"]) as world, world.on_stream():
                found = repetition(job, world)
                with writing(result):
                    world.first(lambda: write_json(found, result))
        except UserError:
            raise
        except (
            Exception
        ) as error:  # whatever it is, the parent tells it in one line and goes on with other cells
            first_line = str(error).strip().partition("\n")[0]
            raise SystemExit(f"error: {type(error).__name__}: {first_line}") from None
    end_rank()


def repetition(job: dict[str, Any], world: World) -> dict[str, Any]:
    """Everything measured of a job; collective."""
    config = override(RunConfig(), job["settings"], "the cell")
    records = open_for(config.data, config.data.path or job["data"] or ensure_sample())
    with closing(open_session(config, records, world)) as session:
        found = NOT_ASKED | (_trained(session) if job["accuracy"] else {})
        found |= {"confusion": _confusion(session) if job["accuracy"] and job["first"] else None}
        found |= _timed(session, job["num_steps"])
        trace = traced(session, min(job["num_steps"], NUM_TRACED)) if job["first"] else None
        return found | {"stage_ms": trace and stages(trace, world.device)}


def _trained(session: Session) -> dict[str, Any]:
    """Whole epochs as engine.run trains them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        report = Trainer(session, out, lambda line: None).fit(resume=False)
        lines = (
            (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            if session.world.is_first
            else []
        )
    epochs = {"epochs": [json.loads(line) for line in lines]}
    return {name: getattr(report, name) for name in NOT_ASKED if name != "epochs"} | epochs


def _timed(session: Session, num_steps: int) -> dict[str, Any]:
    """Throughput, step times, waiting, memory, power."""
    world, nvml = session.world, meters.Nvml(session.world.device)
    measured = measure(session, num_steps, nvml)
    used_j = world.sum(
        torch.tensor([np.nan if measured.energy_j is None else measured.energy_j])
    ).item()
    p10, median, p90 = np.percentile(measured.step_ms_S, [10, 50, 90])
    done, batch = len(measured.step_ms_S), session.config.global_batch
    return {
        "environment": asdict(session.environment),
        "effective": session.effective,
        "notes": session.notes,
        "num_ranks": world.size,
        "global_batch": batch,
        "num_steps": done,
        "samples_per_s": measured.samples_per_s,
        "step_ms": median,
        "step_p10_ms": p10,
        "step_p90_ms": p90,
        "data_wait_fraction": measured.wait_ms / measured.step_ms_S.sum(),
        "host_peak_rss_gib": meters.host_peak_rss_gib(),
        "torch_peak_gib": meters.torch_peak_gib(world.device),
        "device_used_gib": nvml.used_gib(),
        "gpu_utilisation_percent": measured.gpu_utilisation_percent,
        "power_w": measured.power_w,
        "energy_j_per_ksample": None if np.isnan(used_j) else used_j / (done * batch) * 1000,
        "memory_gib_by_owner": world.ledger.gib or None,
        "roofline_fraction": _roofline(
            session, measured.samples_per_s
        ),  # last: it takes 2 GiB of the device
    }


def _roofline(session: Session, samples_per_s: float) -> float | None:
    """One rank's rate of what its GPU's bandwidth and FLOPs allow."""
    world, records = session.world, session.records
    name, precision = session.environment.gpu_name, session.config.step.precision
    shape = (*records.height_width, len(records.classes))
    return roofline_fraction(
        samples_per_s / world.size, name, precision, copy_bandwidth(world.device), shape
    )


def _confusion(session: Session) -> dict[str, Any] | None:
    """What rank 0 reads in the test split, where there is one in memory."""
    test = session.records.splits.get("test")
    readable = test is not None and isinstance(test.image_NHW, np.ndarray)
    return confusion_of(session) if readable and session.world.is_first else None


if __name__ == "__main__":
    main()
