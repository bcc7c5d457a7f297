"""fp8 against bf16: the default recipe trained with both from the same seeds, pair by pair.

A CPU emulates the products of fp8; this shows their accuracy, and not their speed.
"""

from pathlib import Path

import click

from engine.data.sample import ensure_sample
from tests.bench import OUT
from tests.bench.precision import compare

MOST_POINTS = 1.0
"""Some 18 of the sample's test glyphs."""


def bench(out: Path, data: Path | None, pairs: int, extra: tuple[str, ...] = ()) -> None:
    """Measure and write OUT/cpu_fp8.json; `extra` flags shorten a smoke run.

    Args:
        data: records; None: the packaged sample.
    """
    data = data or ensure_sample()
    compare(out / "cpu_fp8.json", data, ("bf16", "fp8"), pairs, MOST_POINTS, extra)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Records.  [default: the sample]")
@OUT
@click.option("--pairs", default=5, show_default=True, type=click.IntRange(2, 10))
def main(data: Path | None, out: Path, pairs: int) -> None:
    """Benchmark the accuracy of fp8."""
    bench(out, data, pairs)


if __name__ == "__main__":
    main()
