"""python -m tests.reliability: run the rows, print their table; exit code 1 if anything failed."""

import sys
import time
from dataclasses import asdict
from pathlib import Path

import click

from engine.report import environment, write_json
from tests.reliability.common import SEED
from tests.reliability.rows import ROWS, line, run_rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--full", "level", flag_value="full", help="The counts of a release; else those of a commit."
)
@click.option(
    "--tiny", "level", flag_value="tiny", help="A few tries of each: does the suite itself work?"
)
@click.option("--only", default="", help="Rows to run, such as R3,R4.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write the table there.")
def main(level: str | None, only: str, report: Path | None) -> None:
    """Measure the reliability figures of packing, of record files and of runs."""
    chosen = {name.strip() for name in only.split(",") if name.strip()}
    if unknown := chosen - {row[0] for row in ROWS}:
        raise click.BadParameter(
            f"there is no row {', '.join(sorted(unknown))}", param_hint="--only"
        )
    print(f"seed {SEED}, counts of {level or 'ci'}; as they end:")
    start = time.perf_counter()
    results = run_rows(level or "ci", chosen)
    print(f"\n{'row':<4} {'what':<56} {'tried':>8} {'failed':>7} {'seconds':>8}")
    for result in results:
        print(line(result), *(f"     {note}" for note in result["notes"]), sep="\n")
    failed = sum(result["failed"] for result in results)
    tried = sum(result["tried"] for result in results)
    print(f"{failed} failed of {tried:,}, {time.perf_counter() - start:.0f} s in all")
    if report:
        facts = environment(num_threads=1, allocator="none", gpu={})
        write_json({"environment": asdict(facts), "seed": SEED, "rows": results}, report)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
