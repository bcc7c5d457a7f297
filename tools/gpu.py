"""python3 -m tools.gpu: everything that only a GPU can show, as one offline command, planned for 9 minutes.

Its parts leave a folder of evidence: the tests marked gpu (tests.txt), tools/verify (verify.txt), the ladder of the
step (gpu_ladder.json), each Triton kernel against PyTorch's operations (gpu_kernels.json), training to the study's
accuracy and to the end (gpu_training.json), what the feeds carry, DALI last (gpu_feeds.json), and all tables
(summary.md). Needs no DALI, no CSV and no git: --npz trains straight from an
archive of names (F,) and images (F, K, H, W). A part that fails makes the exit code 1; the others still run.
"""

import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from engine import meters
from engine.config import RunConfig, override
from engine.data.records import Records, Split, open_records
from engine.data.sample import ensure_sample
from engine.data.split import draw_splits
from engine.durable import take_folder
from engine.errors import UserError, exit_on_user_error
from engine.feeds.batch import Feed
from engine.host import ROOT, prepare_process
from engine.paths import PATH
from engine.report import Environment, RunReport, environment
from engine.train.session import open_session
from engine.train.trainer import fit
from engine.ui import guard_outputs
from engine.world import World, start_world
from tools.measure.ladder import Cell, climb, joules, make_cells, rows_of
from tools.report.rows import row, to_markdown, write_result

TESTS_S, VERIFY_S, LADDER_S = 90, 60, 300
"""Wall time each part should take at most; the first two are ended after three times that."""
STUDY_ACCURACY = 0.8765
"""What the study's own recipe reaches on typefaces.npz after 12 epochs (random split, two CPU cores)."""
FIRST_CHARACTER = 33
"""images[:, 0] of the archive is '!'."""
FAST = {
    "step.precision": "bf16",
    "step.cuda_graphs": True,
    "step.steps_per_launch": 16,
    "data.feed": "resident",
}
LARGE = {"global_batch": 8192, "optim.learning_rate": 0.04, "epochs": 12}
"""The recipe at a global batch of 8192: of 0.02, 0.04 and 0.08 the best on two cores, 88.12 % against 88.7 % at 512."""


@dataclass(frozen=True)
class Round:
    """What the parts share."""

    records: Records
    world: World
    out: Path
    quick: bool
    facts: Environment

    def write(self, name: str, title: str, rows: list[dict[str, Any]]) -> None:
        title = f"{title} on one {self.facts.gpu_name or 'CPU'}" + " (dry run)" * self.quick
        path = self.out / f"{name}.json"
        result = write_result(path, title=title, environment=self.facts, rows=rows, claims=[])
        table = to_markdown(result, path.name)
        click.echo(table)
        with open(self.out / "summary.md", "a", encoding="utf-8") as file:
            file.write(table + "\n")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--npz", type=PATH, help="typefaces.npz.  [default: the packaged sample]")
@click.option("--out", type=PATH, default=Path("runs/gpu"), show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option(
    "--quick", is_flag=True, help="Small batches, few steps, one repetition: proves the script."
)
def main(npz: Path | None, out: Path, device: str, quick: bool) -> None:
    """Run the GPU tests, verify, the ladder, trainings and feeds; write OUT. Exit 1 if a part failed."""
    failures: list[str] = []

    def part(name: str, work: Callable[[], list[str] | None]) -> None:
        start = time.perf_counter()
        try:
            found = work() or []
        except Exception:  # whatever breaks one part, the evidence of the others is wanted
            found = [traceback.format_exc()]
        failures.extend(f"{name}: {text}" for text in found)
        click.echo(f"{name}: {'FAILED' if found else 'ok'}, {time.perf_counter() - start:.0f} s\n")

    with exit_on_user_error(), ExitStack() as stack:
        prepare_process()
        records = records_from_npz(npz) if npz else None
        stack.enter_context(take_folder(out))
        (out / "summary.md").unlink(missing_ok=True)
        tests = ("-q", "-m", "gpu", "-rs", "tests/test_gpu.py")
        part("tests", lambda: _command(out / "tests.txt", TESTS_S, "pytest", *tests))
        few = ("doctor",) if quick else ()
        part(
            "verify",
            lambda: _command(
                out / "verify.txt", VERIFY_S, "tools.verify", *few, f"--device={device}"
            ),
        )
        with start_world(device) as world, world.on_stream():
            threads, gpu = torch.get_num_threads(), meters.gpu_facts(world.device)
            facts = environment(num_threads=threads, allocator=world.allocator, gpu=gpu)
            shared = Round(records or open_records(ensure_sample()), world, out, quick, facts)
            part("ladder", lambda: _ladder(shared))
            part("kernels", lambda: _kernels(shared))
            part("training", lambda: _training(shared))
            part("feeds", lambda: _feeds(shared))
        (out / "failures.txt").write_text(
            "\n".join(failures) + "\n" * bool(failures), encoding="utf-8"
        )
        for failure in failures:
            click.echo(failure, err=True)
    raise SystemExit(1 if failures else 0)


def _command(log: Path, limit_s: float, module: str, *words: str) -> list[str]:
    """Run a module in a process of its own; what it prints goes to `log`."""
    try:
        command = [sys.executable, "-m", module, *words]
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=3 * limit_s,
        )
    except subprocess.TimeoutExpired:
        return [f"did not end within {3 * limit_s:.0f} s"]
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    click.echo(done.stdout)
    return [] if done.returncode == 0 else [f"exit code {done.returncode}, see {log.name}"]


