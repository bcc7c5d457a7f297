"""make bench: every benchmark; those of whole trainings only where --data names the records."""

from pathlib import Path

import click

from tests.bench import (
    OUT,
    canonical,
    checkpoints,
    feeds,
    fp8,
    fsdp,
    fullsize,
    layers,
    loader,
    measuring,
    noise,
    pack,
    plan,
    precision,
    predict,
    ranks,
    report,
    serve,
    sources,
    startup,
    step,
    sweep,
    warp,
)


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path), help="Records of all typefaces for whole trainings."
)
@OUT
def main(data: Path | None, out: Path) -> None:
    """Run the benchmarks and print the files they left."""
    pack.bench(out, csv=None, rounds=7)
    sources.bench(out, rounds=5)
    predict.bench(out, rounds=5)
    feeds.bench(out, seconds=8.0)
    loader.bench(out, rounds=5, seconds=4.0)
    warp.bench(out, rounds=3, seconds=2.0)
    step.bench(out, rounds=7, num_steps=60)
    layers.bench(out, rounds=5, num_steps=60)
    ranks.bench(out, pairs=5, num_steps=100)
    canonical.bench(out, rounds=5, num_steps=60)
    fsdp.bench(out, rounds=3, num_steps=24)
    plan.bench(out, rounds=3, num_steps=24)
    startup.bench(out, rounds=9)
    measuring.bench(out, rounds=9, num_steps=60)
    checkpoints.bench(out, rounds=15)
    sweep.bench(out, rounds=3)
    serve.bench(out, rounds=9)
    report.bench(out, rounds=5)
    fp8.bench(out, None, pairs=5)
    if data:
        for name in fullsize.GROUPS:
            fullsize.bench(out, fullsize.Plan(data, name, seeds=5))
        precision.bench(out, data, pairs=5)
        noise.bench(out, noise.Sweep(data, target=0.84, seeds=3))
    else:
        click.echo("whole trainings: skipped; name its records with BENCH_ARGS='--data DIR'")
    click.echo(f"written: {', '.join(map(str, sorted(out.glob('*.json'))))}")


if __name__ == "__main__":
    main()
