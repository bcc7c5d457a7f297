"""Shared fixtures: a small CSV of drawn shapes, its records, and engine.run in a child process."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.distributed import run as distributed_run

from engine.config_text import read_toml
from engine.data.pack import pack
from engine.data.records import Records, open_records
from engine.host import ROOT, prepare_process
from engine.world import World, has_fast_bf16
from tests.browser import CHROMIUM, Browser
from tools.measure.in_process import InProcess
from tools.measure.matrix import is_matrix
from tools.measure.results import Repetition
from tools.measure.runner import Job, in_child

prepare_process()  # as every command does

CLASSES = ("0", "00", "NA", ",", '"', "a", "é", "~")
NUM_FONTS = 40
FAST_PRECISION = "bf16" if has_fast_bf16(torch.device("cpu")) else "fp32"
"""What this machine makes of --amp on a CPU."""
TIMEOUT_S = 240
"""Of a child."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU here"))


def glyph_rows() -> list[list[str]]:
    """40 fonts x 8 classes: a bright bar whose place tells the class, its strength the font."""
    rng = np.random.default_rng(0)
    rows = []
    for font in range(NUM_FONTS):
        for label, name in enumerate(CLASSES):
            image = rng.integers(0, 40, (28, 28))
            image[3 * label : 3 * label + 4, 2 + font % 5 : 20] = 150 + 2 * font
            rows.append([f"Font{font:02}-Bold[wght]", name, *(f"{v}.0" for v in image.ravel())])
    return [rows[i] for i in rng.permutation(len(rows))]


def write_csv(path: Path, rows: list[list[str]], side: int = 28) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["names", "labels", *range(1, side * side + 1)])
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session")
def small_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("csv") / "small.csv", glyph_rows())


@pytest.fixture(scope="session")
def small_dir(small_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("records") / "small"
    pack(small_csv, out)
    return out


@pytest.fixture(scope="session")
def small(small_dir: Path) -> Records:
    return open_records(small_dir)


TINY_SIDE = 12


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many images of 12 x 12: a bright bar whose row and place tell the class."""
    rng, rows = np.random.default_rng(0), []
    for font in range(NUM_FONTS):
        for label, name in enumerate(CLASSES):
            image = rng.integers(0, 60, (TINY_SIDE, TINY_SIDE))
            image[label + font % 3 : label + font % 3 + 2, label % 2 * 6 :][:, :6] = 200
            rows.append([f"Font{font:02}", name, *map(str, image.ravel())])
    folder = tmp_path_factory.mktemp("tiny")
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    pack(write_csv(folder / "tiny.csv", shuffled, TINY_SIDE), folder / "records")
    return folder / "records"


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> Records:
    return open_records(tiny_dir)


@pytest.fixture
def world() -> World:
    return World(rank=0, size=1, device=torch.device("cpu"), stream=None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums do not depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache folder of the tests' own, shared by them so that the sample is packed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        assert os.environ.get("CI") != "true", "CI must have Chromium: apt-get install chromium"
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with Browser() as browser:
        yield browser


@pytest.fixture
def measured_here(small: Records, world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One start-up for all measurements of a rank alone, one after another, on the small records;
    those of several ranks keep their processes."""
    here, turn = InProcess(small, world, seconds=0.1), threading.Lock()

    def measure(job: Job) -> Repetition:
        if job.ranks > 1:
            return in_child(job)
        with turn:
            return here(job)

    for module in ("tools.measure.runner", "tests.bench.child"):
        monkeypatch.setattr(f"{module}.in_child", measure)
    yield
    here.close()


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def command(cache: Path) -> Command:
    """Run a command line from the repository root; "python" and "torchrun" are this environment's.

    A command of ours runs in this process, as its main does: importing torch costs a child seconds.
    torchrun runs in a fork, and starts its ranks as ever; python -c and what is not ours run in
    children. tests/test_host.py and test_setup.py start the real scripts.
    """

    def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        line = [str(word) for word in words]
        variables = {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", **environment}
        if any(name.endswith("_COMPLETE") for name in environment):
            return child(line, variables)
        if line[:2] == ["python", "-m"] and line[2].startswith(("engine.", "tools.")):
            return in_process(line[2], line[3:], variables)
        if line[0].startswith("tools/"):
            return in_process(line[0].replace("/", "."), line[1:], variables)
        return child(line, variables)

    return run


def child(line: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process of its own."""
    if line[0] == "torchrun":
        return torchrun(line[1:], variables)
    line = [{"python": sys.executable}.get(line[0], line[0]), *line[1:]]
    variables = os.environ | variables
    return subprocess.run(
        line, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def torchrun(words: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """torchrun in a fork of this process, which has imported it."""
    return forked(lambda: distributed_run.main(words), variables)


def forked(
    call: Callable[[], object], variables: dict[str, str], stdin: int | None = None
) -> subprocess.CompletedProcess[str]:
    """A call in a fork of this process, which ends with it as a command's process does.

    Args:
        stdin: a descriptor that becomes its standard input.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        streams = stdin, out.fileno(), errors.fileno()
        process = get_context("fork").Process(target=become, args=(call, variables, streams))
        process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.terminate()  # torchrun ends its ranks
            process.join()
            raise subprocess.TimeoutExpired("fork", TIMEOUT_S)
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess("", process.exitcode, out.read(), errors.read())


def become(
    call: Callable[[], object], variables: dict[str, str], streams: tuple[int | None, int, int]
) -> None:
    """Call it with these variables and streams, in the repository root."""
    for number, stream in enumerate(streams):
        if stream is not None:
            os.dup2(stream, number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    os.environ.update(variables)
    os.chdir(ROOT)
    call()


def in_process(
    module: str, words: list[str], variables: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Call a command's main with one thread, as a child with OMP_NUM_THREADS=1 would run it."""
    main = importlib.import_module(module).main
    folder, threads, on_term = Path.cwd(), torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    try:
        done = CliRunner().invoke(main, words, env=variables, prog_name=module)
    finally:
        os.chdir(folder)
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, on_term)
    errors = done.stderr
    if done.exception and not isinstance(done.exception, SystemExit):
        errors += "".join(traceback.format_exception(done.exception))
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, errors)


def run_configs() -> list[Path]:
    """The files of bench_configs that describe a run."""
    return [
        path
        for path in sorted((ROOT / "bench_configs").glob("*.toml"))
        if not is_matrix(read_toml(path))
    ]


def assert_refused(done: subprocess.CompletedProcess[str], *texts: str) -> None:
    """One line on stderr with each of `texts`, exit code 2, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for text in texts:
        assert text in done.stderr, done.stderr
