"""The commands, each run once for real."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from engine.config_text import read_toml
from engine.data.records import Records
from engine.errors import first_cause, sentence
from engine.report import environment
from engine.typed import typed
from engine.world import World
from kernels import NAMES
from tests.conftest import FAST_PRECISION, Command, assert_refused, run_configs
from tools import gpu
from tools.measure import feeds as feeds_module
from tools.measure import parts
from tools.measure.feeds import FEEDS
from tools.measure.in_process import InProcess
from tools.measure.kernels import Case, measure_case, setting
from tools.measure.matrix import read_cells
from tools.measure.parts import LADDER
from tools.measure.results import read_profile
from tools.report.rows import Result, claim, read_result, row, to_markdown
from tools.results import TARGET, Expected, render


def test_profile_bare_profiles_the_default(command: Command, tmp_path: Path) -> None:
    done = command(
        "tools/profile",
        "run",
        "--steps",
        4,
        "--batch-size",
        64,
        "--out",
        tmp_path,
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads((tmp_path / "profile.json").read_text())["cells"]
    (line,) = cell["repetitions"]
    assert (
        cell["name"] == "default"
        and line["effective"]["precision"] == FAST_PRECISION
        and line["global_batch"] == 64
    )
    assert line["step_p10_ms"] <= line["step_ms"] <= line["step_p90_ms"] and line["num_steps"] == 4
    assert line["samples_per_s"] > 0 and line["environment"]["torch"] and line["confusion"] is None
    assert list(pd.read_csv(tmp_path / "profile.csv")["name"]) == ["default"]
    assert (
        "samples/s" in done.stdout
        and "note: CUDA graphs are not used: there is no GPU" in done.stdout
    )


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_profile_takes_every_bench_config(command: Command, tmp_path: Path) -> None:
    configs = run_configs()
    done = command(
        "python",
        "-m",
        "tools.profile",
        "run",
        *configs,
        "--steps",
        2,
        "--batch-size",
        64,
        "--out",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "profile.json").read_text())["cells"]
    assert [cell["name"] for cell in cells] == [path.stem for path in configs]
    assert all(
        cell["axes"]["batch"] == 64 and not cell["repetitions"][0]["failed"] for cell in cells
    )


def test_the_gpu_round_runs_dry(command: Command, tmp_path: Path) -> None:
    """Two of its parts for real; the others stay as an earlier round left them."""
    words = ("python", "-m", "tools.gpu", "--device", "cpu", "--quick", "--out", tmp_path)
    done = command(*words, "--part", "gather_warp", "--part", "kernels")
    assert done.returncode == 0, done.stderr + done.stdout
    profile = read_profile(tmp_path)
    measured = {cell.name: cell for cell in profile.cells if cell.good}
    assert list(measured) == ["gather_warp alone"]
    (line,) = measured["gather_warp alone"].repetitions
    assert line.steps_per_launch == 2 and line.rate > 0
    others = {cell.not_measured for cell in profile.cells if not cell.good}
    assert others == {"not asked for"}
    kernels = {row.name for row in read_result(tmp_path / "gpu_kernels.json").rows}
    for it in typed(list[Expected], read_toml(LADDER)["expected"], ""):
        if it.file.endswith("gpu_kernels.json"):  # the bandwidth is a GPU's
            assert it.row.replace("part of the copy bandwidth", "Triton") in kernels
    summary = (tmp_path / "summary.md").read_text()
    assert "| gather_warp alone | 1 |" in summary and "| kernels |" in summary
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.slow
def test_the_members_part_of_the_gpu_round_runs_dry(
    command: Command, tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ensure_sample", lambda: small_dir)
    words = ("python", "-m", "tools.gpu", "--device", "cpu", "--quick", "--out", tmp_path)
    done = command(*words, "--part", "members")
    assert done.returncode == 0, done.stderr + done.stdout
    rows = read_result(tmp_path / "gpu_members.json").rows
    assert [row.unit for row in rows] == ["samples/s", "samples/s", "x"]
    assert rows[2].name == "2 together over one" and all(row.value > 0 for row in rows)


def test_each_cell_of_the_ladder_is_in_one_part_and_the_wanted_ones_in_the_first() -> None:
    cells = read_cells([LADDER])[1]
    names = [part.name for part in parts.PARTS]
    assert names[:2] == ["first", "training"] and len(set(names)) == len(names)
    found = {cell.name: parts.part_of(cell) for cell in cells}
    assert set(found.values()) <= set(names) and len(found) == len(cells)
    first = [name for name, part in found.items() if part == "first"]
    assert len(first) == 6 and all(name.endswith((" 64", " 2048")) for name in first)
    alone = {part for name, part in found.items() if name.endswith("alone")}
    assert set(NAMES) - {"conv2_pool_relu"} <= alone
    assert "conv2_pool_relu" in found.values()
    assert all("compile" in name for name, part in found.items() if part == "compile")


NAN = {"optim.name": "adamw", "optim.learning_rate": 1000.0, "optim.weight_decay": 1.0}
"""Each step makes the parameters a thousand times as large."""


def round_of(tmp_path: Path, small: Records) -> parts.Round:
    """A round on the small records, its folders made."""
    (tmp_path / "out").mkdir()
    (tmp_path / "kept").mkdir()
    out, kept = tmp_path / "out", tmp_path / "kept"
    return parts.Round(records=small, device="cpu", out=out, kept=kept, quick=True)


def is_running(pid: int) -> bool:
    """Whether a process lives on for seconds after it was killed."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.01)
    return True


