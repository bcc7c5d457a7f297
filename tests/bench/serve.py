"""What a page costs the training that it shows: whole commands in turn, with and without one.

Each round trains the recipe fast on the sample three times: without a page, with one that nobody
looks at, and with one that is open in Chromium on the same machine, which draws whatever is new.
The browser runs all the time; without a page it shows an empty one. Counted is the time of training
and evaluation by the report, within which the log is read, confusions are counted and lines are
written; start-up is not. Two busy cores differ by more from one run to the next than a page takes,
so the browser's CPU time is counted, too: what it takes beyond that of an empty page.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from engine.data.sample import ensure_sample
from engine.errors import UserError
from engine.host import ROOT
from engine.report import RunReport, read_report
from tests.bench import OUT
from tests.browser import CHROMIUM, Browser
from tools.report.rows import claim, row, write_result

PLAIN, SERVED, WATCHED = "without a page", "with a page", "with a page open in Chromium"
ARMS = (PLAIN, SERVED, WATCHED)
EMPTY = "about:blank"
WIDTH = 1200


def train(folder: Path, arm: str, epochs: int, browser: Browser) -> tuple[RunReport, float]:
    """Train in FOLDER, while the browser shows what the arm has it show; its CPU seconds."""
    browser.open(EMPTY, WIDTH, dark=False)
    before_s = browser.cpu_s()
    words = [sys.executable, "-m", "engine.run", "--device", "cpu", "--epochs", str(epochs)]
    words += ["--out", str(folder), *([] if arm == PLAIN else ["--serve"])]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if arm == WATCHED and line.startswith("page: "):
                browser.open(line.split()[1], WIDTH, dark=False)
            browser.value("1")  # takes in what the browser has to say
    assert process.returncode == 0
    if arm == WATCHED:
        assert browser.value("document.querySelectorAll('svg path').length > 3"), "nothing drawn"
    return read_report(folder), browser.cpu_s() - before_s


def bench(out: Path, rounds: int, epochs: int = 40) -> None:
    """Measure and write OUT/cpu_serve.json."""
    if not CHROMIUM:
        raise UserError("there is no Chromium here: apt-get install chromium")
    ensure_sample()
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    drawing_s: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with Browser() as browser:
        for number in range(rounds):
            for arm in ARMS[:: -1 if number % 2 else 1]:
                with tempfile.TemporaryDirectory() as folder:
                    report, cpu_s = train(Path(folder) / "run", arm, epochs, browser)
                seconds[arm].append(report.train_s + report.eval_s)
                drawing_s[arm].append(cpu_s)
                time.sleep(0.5)
    costs = {
        arm: [
            100 * (with_s / plain_s - 1)
            for with_s, plain_s in zip(all_s, seconds[PLAIN], strict=True)
        ]
        for arm, all_s in seconds.items()
        if arm != PLAIN
    }
    rows = [row(f"{epochs} epochs {arm}", all_s, "s") for arm, all_s in seconds.items()]
    rows += [row(f"what it costs {arm}, round by round", cost, "%") for arm, cost in costs.items()]
    claims = [
        claim(f"{arm} costs (%)", found.value, 1.0, at_most=True)
        for arm, found in zip(costs, rows[len(ARMS) :], strict=True)
    ]
    num_cores = len(os.sched_getaffinity(0))
    drawn = [
        100 * (page_s - empty_s) / (num_cores * run_s)
        for page_s, empty_s, run_s in zip(
            drawing_s[WATCHED], drawing_s[PLAIN], seconds[WATCHED], strict=True
        )
    ]
    rows.append(row("CPU time of Chromium beyond an empty page's, of all cores", drawn, "%"))
    claims.append(claim("Chromium's CPU time (%)", rows[-1].value, 1.0, at_most=True))
    write_result(
        out / "cpu_serve.json",
        title=f"A page of fast, {epochs} epochs on {report.num_train_samples:,} images, two cores",
        environment=report.environment,
        rows=rows,
        claims=claims,
    )


@click.command()
@OUT
@click.option("--rounds", default=9, show_default=True)
def main(out: Path, rounds: int) -> None:
    """Benchmark the page of a run."""
    bench(out, rounds)


if __name__ == "__main__":
    main()
