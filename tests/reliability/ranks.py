"""R10: what one machine of a job lacks or loses is one sentence on every machine, by two torchruns on this one."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from engine.data.pack import pack
from engine.host import ROOT
from tests.reliability.common import Tally, glyph_csv

FLAGS = ("--batch-size=8", "--epochs=1", "--device=cpu", "--out=o", "--data=records")
STREAM = ("--feed=stream", "--order=blocked")
ENDS_S = 90
"""Two processes that import torch at once on two busy cores take half of that."""


def missing(folder: Path) -> None:
    shutil.rmtree(folder / "records")


def other(folder: Path) -> None:
    shutil.rmtree(folder / "records")
    pack(glyph_csv(folder / "other.csv", 200, 28, seed=2), folder / "records")


def damaged(folder: Path) -> None:
    file = folder / "records" / "train-00000.arrow"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)


CASES: tuple[tuple[Callable[[Path], None], tuple[str, ...], str], ...] = (
    (missing, (), "no such record directory"),
    (other, (), "its records' fingerprint is"),
    (damaged, (), "has CRC32"),
    (damaged, STREAM, "has CRC32"),  # found in the middle of training
)


def machines(tally: Tally) -> None:
    """Something is wrong on the second machine: before the process group, and in the middle of training."""
    for number, (spoil, flags, sentence) in enumerate(CASES[: tally.count(1, 4, 4)]):
        folders = [tally.folder / f"{number}-{machine}" for machine in (0, 1)]
        for folder in folders:
            folder.mkdir()
            pack(glyph_csv(folder / "some.csv", 200, 28), folder / "records")
        spoil(folders[1])
        for machine, printed in enumerate(torchruns(folders, *FLAGS, *flags)):
            said = [line for line in printed.splitlines() if line.startswith("error: ")]
            good = len(said) == 1 and said[0].startswith("error: rank 1: ") and sentence in said[0]
            good &= "gloo" not in printed and "exitcode  : 2" in printed
            tally.check(
                good, f"{spoil.__name__} {' '.join(flags)}, machine {machine}: {printed[:400]}"
            )


def torchruns(folders: list[Path], *words: str) -> list[str]:
    """What torchrun prints on each of two machines, each with a folder of its own; all must end."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    place = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    children = []
    for number, folder in enumerate(folders):
        line = [*torchrun, f"--node-rank={number}", *place, "-m", "engine.run", *words]
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        children.append(subprocess.Popen(line, cwd=folder, env=variables, **options))
    try:
        return [child.communicate(timeout=ENDS_S)[1].decode() for child in children]
    finally:
        for child in children:
            child.kill()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


ROWS = (("R10", "what one machine lacks or loses is said on all", machines),)