def test_what_breaks_a_part_leaves_the_others_and_their_figures(
    tmp_path: Path, small: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts that raise, crash, hang with a child of their own, and one that has no time left."""
    shared = round_of(tmp_path, small)

    def good(shared: parts.Round) -> list[str]:
        facts = environment(num_threads=1, allocator="default", gpu={})
        parts.Sheet(shared, "gpu_training", "T", facts).add(row("kept", [1.0], "s"))
        return []

    def raises(shared: parts.Round) -> list[str]:
        raise ValueError("no compiler\nand more")

    def crashes(shared: parts.Round) -> list[str]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    def hangs(shared: parts.Round) -> list[str]:
        child = subprocess.Popen(["sleep", "60"])
        (shared.out / "pid").write_text(str(child.pid))
        child.wait()
        return []

    works = {"good": good, "raises": raises, "crashes": crashes, "hangs": hangs, "late": good}
    chosen = [parts.Part(name, work, 0.5) for name, work in works.items()]
    end_s = time.monotonic() + gpu.LEAST_S
    assert gpu._run_all(shared, [parts.Part("good", good, 9.0)], end_s + 60) is False
    assert gpu._run_all(shared, chosen[1:4], end_s + 60) is True
    assert gpu._run_all(shared, chosen[4:], end_s - 1) is True
    said = capsys.readouterr().out
    assert "good: ok" in said and "raises: FAILED: ValueError: no compiler, " in said
    assert "crashes: FAILED: ended by SIGKILL" in said and "hangs: FAILED: ended after 0 s" in said
    assert f"late: FAILED: {gpu.OUT_OF_TIME}" in said
    assert not is_running(int((shared.out / "pid").read_text()))
    assert "| kept | 1 | 1 | 1 | 1 | s |" in (shared.out / "summary.md").read_text()
    assert "ValueError: no compiler" in (shared.out / "log.txt").read_text()


def test_a_cell_that_fails_is_reported_and_its_neighbours_measured(
    tmp_path: Path, small: Records, world: World
) -> None:
    """One is too large, one trained to NaN, one is fine; only the last is not measured again."""
    shared = round_of(tmp_path, small)
    base = next(cell for cell in shared.cells if cell.name == "ReLU after pool")
    settings = base.settings | {"step.precision": "fp32", "global_batch": 16}
    broken = {"large": {"global_batch": 10**6}, "nan": NAN, "fine": {}}
    cells = [
        replace(base, id=name, name=name, settings=settings | changed)
        for name, changed in broken.items()
    ]
    run = shared.run(cells)
    with closing(InProcess(small, world, seconds=0.1)) as measure:
        run.measure(run.missing(resume=False), measure)
    large, nan, fine = read_profile(shared.out).cells
    assert "a global batch of 1000000 is larger" in large.repetitions[0].failed
    assert "was not finite" in nan.repetitions[0].failed and not nan.good
    assert fine.good and not fine.repetitions[0].failed
    again = replace(run, kept=tmp_path / "again")
    again.keep(read_profile(shared.out))
    assert [cell.name for cell, _ in again.missing(resume=True)] == ["large", "nan"]


def test_a_way_that_fails_leaves_the_case_its_other_figures() -> None:
    def refused() -> None:
        raise TypeError("no such launch\nand more")

    flush, bandwidth = setting(torch.device("cpu"))
    case = Case("k", {"eager": lambda: None, "Triton": refused})
    measured = measure_case(case, flush, bandwidth, 2)
    assert [line.name for line in measured.rows] == ["k: eager"]
    assert measured.failures == ["k: Triton: TypeError: no such launch"]


def test_the_first_cause_of_an_error_is_reported() -> None:
    try:
        try:
            raise ValueError("the kernel was refused\nand more")
        finally:
            raise RuntimeError("the capture ended")
    except RuntimeError as error:
        assert sentence(first_cause(error)) == "ValueError: the kernel was refused"
    try:
        try:
            raise KeyError("inner")
        except KeyError:
            raise RuntimeError("what is meant") from None
    except RuntimeError as error:
        assert sentence(first_cause(error)) == "RuntimeError: what is meant"


def test_the_gpu_round_refuses_a_foreign_archive(command: Command, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK")
    words = (
        "python",
        "-m",
        "tools.gpu",
        "--device",
        "cpu",
        "--quick",
        "--out",
        tmp_path,
        "--npz",
        tmp_path / "x.npz",
    )
    assert_refused(command(*words), "no archive of names and images")


def test_two_runs_side_by_side_and_pictures(
    command: Command, small_dir: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        flags = ("--data", small_dir, "--epochs", 2, "--batch-size", 32, "--out", tmp_path / name)
        assert command("python", "-m", "engine.run", *flags).returncode == 0
    done = command("tools/profile", "compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| test accuracy |" in done.stdout and "+0.00 points" in done.stdout
    assert "Losses of the epochs that both have: equal to the bit." in done.stdout
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    (tmp_path / "b" / "report.json").write_text(
        json.dumps(report | {"config_digest": "another recipe"})
    )
    assert (
        "Losses" not in command("tools/profile", "compare", tmp_path / "a", tmp_path / "b").stdout
    )
    assert "training time" in (tmp_path / "comparison.md").read_text()
    assert len(json.loads((tmp_path / "comparison.json").read_text())["rows"]) == 6
    assert_refused(command("tools/profile", "compare", tmp_path, tmp_path), "no report.json")
    done = command("python", "-m", "tools.predict", tmp_path / "a", "--out", tmp_path / "p.png")
    assert done.returncode == 0, done.stderr
    picture = Image.open(tmp_path / "p.png")
    assert len(picture.getcolors(1 << 16)) > 50


def test_results_are_generated_from_their_files() -> None:
    assert TARGET.read_text() == render(), "run python -m tools.results"


def test_a_result_line_is_median_extremes_and_count() -> None:
    line = row("x | y", [3.0, 1.0, 2.0], "s")
    assert (line.value, line.low, line.high, line.n) == (2.0, 1.0, 3.0, 3)
    assert claim("c", 2.0, 2.4).met is False and claim("c", 2.4, 2.4).met is True
    facts = environment(num_threads=1, allocator="default", gpu={})
    result = Result(title="T", environment=facts, rows=[line], claims=[claim("c", 2, 3)])
    text = to_markdown(result, "f")
    assert "| x \\| y | 2 | 1 | 3 | 3 | s |" in text and "**no**" in text


@pytest.mark.parametrize("name", ["pack_tmnist", "profile"])
def test_the_shims_print_help(name: str, command: Command) -> None:
    done = command(f"tools/{name}", "--help")
    assert done.returncode == 0 and "Usage" in done.stdout


@pytest.fixture(scope="module")
def logged_run(command: Command, tmp_path_factory: pytest.TempPathFactory, small_dir: Path) -> Path:
    """Two ranks, two epochs of 7 steps of 16, with what they consumed."""
    run = tmp_path_factory.mktemp("order") / "run"
    torchrun = ("torchrun", "--standalone", "--nproc-per-node=2", "-m", "engine.run")
    flags = ("--feed=stream", "--order=blocked", "--epochs=2", "--batch-size=16", "--device=cpu")
    keys = ("--set=log_ids=true", "--set=data.block_samples=20", "--set=data.window_blocks=3")
    done = command(*torchrun, "--data", small_dir, "--out", run, *flags, *keys)
    assert done.returncode == 0, done.stderr
    assert "stream reads ahead in 2 windows of 0 MB" in done.stdout
    return run


def test_verify_order_passes_what_a_run_consumed(command: Command, logged_run: Path) -> None:
    report = json.loads((logged_run / "report.json").read_text())
    assert report["effective"]["feed"] == "stream" and 0.2 < report["order_reach_fraction"] < 0.3
    done = command("tools/verify", "order", logged_run)
    assert done.returncode == 0 and "448 samples checked, 0 faults" in done.stdout


BATCH_BYTES = 16 * 16


def another_checksum(data: bytearray) -> None:
    data[8] ^= 1


def another_sample(data: bytearray) -> None:
    step_3, step_4 = 3 * BATCH_BYTES, 4 * BATCH_BYTES
    data[step_3], data[step_4] = data[step_4] ^ 1, data[step_3]


def fewer_steps(data: bytearray) -> None:
    del data[2 * BATCH_BYTES :]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (another_checksum, "epoch 1, rank1of2: step 0, row 0: the image is not that of sample"),
        (another_sample, "epoch 1, rank1of2: step 3 is the first that has other samples"),
        (fewer_steps, "epoch 1, rank1of2: 2 steps, want 7"),
    ],
)
def test_verify_order_finds_what_was_changed(
    change: Callable[[bytearray], None], fault: str, command: Command, logged_run: Path
) -> None:
    file = logged_run / "ids" / "epoch1-step0-rank1of2.bin"
    before = file.read_bytes()
    data = bytearray(before)
    change(data)
    file.write_bytes(data)
    done = command("tools/verify", "order", logged_run)
    file.write_bytes(before)
    assert done.returncode == 1 and fault in done.stdout


def test_verify_order_needs_the_ids(command: Command, logged_run: Path) -> None:
    file = logged_run / "ids" / "epoch1-step0-rank1of2.bin"
    file.rename(logged_run / "away")
    done = command("tools/verify", "order", logged_run)
    (logged_run / "away").rename(file)
    assert_refused(done, "holds ids of 1 of 2 ranks for epoch 1")
    (logged_run / "ids").rename(logged_run / "away")
    done = command("tools/verify", "order", logged_run)
    (logged_run / "away").rename(logged_run / "ids")
    assert_refused(done, "holds no ids of epoch 0 from its first step on", "log_ids=true")


@pytest.mark.parametrize(
    "names", [("resident", "stream"), pytest.param(FEEDS, marks=pytest.mark.slow)], ids=len
)
def test_profile_feeds_measures_each_in_a_process_of_its_own(
    names: tuple[str, ...],
    command: Command,
    tmp_path: Path,
    small_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feeds_module, "FEEDS", names)
    flags = (
        "--data",
        small_dir,
        "--batch-size",
        32,
        "--seconds",
        0.1,
        "--json",
        tmp_path / "f.json",
    )
    done = command("tools/profile", "feeds", *flags, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    feeds = json.loads((tmp_path / "f.json").read_text())["feeds"]
    assert [row["name"] for row in feeds] == [*names]
    assert all(
        row["samples_per_s"] > 0 and row["threads"] == 1 and row["cpu_s_per_million"] > 0
        for row in feeds
    )
    assert {row["order"] for row in feeds} >= {"exact", "blocked"}
    with Image.open(tmp_path / "out" / "feeds.png") as chart:
        assert chart.width > 500
    assert_refused(
        command("tools/profile", "feeds", "--data", small_dir),
        "larger than the train split of 224 samples",
    )


@pytest.mark.parametrize(
    ("tool", "typed", "offered"),
    [
        ("profile", "", {"compare", "ensemble", "run", "trace"}),
        ("pack_tmnist", "--s", {"--split", "--seed"}),
    ],
)
def test_a_shell_completes_subcommands_and_options(
    command: Command, tool: str, typed: str, offered: set[str]
) -> None:
    variable = f"_{tool.upper()}_COMPLETE"
    sourced = command(
        "bash", "-c", f'eval "$({variable}=bash_source tools/{tool})"; complete -p tools/{tool}'
    )
    assert sourced.returncode == 0 and f"tools/{tool}" in sourced.stdout, sourced.stderr
    words = {"COMP_WORDS": f"tools/{tool} {typed}", "COMP_CWORD": "1"}
    done = command(f"tools/{tool}", **{variable: "bash_complete"}, **words)
    assert offered <= {line.removeprefix("plain,") for line in done.stdout.splitlines()}, (
        done.stderr
    )
