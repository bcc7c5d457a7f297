"""The commands, each run once for real."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from engine.config import RunConfig, read_toml
from tests.conftest import FAST_PRECISION, Command, assert_refused, run_configs
from tools import gpu
from tools.measure import ladder
from tools.measure.feeds import FEEDS
from tools.measure.ladder import LADDER
from tools.report.rows import claim, row, to_markdown
from tools.results import TARGET, render


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
    done = command("python", "-m", "tools.gpu", "--device", "cpu", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    results = {
        name: json.loads((tmp_path / f"gpu_{name}.json").read_text())
        for name in ("ladder", "kernels", "training", "feeds")
    }
    for result in results.values():
        assert all(r["value"] > 0 for r in result["rows"] if r["unit"] == "samples/s")
    names = [r["name"] for r in results["ladder"]["rows"]]
    rungs = [
        rung["name"] for rung in read_toml(LADDER)["rung"] if "torch.compile" not in rung["name"]
    ]
    assert [name.removeprefix("batch 64: ").split(" (")[0] for name in names[:-1]] == rungs
    assert names[-1] == "best at batch 64" and len(set(names)) == len(names)
    assert results["training"]["rows"][-1]["name"] == "test accuracy at batch 8192 less at 512"
    for line in read_toml(LADDER)["expected"]:
        if line["file"] == "gpu_kernels.json":  # the bandwidth is a GPU's
            line["row"] = line["row"].replace("part of the copy bandwidth", "Triton")
        if line["row"] != "best at batch 2048":
            measured = [
                r["name"].removesuffix(": not reached") for r in results[line["file"][4:-5]]["rows"]
            ]
            assert line["row"] in measured, "a figure that is expected is never measured"
    assert any("fed by dali" in r["name"] for r in results["feeds"]["rows"])
    assert (
        "skipped" in (tmp_path / "tests.txt").read_text()
        and "hidden waits" in (tmp_path / "verify.txt").read_text()
    )
    assert (tmp_path / "summary.md").read_text().count("## ") == 4 and not (
        tmp_path / "failures.txt"
    ).read_text()


def test_what_fails_in_the_gpu_round_does_not_take_the_rest_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    """A rung that cannot be opened, and a part that raises."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    keep = ladder.open_session

    def breaks(config: RunConfig, *given: Any) -> Any:
        if config.step.precision == "tf32":
            raise RuntimeError("out of memory\nand more")
        return keep(config, *given)

    def fails(shared: gpu.Round) -> None:
        raise ValueError("no training today")

    monkeypatch.setattr(ladder, "open_session", breaks)
    cells, fed = ladder.make_cells(64, compiled=False)[2:5], []
    monkeypatch.setattr(gpu, "make_cells", lambda largest_batch, compiled: cells)
    monkeypatch.setattr(gpu, "_training", fails)
    monkeypatch.setattr(gpu, "_feeds", lambda shared: fed.append(shared.quick))
    monkeypatch.setattr(
        gpu, "_command", lambda log, limit_s, module, *words: ["exit code 3"] * (module == "pytest")
    )
    done = CliRunner().invoke(gpu.main, ["--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert done.exit_code == 1, done.output
    failures = (tmp_path / "failures.txt").read_text()
    assert "tests: exit code 3" in failures and "ValueError: no training today" in failures
    assert "ladder: batch 64: TF32: RuntimeError: out of memory\n" in failures
    rows = json.loads((tmp_path / "gpu_ladder.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["batch 64: bf16", "best at batch 64"] and fed == [True]


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
    assert (line["value"], line["low"], line["high"], line["n"]) == (2.0, 1.0, 3.0, 3)
    assert claim("c", 2.0, 2.4)["met"] is False and claim("c", 2.4, 2.4)["met"] is True
    environment = dict.fromkeys(("gpu_name", "gpu_power_limit_w", "dirty"), None) | dict.fromkeys(
        (
            "cpu_name",
            "num_cpus",
            "torch",
            "triton",
            "dali",
            "python",
            "allocator",
            "commit",
            "command",
        ),
        "?",
    )
    text = to_markdown(
        {"title": "T", "environment": environment, "rows": [line], "claims": [claim("c", 2, 3)]},
        "f",
    )
    assert "| x \\| y | 2 | 1 | 3 | 3 | s |" in text and "**no**" in text


@pytest.mark.parametrize("name", ["pack_tmnist", "profile"])
def test_the_shims_print_help(name: str, command: Command) -> None:
    done = command(f"tools/{name}", "--help")
    assert done.returncode == 0 and "Usage" in done.stdout


def test_verify_order_finds_what_a_run_consumed_and_what_was_changed(
    command: Command, tmp_path: Path, small_dir: Path
) -> None:
    run = tmp_path / "run"
    words = (
        "torchrun",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "engine.run",
        "--device=cpu",
        "--data",
        small_dir,
    )
    settings = (
        "--set",
        "log_ids=true",
        "--set",
        "data.block_samples=20",
        "--set",
        "data.window_blocks=3",
    )
    flags = (
        "--feed=stream",
        "--order=blocked",
        "--epochs=2",
        "--batch-size=16",
        "--out",
        run,
        *settings,
    )
    done = command(*words, *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "report.json").read_text())
    assert report["effective"]["feed"] == "stream" and 0.2 < report["order_reach_fraction"] < 0.3
    assert "stream reads ahead in 2 windows of 0 MB" in done.stdout
    whole = command("tools/verify", "order", run)
    assert whole.returncode == 0 and "448 samples checked, 0 faults" in whole.stdout
    file = run / "ids" / "rank1-epoch1.bin"
    data = bytearray(file.read_bytes())
    data[8] ^= 1  # a pixel's checksum
    file.write_bytes(data)
    done = command("tools/verify", "order", run)
    assert (
        done.returncode == 1
        and "epoch 1, rank 1: step 0, row 0: the image is not that of sample" in done.stdout
    )
    data[8] ^= 1
    data[16 * 16 * 3], data[16 * 16 * 4] = data[16 * 16 * 4], data[16 * 16 * 3]
    data[16 * 16 * 3] ^= 1
    file.write_bytes(data)
    assert (
        "step 3 is the first that has other samples" in command("tools/verify", "order", run).stdout
    )
    file.write_bytes(data[: 16 * 16 * 2])
    assert "2 steps, want 7" in command("tools/verify", "order", run).stdout
    file.unlink()
    assert_refused(command("tools/verify", "order", run), "holds no ids of rank 1, epoch 1")


def test_profile_feeds_measures_all_of_them(
    command: Command, tmp_path: Path, small_dir: Path
) -> None:
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
    assert [row["name"] for row in feeds] == [
        name for name in FEEDS if name != "FFCV" or find_spec("ffcv")
    ]
    assert all(
        row["samples_per_s"] > 0 and row["threads"] == 1 and row["cpu_s_per_million"] > 0
        for row in feeds
    )
    assert {row["order"] for row in feeds} >= {"exact", "blocked", "torch's"}
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
