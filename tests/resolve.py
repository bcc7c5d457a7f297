"""python -m tests.resolve: what set-up asks for resolves on every Python allowed, with PyPI alone.

Each case is a stranger's: this machine's configuration and wheel folders are switched off, nothing
is installed, no wheel is fetched. One line per case; a conflict is named and gives exit code 1, and
so does an index that cannot be reached.

By uv, whose resolution follows the same metadata as pip's. Pip's own --dry-run downloads every
wheel, 3 GB per case, from an index that serves no metadata apart from them.
"""

import os
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
LIMIT_S = 120
SHOWN = ("torch", "triton", "nvidia-dali-cuda120", "numpy")


@dataclass(frozen=True)
class Case:
    """What is asked of the index for one Python."""

    python: str
    name: str
    requirements: tuple[str, ...]
    triton: str | None = None
    """The version that must come out of it."""


def cases(folder: Path) -> list[Case]:
    """On each Python: the oldest torch, the newest, and the whole range beside the test tools."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    engine = tuple(project["project"]["dependencies"])
    tools = tuple(project["dependency-groups"]["test"])
    table = project["tool"]["engine"]["triton_of_torch"]
    found = []
    for python in PYTHONS:
        for torch in (min(table, key=_numbers), max(table, key=_numbers)):
            wanted = (*engine, f"torch=={torch}.*")
            found.append(Case(python, f"torch {torch}", wanted, table[torch]))
        found.append(Case(python, "as make does, with the test tools", engine + tools))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def resolved(case: Case) -> subprocess.CompletedProcess[str]:
    """What would be installed, "name==version" per line; nothing but PyPI is asked."""
    words = ["pip", "compile", "--no-config", "--quiet", "--no-annotate", "--only-binary", ":all:"]
    place = ["--python-version", case.python, "--python-platform", "x86_64-manylinux_2_28"]
    switched_off = ("PIP_", "UV_", "TORCH_INDEX")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(switched_off)}
    if certificates := os.environ.get("PIP_CERT"):
        variables["SSL_CERT_FILE"] = certificates
    return subprocess.run(
        ["uv", *words, *place, "-"],
        input="\n".join(case.requirements),
        env=variables,
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT_S,
    )


def fault_of(case: Case, done: subprocess.CompletedProcess[str], found: dict[str, str]) -> str:
    """Why a case does not hold, in one line; empty where it does."""
    if done.returncode:
        return re.sub(r"[\s×╰│─▶]+", " ", done.stderr).strip() or "uv failed and said nothing"
    if case.triton and found["triton"] != case.triton:
        return f"triton {found['triton']}, but pyproject.toml's [tool.engine] says {case.triton}"
    return ""


def resolve(case: Case) -> bool:
    """Resolve one case and print its line."""
    try:
        done = resolved(case)
    except subprocess.TimeoutExpired:
        print(f"Python {case.python}, {case.name}: FAILS: no answer in {LIMIT_S} s", flush=True)
        return False
    found = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", done.stdout, re.MULTILINE))
    fault = fault_of(case, done, found)
    fine = ", ".join(f"{name} {found.get(name, 'none')}" for name in SHOWN)
    print(f"Python {case.python}, {case.name}: {f'FAILS: {fault}' if fault else fine}", flush=True)
    return not fault


def main() -> None:
    """Resolve the cases of this checkout, or of the one that is named."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    with ThreadPoolExecutor(9) as threads:
        results = list(threads.map(resolve, cases(folder)))
    print(f"{sum(results)} of {len(results)} cases resolve")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