def _ladder(shared: Round) -> list[str]:
    cells = make_cells(64 if shared.quick else 8192, compiled=not shared.quick)
    how: dict[str, Any] = (
        {"seconds": 0.02, "repetitions": 1} if shared.quick else {"seconds": 0.3, "repetitions": 5}
    )
    failures = climb(cells, shared.records, shared.world, budget_s=0.8 * LADDER_S, **how)
    rows = rows_of(cells)
    for cell, session in [(cell, cell.session) for cell in cells if cell.session][-1:]:
        if (used_j := joules(session, 0.1 if shared.quick else 3.0)) is not None:
            rows.append(row(f"{cell.name}: energy for a thousand samples", [used_j], "J"))
    for cell in cells:
        cell.close()
    shared.write("gpu_ladder", "Ladder of the step", rows)
    return failures


def _kernels(shared: Round) -> None:
    from tools.measure.kernels import kernel_rows

    batch, repetitions = (64, 1) if shared.quick else (8192, 20)
    rows = kernel_rows(shared.world, batch, repetitions, compiled=not shared.quick)
    shared.write("gpu_kernels", f"Kernels at batch {batch}", rows)


def _training(shared: Round) -> None:
    """The default recipe until the study's accuracy; twelve epochs of it, and of the one for a batch of 8192."""
    report = _train(shared, {"target_accuracy": STUDY_ACCURACY})
    goal = f"time to {100 * STUDY_ACCURACY:.2f} % validation accuracy"
    reached_s = report.time_to_target_s
    rows = [
        row(goal, [reached_s], "s")
        if reached_s
        else row(f"{goal}: not reached", [report.train_s], "s")
    ]
    accuracy = {}
    for name, recipe in (("512", {"epochs": 12}), ("8192", LARGE)):
        report = _train(shared, recipe)
        accuracy[name] = 100 * (report.test_accuracy_fraction or 0.0)
        title = f"batch {name}, {report.num_epochs} epochs"
        rows.append(row(f"{title}: training time", [report.train_s], "s"))
        rows.append(row(f"{title}: samples/s", [report.samples_per_s], "samples/s"))
        rows.append(row(f"{title}: test accuracy", [accuracy[name]], "%"))
    rows.append(
        row(
            "test accuracy at batch 8192 less at 512",
            [accuracy["8192"] - accuracy["512"]],
            "points",
        )
    )
    shared.write("gpu_training", f"Training on {report.num_train_samples:,} images", rows)


def _train(shared: Round, settings: dict[str, Any]) -> RunReport:
    if shared.quick:
        settings = settings | {"epochs": 1, "global_batch": 512}
    config = override(RunConfig(), FAST | settings, "tools.gpu")
    with tempfile.TemporaryDirectory() as folder:
        return fit(config, shared.records, shared.world, Path(folder), resume=False, say=click.echo)


def _feeds(shared: Round) -> list[str]:
    """The feeds without a step, and the step fed by DALI, last: its threads would disturb a capture."""
    rows, failures = [], []
    batch = 64 if shared.quick else 2048
    for feed in ("resident", "loader_batched", *["dali"] * bool(shared.facts.dali)):
        settings = {"step.precision": "bf16", "data.feed": feed, "global_batch": batch}
        with closing(
            open_session(override(RunConfig(), settings, feed), shared.records, shared.world)
        ) as session:
            rates = [_carried(session.feed, shared.world.device) for _ in range(3)]
        rows.append(row(f"{feed} alone, batch {batch}", rates, "samples/s"))
    if shared.facts.dali:
        settings = FAST | {"data.feed": "dali", "global_batch": batch}
        cell = Cell("fed by dali", override(RunConfig(), settings, "dali"))
        failures = climb(
            [cell], shared.records, shared.world, seconds=0.3, repetitions=3, budget_s=30
        )
        rows += [row(cell.name, cell.rates, "samples/s")] if cell.rates else []
        cell.close()
    shared.write("gpu_feeds", "Feeds", rows)
    return failures


def _carried(feed: Feed, device: torch.device) -> float:
    """samples/s of an epoch's batches, ready on the device."""
    watch = meters.Stopwatch(device)
    watch.start()
    seen = sum(len(batch.id_B) for batch in feed.batches(0))
    return seen / watch.stop()


def records_from_npz(path: Path) -> Records:
    """A random split of names (F,) and images (F, K, H, W) uint8, characters '!' and up; nothing is written.

    Raises:
        UserError: not such an archive.
    """
    try:
        with np.load(path) as archive:
            names, image_FKHW = archive["names"], archive["images"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: is no archive of names and images ({error}); give typefaces.npz"
        ) from None
    num_fonts, num_classes, height, width = image_FKHW.shape
    classes, fonts = (
        tuple(chr(FIRST_CHARACTER + k) for k in range(num_classes)),
        tuple(map(str, names)),
    )
    label_N = np.tile(np.arange(num_classes, dtype=np.uint8), num_fonts)
    font_N = np.repeat(np.arange(num_fonts, dtype=np.int32), num_classes)
    everything = Split(
        image_NHW=image_FKHW.reshape(-1, height, width), label_N=label_N, font_N=font_N
    )
    rows = draw_splits(label_N, font_N, classes, fonts, mode="random", balance=False, seed=42)
    splits = {name: everything.take(row_M) for name, row_M in rows.items()}
    train_NHW = splits["train"].image_NHW
    return Records(
        splits=splits,
        classes=classes,
        fonts=fonts,
        fingerprint=f"npz of {num_fonts} typefaces",
        pixel_mean=float(train_NHW.mean()),
        pixel_std=float(train_NHW.std()),
        path=str(path),
    )


if __name__ == "__main__":
    guard_outputs()
    main()
