"""python3 -m tools.gpu: everything that only a GPU can show, offline, in at most 9 minutes.

Its parts (tools/measure/parts.py) run one after the other, what is wanted most first, each in a
process of its own: one that crashes, hangs or breaks the GPU's context takes nothing with it. OUT
gets the ladder of the step as profile.json (for `tools/profile report OUT`), gpu_training.json,
gpu_kernels.json, gpu_members.json, gpu_feeds.json, tests.txt, verify.txt, what the parts printed
(log.txt), and all tables with what became of each part (summary.md), all written as they come. What
an earlier round left in OUT stays until it is measured again.

Needs no DALI, no CSV and no git: --npz trains straight from an archive of names (F,) and images
(F, K, H, W).
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path

import click
import numpy as np

from engine.data.records import Records, Split, open_records
from engine.data.sample import ensure_sample
from engine.data.split import SplitOptions, draw_splits
from engine.durable import take_folder, write_file, writing
from engine.errors import UserError, exit_on_user_error, sentence
from engine.host import prepare_process
from engine.paths import PATH
from engine.ui import guard_outputs
from engine.world import check_ranks
from tools.measure.parts import PARTS, Part, Round, part_of
from tools.measure.results import RATE, Profile, read_profile
from tools.report.figures import heading, show
from tools.report.rows import markdown_table, read_result, to_markdown
from tools.report.tables import cells_frame

ROUND_S = 540.0
LEAST_S = 5.0
"""A part that has less time left is not started."""
OUT_OF_TIME = "not started: out of time"
FIRST_CHARACTER = 33
"""images[:, 0] of the archive is '!'."""
RESULTS = ("gpu_training.json", "gpu_kernels.json", "gpu_members.json", "gpu_feeds.json")
COLUMNS = ("name", "num", RATE, f"{RATE}_low95", f"{RATE}_high95", "steps_per_launch", "power_w",
           "energy_j_per_ksample", "roofline_fraction")  # fmt: skip
_PROCESSES = multiprocessing.get_context("fork")
"""A part starts with the records and all modules loaded; this process never touches the GPU."""


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    name: str
    took_s: float
    failures: list[str]

    @property
    def text(self) -> str:
        return f"FAILED: {'; '.join(self.failures)}" if self.failures else "ok"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--npz", type=PATH, help="typefaces.npz.  [default: the packaged sample]")
@click.option("--out", type=PATH, default=Path("runs/gpu"), show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option(
    "--quick", is_flag=True, help="Small batches, few steps, one repetition: proves the script."
)
@click.option(
    "--part",
    "names",
    multiple=True,
    type=click.Choice([part.name for part in PARTS]),
    help="Only this part; give it again for more.  [default: all]",
)
def main(npz: Path | None, out: Path, device: str, quick: bool, names: tuple[str, ...]) -> None:
    """Run the parts, write OUT. Exit code 1 if a part failed or found no time."""
    end_s = time.monotonic() + ROUND_S
    with exit_on_user_error(), tempfile.TemporaryDirectory() as kept:
        prepare_process()
        records = records_from_npz(npz) if npz else open_records(ensure_sample())
        with take_folder(out):
            shared = Round(records=records, device=device, out=out, kept=Path(kept), quick=quick)
            _start(shared)
            chosen = [part for part in PARTS if not names or part.name in names]
            failed = _run_all(shared, chosen, end_s)
    raise SystemExit(1 if failed else 0)


def _start(shared: Round) -> None:
    """Check the device, and take over what an earlier round measured.

    Raises:
        UserError: there is no such device, or OUT's profile.json cannot be read.
    """
    if (shared.out / "profile.json").exists():
        shared.run().keep(read_profile(shared.out))
    check = Part("device", lambda shared: _checked(shared.device), 60)
    if failures := _run(check, shared, 60).failures:
        raise UserError(failures[0])
    with writing(shared.out):
        (shared.out / "log.txt").unlink(missing_ok=True)


def _checked(device: str) -> list[str]:
    try:
        check_ranks(device)
    except UserError as error:
        return [str(error)]
    return []


def _run_all(shared: Round, parts: list[Part], end_s: float) -> bool:
    """Run the parts while there is time; whether one failed. The summary is written after each."""
    outcomes: list[Outcome] = []
    for part in parts:
        left_s = end_s - time.monotonic()
        outcome = Outcome(part.name, 0.0, [OUT_OF_TIME])
        if left_s >= LEAST_S:
            outcome = _run(part, shared, min(part.limit_s, left_s))
        outcomes.append(outcome)
        click.echo(f"{part.name}: {outcome.text}, {outcome.took_s:.0f} s")
        _summarise(shared, outcomes)
    return any(outcome.failures for outcome in outcomes)


def _run(part: Part, shared: Round, limit_s: float) -> Outcome:
    """Run a part in a process of its own, with all that it starts; end it after so many seconds."""
    start_s = time.monotonic()
    child = _PROCESSES.Process(target=_work, args=(part, shared))
    child.start()
    try:
        child.join(limit_s)
        is_late = child.is_alive()
    finally:
        _end(child)
    took_s = time.monotonic() - start_s
    if is_late:
        return Outcome(part.name, took_s, [f"ended after {limit_s:.0f} s"])
    return Outcome(part.name, took_s, _failures(shared, part, child.exitcode or 0))


def _work(part: Part, shared: Round) -> None:
    """What the process of a part does; it says what failed in a file."""
    os.setsid()
    with open(shared.out / "log.txt", "a", encoding="utf-8", buffering=1) as log:
        sys.stdout = sys.stderr = log
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        print(f"== {part.name}")
        try:
            failures = part.work(shared)
        except BaseException as error:  # whatever breaks a part, the reason is wanted
            traceback.print_exc()
            failures = [sentence(error)]
        (shared.kept / f"{part.name}.txt").write_text("\n".join(failures), encoding="utf-8")
    os._exit(0)  # no clean-up: a broken GPU's would crash, or hang


def _end(child: ForkProcess) -> None:
    """End a part's process, and all that it started and left behind."""
    child.kill()
    with suppress(ProcessLookupError):
        os.killpg(child.pid or 0, signal.SIGKILL)
    child.join()


