"""The fast step against eager fp32 NCHW at batch 512, interleaved in one process with the same allocator setting."""

from pathlib import Path

import click

from engine.config import RunConfig, load_toml, override
from engine.records import open_records
from engine.report import ROOT
from engine.sample import ensure_sample
from engine.trainer import open_session
from engine.world import start_world
from tools.bench.measure import measure
from tools.bench.results import claim, row, write_result

SIDES = ("rung_eager_fp32", "rung_bf16")
BATCH = 512


def bench(out: Path, rounds: int, num_steps: int) -> None:
    """Measure and write OUT/cpu_step.json."""
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    with start_world("cpu") as world:
        records = open_records(ensure_sample(world))
        sessions = {}
        for name in SIDES:
            config = load_toml(RunConfig(), ROOT / "bench_configs" / f"{name}.toml")
            sessions[name] = open_session(override(config, {"global_batch": BATCH}, name), records, world)
        for _ in range(rounds):
            for name, session in sessions.items():
                rates[name].append(measure(session, num_steps).samples_per_s)
        environment = sessions[SIDES[0]].environment
    eager, fast = (rates[name] for name in SIDES)
    ratios = [b / a for a, b in zip(eager, fast, strict=True)]
    rows = [
        row("eager fp32 NCHW, ReLU before pool, Adam", eager, "samples/s"),
        row("bf16 channels-last, ReLU after pool, fused AdamW", fast, "samples/s"),
        row("ratio, round by round", ratios, "x"),
    ]
    claims = [
        claim("fast step over eager fp32 NCHW (x)", rows[2]["value"], 2.4),
        claim("fast step (samples/s)", rows[1]["value"], 12_000),
    ]
    title = f"Training step at batch {BATCH} on two cores, resident feed"
    write_result(out / "cpu_step.json", title=title, environment=environment, rows=rows, claims=claims)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench"), show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--steps", default=30, show_default=True)
def main(out: Path, rounds: int, steps: int) -> None:
    """Benchmark the step."""
    bench(out, rounds, steps)


if __name__ == "__main__":
    main()
