"""python -m tests.resolve: pip resolves what set-up asks for, on every Python, with PyPI alone.

Each case is what a stranger's pip does: nothing is installed, and this machine's configuration and
wheel folders are switched off. A line a case; a conflict is named and gives exit code 1, and so
does an index that cannot be reached.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
LIMIT_S = 150


@dataclass(frozen=True)
class Case:
    """What is asked of pip for one Python."""

    python: str
    name: str
    requirements: tuple[str, ...]
    triton: str | None = None
    """The version that must come out of it."""


def cases(folder: Path) -> list[Case]:
    """On each Python: the oldest and the newest torch, and the whole range beside the pins."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    engine = tuple(project["project"]["dependencies"])
    pins = tuple(tool for tool in project["dependency-groups"]["test"] if "==" in tool)
    table = project["tool"]["engine"]["triton_of_torch"]
    found = []
    for python in PYTHONS:
        for torch in (min(table, key=_numbers), max(table, key=_numbers)):
            wanted = (*engine, f"torch=={torch}.*")
            found.append(Case(python, f"torch {torch}", wanted, table[torch]))
        found.append(Case(python, "as make does, with the reports' versions", engine + pins))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def pip_report(case: Case, folder: str) -> subprocess.CompletedProcess[str]:
    """Write what pip would install to report.json in the folder; nothing but PyPI is asked."""
    switched_off = ("PIP_", "TORCH_INDEX")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(switched_off)}
    kept = {k: os.environ[k] for k in ("PIP_CERT", "PIP_PROXY") if k in os.environ}
    environment |= kept | {"PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    command += [
        "--dry-run",
        "--ignore-installed",
        "--report",
        folder + "/report.json",
        "--use-feature=fast-deps",
    ]
    command += ["--retries", "2", "--python-version", case.python, "--only-binary=:all:"]
    command += ["--target", folder, *case.requirements]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


def fault_of(case: Case, done: subprocess.CompletedProcess[str], found: dict[str, str]) -> str:
    """Why a case does not hold, in one line; empty where it does."""
    if done.returncode:
        return conflict(done.stdout + done.stderr)
    if case.triton and found["triton"] != case.triton:
        return f"triton {found['triton']}, but pyproject.toml's [tool.engine] says {case.triton}"
    return ""


def conflict(words: str) -> str:
    """The lines of pip's message that name the conflict, as one."""
    lines = [line.removeprefix("ERROR: ").strip() for line in words.splitlines()]
    named = [
        line for line in lines if re.search(r"^\S+ \S+ depends on|user requested|No matching", line)
    ]
    return "; ".join(named or lines[-1:]) or "pip failed and said nothing"


def resolve(case: Case) -> bool:
    """Resolve one case and print its line."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = pip_report(case, folder)
        except subprocess.TimeoutExpired:
            print(f"Python {case.python}, {case.name}: FAILS: no answer in {LIMIT_S} s", flush=True)
            return False
        report = Path(folder) / "report.json"
        installs = json.loads(report.read_text())["install"] if not done.returncode else []
    found = {i["metadata"]["name"].lower(): i["metadata"]["version"] for i in installs}
    fault = fault_of(case, done, found)
    shown = ("torch", "triton", "nvidia-dali-cuda120", "numpy")
    fine = ", ".join(f"{name} {found.get(name, 'none')}" for name in shown)
    print(f"Python {case.python}, {case.name}: {f'FAILS: {fault}' if fault else fine}", flush=True)
    return not fault


def main() -> None:
    """Resolve the cases of this checkout, or of the one that is named."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(resolve, cases(folder)))
    print(f"{sum(results)} of {len(results)} cases resolve")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