def _failures(shared: Round, part: Part, code: int) -> list[str]:
    if code < 0:
        return [f"ended by {signal.Signals(-code).name}"]
    said = shared.kept / f"{part.name}.txt"
    if code or not said.exists():
        return [f"exit code {code}, see log.txt"]
    return said.read_text(encoding="utf-8").splitlines()


def _summarise(shared: Round, outcomes: list[Outcome]) -> None:
    """Write summary.md, and in profile.json why cells are missing."""
    reasons = {outcome.name: outcome.text for outcome in outcomes}
    lacking = {cell.id: reasons.get(part_of(cell), "not asked for") for cell in shared.cells}
    run = shared.run(lacking=lacking)
    run.write()
    rows = [(outcome.name, f"{outcome.took_s:.0f}", outcome.text) for outcome in outcomes]
    tables = [markdown_table("| part | seconds | |", "lrl", rows), ladder_table(run.profile())]
    texts = ["\n".join(table) + "\n" for table in tables]
    files = [shared.out / name for name in RESULTS]
    texts += [to_markdown(read_result(file), file.name) for file in files if file.exists()]
    with writing(shared.out):
        write_file(shared.out / "summary.md", "\n".join(texts).encode())


def ladder_table(profile: Profile) -> list[str]:
    """Lines of the ladder's table: each measured cell, with what was not as asked for."""
    frame = cells_frame(profile)
    head = " | ".join([*map(heading, COLUMNS), "notes"])
    rows = []
    for number, cell in enumerate(profile.cells):
        if cell.good:
            figures = [show(column, frame[column][number]) for column in COLUMNS]
            notes = dict.fromkeys(note for r in cell.good for note in r.notes)
            rows.append([*figures, "; ".join(notes)])
    return [f"## {profile.title}", "", *markdown_table(f"| {head} |", "lrrrrrrrrl", rows)]


def records_from_npz(path: Path) -> Records:
    """A random split of names (F,) and images (F, K, H, W) uint8, characters '!' and up.

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
    rows = draw_splits(label_N, font_N, classes, fonts, SplitOptions())
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
