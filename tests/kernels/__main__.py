"""python -m tests.kernels [--full | --write]: the proofs with every triton of an allowed torch.

The versions stand in pyproject.toml, [tool.engine]. All are compiled with; the newest interprets
each kernel, the oldest whole training steps and, with --full, each kernel, too; two processes work
side by side. A version that is not installed is put into a folder of its own in .venv, which the
proofs' processes see first. --write measures the registers and the memory that each version needs
anew and writes them into resources.json.
"""

import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.report import ROOT

PYTEST = ("-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider")
LAYERS = (*PYTEST, "tests/kernels/interpreted_layers.py")
OTHERS = (*PYTEST, "tests/kernels/interpreted_others.py")
STEPS = (*PYTEST, "tests/kernels/interpreted_steps.py")
"""One interpreter is enough for them."""
COMPILED = (*PYTEST, "tests/kernels/compiled.py")
WRITTEN = ("-m", "tests.kernels.compiled")


def triton_versions() -> list[str]:
    """The versions that the kernels are proven with, oldest first."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["engine"]
    return list(dict.fromkeys(table["triton_of_torch"].values()))


def folder_of(wanted: str) -> Path | None:
    """The folder that holds a version of triton, filled if need be; None where it is installed."""
    if version("triton") == wanted:
        return None
    folder = Path(sys.prefix) / f"triton-{wanted}"
    if not folder.exists():
        with TemporaryDirectory(dir=sys.prefix) as temporary:
            options = ("--quiet", "--no-deps", "--no-compile", "--target", temporary + "/triton")
            command = [sys.executable, "-m", "pip", "install", *options, f"triton=={wanted}"]
            subprocess.run(command, check=True)
            os.rename(temporary + "/triton", folder)
    return folder


def run(words: tuple[str, ...], wanted: str) -> bool:
    """Run Python with a version of triton, print what it said, and tell whether all was well."""
    folder = folder_of(wanted)
    paths = [str(folder)] if folder else []
    paths += filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "EXPECTED_TRITON": wanted,
        "TRITON_INTERPRET": "1" if words in (LAYERS, OTHERS, STEPS) else "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    what = " ".join(words[len(PYTEST) :]) or words[-1]
    print(f"== triton {wanted}: {what}\n{done.stdout}{done.stderr}", end="", flush=True)
    return done.returncode == 0


def main() -> None:
    versions = triton_versions()
    for wanted in versions:
        folder_of(wanted)
    if "--write" in sys.argv[1:]:
        results = [run(WRITTEN, wanted) for wanted in versions]
    else:
        alone = (LAYERS, OTHERS)
        proofs = [(words, versions[-1]) for words in alone]
        proofs.append((STEPS, versions[0]))
        if "--full" in sys.argv[1:]:
            proofs += [(words, versions[0]) for words in alone]
        proofs += [(COMPILED, version) for version in versions]
        with ThreadPoolExecutor(2) as threads:
            results = list(threads.map(lambda proof: run(*proof), proofs))
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
