"""R10: what one machine lacks or loses is one sentence on every machine; two torchruns on this one.

The torchruns are forked from this process, which has imported torch for both.
"""

import multiprocessing
import os
import shutil
import socket
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
    """The second machine fails before the process group, or in the middle of training."""
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
    import torch.distributed.run  # noqa: F401 - before the fork

    place = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    line = [*place, f"--master-port={free_port()}", "-m", "engine.run", *words]
    forked = multiprocessing.get_context("fork")
    machines = [
        forked.Process(target=torchrun, args=(folder, [f"--node-rank={rank}", *line]))
        for rank, folder in enumerate(folders)
    ]
    for machine in machines:
        machine.start()
    try:
        for machine in machines:
            machine.join(ENDS_S)
            assert machine.exitcode is not None, f"did not end within {ENDS_S} s"
    finally:
        for machine in machines:
            machine.kill()
    return [(folder / "stderr").read_text() for folder in folders]


def torchrun(folder: Path, line: list[str]) -> None:
    from torch.distributed.run import main

    os.chdir(folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main(line)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


ROWS = (("R10", "what one machine lacks or loses is said on all", machines),)
