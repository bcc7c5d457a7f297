"""What measuring costs: steps with the marks and readings of steps.py, and bare ones, in turn.

Both sides are of one session in one process, so that weights and heap are the same.
"""

import time
from itertools import islice
from pathlib import Path

import click

from engine.config import RunConfig, override
from engine.data.records import open_records
from engine.data.sample import ensure_sample
from engine.meters import Nvml
from engine.report import Environment
from engine.train.session import Session, open_session
from engine.world import start_world
from tests.bench import OUT
from tools.measure.steps import NUM_UNTIMED, endless, measure
from tools.report.rows import claim, row, write_result

BATCH = 512
DEFAULT = {"step.precision": "bf16", "step.cuda_graphs": True}


def bench(out: Path, rounds: int, num_steps: int) -> None:
    """Measure and write OUT/cpu_measuring.json."""
    sides, environment = _sides(rounds, num_steps)
    costs = [100 * (b / m - 1) for m, b in zip(sides["measured"], sides["bare"], strict=True)]
    rows = [
        row("steps with marks and readings", sides["measured"], "samples/s"),
        row("the same steps without", sides["bare"], "samples/s"),
        row("throughput that measuring costs, round by round", costs, "%"),
    ]
    claims = [claim("throughput that measuring costs (%)", rows[2].value, 2.0, at_most=True)]
    title = f"The cost of the default measurements, batch {BATCH}"
    write_result(
        out / "cpu_measuring.json", title=title, environment=environment, rows=rows, claims=claims
    )


def _sides(rounds: int, num_steps: int) -> tuple[dict[str, list[float]], Environment]:
    """samples/s of each round, after one that does not count."""
    config = override(RunConfig(), DEFAULT | {"global_batch": BATCH}, "measuring")
    with start_world() as world, world.on_stream():
        session = open_session(config, open_records(ensure_sample()), world)
        nvml = Nvml(world.device)
        works = {
            "measured": lambda: measure(session, num_steps, nvml).samples_per_s,
            "bare": lambda: _bare(session, num_steps),
        }
        found: dict[str, list[float]] = {name: [] for name in works}
        for number in range(rounds + 1):
            for name in sorted(works, reverse=bool(number % 2)):
                found[name].append(works[name]())
        session.close()
    return {name: rates[1:] for name, rates in found.items()}, session.environment


def _bare(session: Session, num_steps: int) -> float:
    """samples/s with nothing between the launches."""
    launches, done = endless(session), 0
    for _ in islice(launches, NUM_UNTIMED):
        pass
    session.world.synchronize()
    start = time.perf_counter()
    while done < num_steps:
        done += next(launches).num_steps
    session.world.synchronize()
    return done * session.config.global_batch / (time.perf_counter() - start)


@click.command()
@OUT
@click.option("--rounds", default=9, show_default=True)
@click.option("--steps", default=60, show_default=True)
def main(out: Path, rounds: int, steps: int) -> None:
    """Benchmark measuring."""
    bench(out, rounds, steps)


if __name__ == "__main__":
    main()
