"""What a link carries: collectives between all ranks, over their bytes.

    torchrun --nnodes 2 ... -m tools.measure.link LINK.json

On every node; the first writes LINK.json, which `tools/profile plan --fit` reads. `plan` starts it
by itself for the ranks of one machine. Each time is the median of some, each of them that of the
slowest rank. Larger tensors are left out once one takes long. What is made of the times: fit.py.
"""

import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Literal

import click
import torch
import torch.distributed as dist

from engine.durable import writing
from engine.errors import UserError, exit_on_user_error
from engine.host import end_rank, env_local_world_size, env_num_machines, prepare_process
from engine.paths import PATH
from engine.ranks import join_ranks
from engine.report import write_json
from engine.world import World, start_world
from tools.measure.fit import KINDS, Kind, Link, Point, fitted_link, read_link
from tools.measure.runner import module_on_ranks, run_command
from tools.report.outputs import check_file

SIZES_BYTES = tuple(2**n * 2**10 for n in range(2, 17))
"""4 KiB to 64 MiB. So close together, since a link may let some bytes through at once and only then
keep to its rate."""
LEAST_TIMED = 9
MOST_TIMED = 100
ENOUGH_S = 0.2
"""A size is timed for as long, within these numbers of times."""
LONGEST_S = 0.5
"""A size that takes longer is the last that is tried."""
LIMIT_S = 300.0


@click.command()
@click.argument("out", metavar="LINK", type=PATH)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=None)
@click.option("--bytes", "sizes_bytes", multiple=True, type=click.IntRange(4), help="Of a tensor.")
def main(out: Path, device: str | None, sizes_bytes: tuple[int, ...]) -> None:
    """Measure all-reduces, all-gathers and reduce-scatters of all ranks, and write LINK."""
    with exit_on_user_error(end_rank):
        prepare_process()
        ranks = join_ranks()
        if ranks.size == 1:
            raise UserError("a link has two ends; start this by torchrun, with 2 ranks or more")
        ranks.agree(lambda: check_file(out) if ranks.rank == 0 else None)
        with start_world(device or "", ranks) as world, world.on_stream():
            points = points_of(world, sizes_bytes or SIZES_BYTES)
            with writing(out):
                world.first(lambda: write_json(_link(points, world), out))
    end_rank()


def _link(points: list[Point], world: World) -> Link:
    nodes = env_num_machines()
    where = "one machine" if nodes == 1 else f"{nodes} machines"
    source = f"measured, {world.size} ranks on {where}"
    backend: Literal["gloo", "nccl"] = "nccl" if world.device.type == "cuda" else "gloo"
    return fitted_link(points, source, backend, env_local_world_size(), world.environment())


def points_of(world: World, sizes_bytes: Iterable[int]) -> list[Point]:
    """Every kind of collective over these sizes. Collective."""
    points = []
    for kind in KINDS:
        for num_bytes in sorted(sizes_bytes):
            part_bytes = -(-num_bytes // (4 * world.size)) * 4  # each rank's, whole numbers
            whole_bytes = part_bytes * world.size
            took_s = collective_s(kind, whole_bytes, world)
            point = Point(kind=kind, num_ranks=world.size, num_bytes=whole_bytes, us=took_s * 1e6)
            points.append(point)
            if took_s > LONGEST_S:
                break
    return points


def collective_s(kind: Kind, num_bytes: int, world: World) -> float:
    """The median time of a collective of fp32, each time that of the slowest rank. Collective.

    Args:
        num_bytes: of the whole tensor; its fp32 numbers can be divided by the ranks.
    """
    whole = torch.zeros(num_bytes // 4, device=world.device)
    part = whole[: len(whole) // world.size].clone()
    times_s: list[float] = []
    for number in range(MOST_TIMED + 1):
        world.synchronize()
        start_s = time.perf_counter()
        _do(kind, whole, part)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        took_s = world.most([time.perf_counter() - start_s])[0]
        if number:  # the first one connects
            times_s.append(took_s)
        is_enough = len(times_s) >= LEAST_TIMED and sum(times_s) > ENOUGH_S
        if is_enough or (took_s > LONGEST_S and times_s):
            break
    return median(times_s)


def _do(kind: Kind, whole: torch.Tensor, part: torch.Tensor) -> None:
    with warnings.catch_warnings():  # torch 2.13's other names for them are not in older ones
        warnings.simplefilter("ignore", FutureWarning)
        if kind == "all-reduce":
            dist.all_reduce(whole)
        elif kind == "all-gather":
            dist.all_gather_into_tensor(whole, part)
        else:
            dist.reduce_scatter_tensor(part, whole)


def link_here(
    num_ranks: Iterable[int], device: str, sizes_bytes: Iterable[int] = SIZES_BYTES
) -> Link:
    """The link between the ranks of this machine, by processes of their own.

    Raises:
        UserError: it could not be measured.
    """
    found = [_measured(number, device, sizes_bytes) for number in num_ranks]
    points = [point for link in found for point in link.points]
    most = max(point.num_ranks for point in points)
    source = f"measured, up to {most} ranks on one machine"
    return fitted_link(points, source, found[-1].backend, most, found[-1].environment)


def _measured(num_ranks: int, device: str, sizes_bytes: Iterable[int]) -> Link:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "link.json"
        words = [str(out), *(f"--bytes={size}" for size in sizes_bytes)]
        words += [f"--device={device}"] * bool(device)
        command = module_on_ranks(num_ranks, "tools.measure.link", *words)
        if failed := run_command(command, Path(folder) / "log.txt", LIMIT_S):
            raise UserError(f"the link of {num_ranks} ranks could not be measured: {failed}")
        return read_link(out)


if __name__ == "__main__":
    main()
