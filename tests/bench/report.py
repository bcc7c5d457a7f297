"""How long `tools/profile report` takes for 50 cells, as a whole command; its page's size."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from engine.host import ROOT
from engine.report import environment
from tests.bench import OUT
from tests.profiles import make_profile
from tools.report.rows import claim, row, write_result


def bench(out: Path, rounds: int) -> None:
    """Measure and write OUT/cpu_report.json."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "profile.json").write_text(json.dumps(make_profile()))
        for _ in range(rounds):
            start = time.perf_counter()
            line = [sys.executable, "-m", "tools.profile", "report", folder]
            subprocess.run(line, cwd=ROOT, check=True, capture_output=True, timeout=120)
            seconds.append(time.perf_counter() - start)
        size_mb = (Path(folder) / "report.html").stat().st_size / 1e6
    rows = [row("whole command", seconds, "s"), row("report.html", [size_mb], "MB")]
    claims = [
        claim("whole command (s)", rows[0].value, 5, at_most=True),
        claim("report.html (MB)", size_mb, 5, at_most=True),
    ]
    facts = environment(num_threads=1, allocator="default", gpu={})
    title = "Report of 50 cells, ladder, learning curves, 94 classes"
    write_result(out / "cpu_report.json", title=title, environment=facts, rows=rows, claims=claims)


@click.command()
@OUT
@click.option("--rounds", default=5, show_default=True)
def main(out: Path, rounds: int) -> None:
    """Benchmark the report."""
    bench(out, rounds)


if __name__ == "__main__":
    main()
