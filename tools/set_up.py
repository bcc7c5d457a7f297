"""Makes .venv: python tools/set_up.py [--test]. Only the standard library; run by the Makefile.

torch comes first. With an NVIDIA driver it is the index's newest build. Without one it is the
small CPU build (its version ends in +cpu), if pip's own index, a local wheel folder, or TORCH_INDEX
offers one that pyproject.toml allows. TORCH_INDEX is asked for torch alone, never beside another
index, so that no name can be taken from the wrong one. The rest comes from pip's own index.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TIMEOUT_S = 10


@dataclass(frozen=True)
class Torch:
    """What pip is asked for, and the one index that it is asked of (empty: pip's own)."""

    requirement: str
    index: str = ""


class SetUpError(Exception):
    """One line: what is wrong and what to do."""


def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def torch_range() -> str:
    """The requirement on torch, as pyproject.toml has it."""
    names: list[str] = project()["project"]["dependencies"]
    return next(name for name in names if name.startswith("torch>"))


def pip(*words: str, index: str = "") -> subprocess.CompletedProcess[str]:
    """Run .venv's pip and keep what it prints; with an index, of that one alone."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *words]
    environment = dict(os.environ)
    if index:
        command += ["--index-url", index]
        environment |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")


def install(*words: str, index: str = "") -> None:
    """pip install; where it fails, its own words and one line of ours."""
    done = pip("--quiet", "install", "--no-compile", *words, index=index)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SetUpError(
            f"pip could not install {words[-1]}: its reason stands above; then make again"
        )


def cpu_version(offered: str) -> str | None:
    """The newest allowed version that ends in +cpu, of what `pip index versions` prints."""
    known = project()["tool"]["engine"]["triton_of_torch"]
    found = re.findall(r"\b(\d+\.\d+\.\d+\+cpu)(?=,|\s|$)", offered)
    allowed = [version for version in found if version.rpartition(".")[0] in known]
    return max(allowed, key=_numbers, default=None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def choose(driver: bool) -> Torch:
    """Which build of torch to install here."""
    named = os.environ.get("TORCH_INDEX", "")
    if driver:
        return Torch(torch_range(), named)
    for index in [named] if named else ["", CPU_INDEX]:
        patience = ("--timeout", str(TIMEOUT_S), "--retries", "0") if index else ()
        offered = pip("index", "versions", "torch", *patience, index=index)
        if version := cpu_version(offered.stdout):
            return Torch(f"torch=={version}", index)
    if named:
        raise SetUpError(
            f"TORCH_INDEX={named} offers no CPU build of {torch_range()} for this Python, "
            f"or cannot be reached; give another, or leave it out"
        )
    return Torch(torch_range())


def describe(torch: Torch) -> str:
    """Which build of torch pip would install, and how large it is with what it brings along."""
    words = ["-qq", "install", "--dry-run", "--ignore-installed", "--report", "-"]
    alone = ["--no-deps"] if "+cpu" in torch.requirement else []
    done = pip(*words, *alone, "--use-feature=fast-deps", torch.requirement, index=torch.index)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SetUpError(f"{torch.requirement} cannot be installed: pip's reason stands above")
    found = json.loads(done.stdout)["install"]
    version = next(i["metadata"]["version"] for i in found if i["metadata"]["name"] == "torch")
    with ThreadPoolExecutor(8) as threads:
        sizes = list(threads.map(num_bytes, [i["download_info"]["url"] for i in found]))
    known = "" if None in sizes else f", {readable(sum(size or 0 for size in sizes))}"
    return f"torch {version}{known}" + ("" if alone else " with its libraries")


def num_bytes(url: str) -> int | None:
    """The size of a wheel: of a local file its own, else what the server says; None if neither."""
    parts = urlsplit(url)
    try:
        if parts.scheme == "file":
            return Path(unquote(parts.path)).stat().st_size
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, ValueError, TypeError):
        return None


def readable(size_bytes: int) -> str:
    """1,500,000,000 as "1.5 GB", 190,000,000 as "190 MB"."""
    if size_bytes >= 1e9:
        return f"{size_bytes / 1e9:.1f} GB"
    return f"{size_bytes / 1e6:.0f} MB"


def make_venv() -> None:
    """An environment that has pip: a new one where there is none, or where one was left half-made
    or was made in another folder (the scripts in it name that folder)."""
    config = VENV / "pyvenv.cfg"
    here = config.exists() and str(VENV) in config.read_text()
    if here and PYTHON.exists() and not pip("--version").returncode:
        return
    done = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        raise SetUpError(
            f"{sys.executable} cannot make an environment ({_last_line(done)}); "
            f"on Debian and Ubuntu apt-get install python3-venv, or name another with make PYTHON="
        )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def set_up() -> None:
    """.venv with the engine."""
    make_venv()
    install("--upgrade", "pip>=25")  # older ones download a build to learn what it asks for
    driver = shutil.which("nvidia-smi") is not None
    torch = choose(driver)
    line = describe(torch)
    if not driver and "+cpu" not in line:
        line = f"no CPU build offered, so the CUDA build: {line}; TORCH_INDEX= names another index"
    print(f"installing {line}", flush=True)
    alone = ["--no-deps"] if torch.index else []  # the rest comes from pip's own index
    install(*alone, torch.requirement, index=torch.index)
    install("--editable", str(ROOT), *triton_beside())


def triton_beside() -> list[str]:
    """The triton that belongs to the torch installed: a CPU build does not ask for one itself."""
    wanted = project()["tool"]["engine"]["triton_of_torch"]
    installed = pip("list", "--format", "json")
    versions = {p["name"]: p["version"] for p in json.loads(installed.stdout)}
    torch = versions["torch"]
    return [f"triton=={wanted[torch.rpartition('.')[0]]}"] if "+cpu" in torch else []


def add_test_tools() -> None:
    """What the tests need beside the engine, from the group `test`."""
    print("adding the test tools", flush=True)
    install(*project()["dependency-groups"]["test"])


def main() -> None:
    try:
        add_test_tools() if "--test" in sys.argv[1:] else set_up()
    except SetUpError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
