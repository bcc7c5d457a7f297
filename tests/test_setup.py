"""The wheel: it is whole, its commands run from any folder, and a run needs no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from engine.report import ROOT

SCRIPTS = tuple(
    f"tmnist-{name}"
    for name in ("pack", "train", "profile", "verify", "evaluate", "predict", "export")
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built of a copy of what it is made of: the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy of the source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "engine", "kernels", "tools"):
        subprocess.run(["cp", "-r", ROOT / name, copy / name], check=True)
    pip_run("wheel", "--no-deps", "--no-build-isolation", "-w", folder, copy)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere") / "site"
    pip_run("install", "--no-deps", "--no-compile", "--target", folder, wheel)
    return folder


def pip_run(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(
    installed: Path, folder: Path, *words: object, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder; of the project only what is installed can be imported."""
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_all_data_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("engine", "kernels", "tools"):
        for file in (ROOT / package).rglob("*"):
            if file.suffix in (".py", ".gz", ".html") or file.name == "NOTICE":
                assert str(file.relative_to(ROOT)) in names


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_its_own_name(installed: Path, tmp_path: Path, script: str) -> None:
    done = run(installed, tmp_path, installed / "bin" / script, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: {script} ")


def test_a_pack_and_an_epoch_from_another_folder(
    installed: Path, tmp_path: Path, small_csv: Path, cache: Path
) -> None:
    home = str(cache)
    packed = run(
        installed,
        tmp_path,
        installed / "bin" / "tmnist-pack",
        small_csv,
        "records",
        XDG_CACHE_HOME=home,
    )
    assert packed.returncode == 0, packed.stderr
    options = ("--data", "records", "--epochs", 1, "--batch-size", 32, "--device", "cpu")
    trained = run(
        installed, tmp_path, "-m", "torch.distributed.run", "-m", "engine.run",
        *options, "--out", "run", XDG_CACHE_HOME=home,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "report.json").exists()
