"""Benchmarks: python -m tests.bench.all, or step, ranks, ...; both sides of each in one run."""

from pathlib import Path

import click

OUT = click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/bench"), show_default=True
)
"""Where every benchmark leaves its result file."""
