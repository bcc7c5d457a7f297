"""The ledger of a step: launches, bytes, and the time that a model of a GPU gives them.

operations.py counts what a step launches, without a GPU. The model: one launch follows the other,
and each takes the longest of its bytes over the bandwidth, its FLOPs over the peak, and the turns
in which its programs wait for memory, plus what a launch within a graph costs. It leaves out what
the second-level cache saves, how full the last wave of programs is, and how well a convolution fits
its tiles.

Nothing here is measured, and no clock is read: the same code gives the same ledger on every
machine. RESULTS.md shows it as a model's, beside what a GPU measured of the same configurations.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from engine.config import AUTO, RunConfig, override
from engine.durable import Damaged
from engine.errors import UserError
from engine.host import ROOT
from engine.report import command_line, write_json
from engine.typed import read_as
from tools.measure.assumed import ASSUMED, Operation
from tools.measure.matrix import Cell, read_cells
from tools.measure.operations import STUDYS_SHAPE, step_operations
from tools.measure.results import Profile, Settings
from tools.measure.roofline import PEAK_FLOPS, Shapes, floor
from tools.report.rows import Claim, claim, markdown_table, number

ROWS = ROOT / "bench_configs" / "ledger.toml"
RESULT = ROOT / "bench_configs" / "results" / "ledger.json"
H100 = "NVIDIA H100 80GB HBM3"
DETAILED_BATCH = 2048
"""The batch whose launches stand in the file one by one."""
SLOW_LAUNCH_US = 3.0
LEAST_KB = 0.3
"""Launches that move less, a sample, share one line of the table."""
HEAD = (
    "| 16 steps a graph | batch | launches a step | KB a sample "
    "| model, not measured: 3 us a launch (samples/s) | 2 us a launch | measured |"
)
ALL_KERNELS = "all kernels"
PLAIN = "fused AdamW"
OWN_CONV2 = "conv2_pool_relu"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A GPU as the model has it."""

    name: str
    processors: int
    memory_bytes: float
    bytes_per_s: float
    """Reached by a copy: 0.9 of the datasheet's."""
    launch_us: float = 2.0
    """What a launch within a graph takes beside its work, at least; up to SLOW_LAUNCH_US."""
    turn_us: float = 0.7
    """From a load to its value in the device's memory, and the work between; the first turn's is
    in launch_us."""
    product_fraction: float = 0.81
    """Of the peak in a large product: 798 of 989 TFLOP/s in bf16 on an H100."""
    convolution_fraction: float = 0.6
    """Of the peak in a convolution to 64 channels or fewer: a guess, half a tile being empty."""

    def flops_per_s(self, operation: Operation) -> float:
        is_convolution = operation.is_convolution
        fraction = self.convolution_fraction if is_convolution else self.product_fraction
        return fraction * PEAK_FLOPS[self.name][operation.dtype]

    def parts_us(self, operation: Operation) -> dict[str, float]:
        """Microseconds that each part of a step's launches of this kind would take by itself."""
        return {
            "bytes": 1e6 * (operation.num_bytes / self.bytes_per_s),
            "FLOPs": 1e6 * (operation.flops / self.flops_per_s(operation)),
            "waiting": operation.launches * (operation.turns - 1) * self.turn_us,
            "launches": operation.launches * self.launch_us,
        }

    def us(self, operation: Operation) -> float:
        """Microseconds of a step's launches of this kind."""
        *work_us, launches_us = self.parts_us(operation).values()
        return max(work_us) + launches_us


MACHINES = {
    each.name: each
    for each in (
        Machine(name=H100, processors=132, memory_bytes=80e9, bytes_per_s=3.0e12),
        Machine(name="NVIDIA H200", processors=132, memory_bytes=141e9, bytes_per_s=4.3e12),
        Machine(
            name="NVIDIA A100-SXM4-80GB",
            processors=108,
            memory_bytes=80e9,
            bytes_per_s=1.84e12,
        ),
    )
}
"""By the device's whole name; multiprocessors, memory and bandwidths by NVIDIA's datasheets."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One configuration at one batch."""

    name: str
    batch: int
    settings: Settings
    launches: float
    """Of a step; what 16 steps launch once is a sixteenth."""
    kb_per_sample: float
    step_us: float
    """By the model, as are the next two."""
    samples_per_s: float
    slow_samples_per_s: float
    """Where a launch takes SLOW_LAUNCH_US."""
    operations: list[Operation] = field(default_factory=list)
    """At one batch only."""


@dataclass(frozen=True, kw_only=True)
class Stated:
    """An assumption of the count."""

    operator: str
    launches: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The result file."""

    title: str
    command: str
    torch: str
    """Whose operations were counted: another version may launch others."""
    machine: Machine
    assumptions: list[Stated]
    rows: list[Counted]
    claims: list[Claim]

    def of(self, name: str, batch: int) -> Counted:
        return next(row for row in self.rows if (row.name, row.batch) == (name, batch))


def machine_of(name: str) -> Machine:
    """The model of a GPU.

    Raises:
        UserError: there is none.
    """
    if name not in MACHINES:
        known = ", ".join(MACHINES)
        raise UserError(f"--gpu {name}: there is no model of it; choose from {known}")
    return MACHINES[name]


def make_ledger(matrix: Path = ROWS, gpu: str = H100) -> Ledger:
    """Count and predict every cell of a matrix of one rank.

    Raises:
        UserError: the matrix cannot be read, or holds what cannot be counted.
    """
    machine = machine_of(gpu)
    title, cells = read_cells([matrix])
    rows = [counted(cell, machine) for cell in cells]
    stated = [
        Stated(operator=name, launches=assumed.text, reason=assumed.reason)
        for name, assumed in ASSUMED.items()
    ]
    return Ledger(
        title=title,
        command=command_line(),
        torch=torch_version(),
        machine=machine,
        assumptions=stated,
        rows=rows,
        claims=_claims(rows) if matrix == ROWS else [],
    )


def torch_version() -> str:
    """Without how it was built."""
    return str(torch.__version__).partition("+")[0]


def counted(cell: Cell, machine: Machine) -> Counted:
    """A cell's launches, bytes, and predicted rate.

    Raises:
        UserError: it is compiled, of several ranks, or of a precision that the GPU has not.
    """
    config = override(RunConfig(), cell.settings, cell.name)
    if cell.num_ranks > 1:
        raise UserError(f"{cell.name}: what ranks send each other is not counted; leave out ranks")
    batch = config.global_batch
    operations = operations_on(machine, config, batch, where=cell.name)
    step_us, slow_us = (
        sum(map(each.us, operations))
        for each in (machine, replace(machine, launch_us=SLOW_LAUNCH_US))
    )
    return Counted(
        name=cell.rung or cell.name,
        batch=batch,
        settings=cell.settings,
        launches=round(sum(each.launches for each in operations), 4),
        kb_per_sample=round(sum(each.num_bytes for each in operations) / batch / 1000, 4),
        step_us=round(step_us, 3),
        samples_per_s=round(1e6 * batch / step_us),
        slow_samples_per_s=round(1e6 * batch / slow_us),
        operations=operations if batch == DETAILED_BATCH else [],
    )


def operations_on(
    machine: Machine,
    config: RunConfig,
    batch: int,
    shape: tuple[int, int, int] = STUDYS_SHAPE,
    where: str = "--gpu",
) -> list[Operation]:
    """The launches of a step of one rank, as this GPU runs it.

    Args:
        shape: height and width of an image, and classes.
        where: what names the step, for the error's text.
    Raises:
        UserError: it is compiled, or of a precision that the GPU has not.
    """
    if config.step.compile != "off":
        what = "what torch.compile fuses is not counted"
        raise UserError(f"{where}: {what}; leave out step.compile")
    if config.step.precision not in PEAK_FLOPS[machine.name]:
        what = f"{machine.name} has no {config.step.precision}"
        raise UserError(f"{where}: {what}; name another --gpu, or another precision")
    if config.kernels == AUTO:
        config = replace(config, kernels=())  # what auto means on a GPU
    return step_operations(config, batch, machine.processors, shape)


def _claims(rows: list[Counted]) -> list[Claim]:
    """The goals of a step that trains every layer, by the best row of each."""
    trained = [row for row in rows if row.settings.get("model.first_layer") != "whitened"]
    large, small = ([row for row in trained if row.batch == batch] for batch in (2048, 64))
    by_library = [row for row in large if OWN_CONV2 not in row.settings.get("kernels", ())]
    of_library = min(row.kb_per_sample for row in by_library)
    moved = "KB a sample at batch 2048"
    return [
        claim("launches a step", min(row.launches for row in large), 22, at_most=True),
        claim(moved, min(row.kb_per_sample for row in large), 165, at_most=True),
        claim(f"{moved}, conv2 by the library", of_library, 205, at_most=True),
        claim("samples/s at batch 2048", max(row.samples_per_s for row in large), 6.5e6),
        claim("samples/s at batch 64", max(row.samples_per_s for row in small), 1.2e6),
    ]


def write_ledger(found: Ledger, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(found, path)


def read_ledger(path: Path = RESULT) -> Ledger:
    """A ledger's file.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return read_as(Ledger, path)
    except (OSError, Damaged) as error:
        remedy = "make it anew by tools/profile ledger --out"
        raise UserError(f"{path}: is no ledger ({error}); {remedy}") from None


def to_markdown(found: Ledger, source: str, profile: Profile | None = None) -> str:
    """A ledger as a section of RESULTS.md.

    Args:
        profile: what a GPU measured; rows of the same configuration are filled from it.
    """
    measured = _measured(profile) if profile else []
    rows = [
        (row.name, row.batch, f"{row.launches:.1f}", f"{row.kb_per_sample:.0f}",
         f"{row.slow_samples_per_s:,.0f}", f"{row.samples_per_s:,.0f}", _beside(row, measured))
        for row in found.rows
    ]  # fmt: skip
    machine = found.machine
    lines = [
        f"## {found.title}: a model of one {machine.name}, not measured",
        "",
        f"torch {found.torch}; `{found.command}`; file `{source}`",
        "",
        model_in_words(machine, f"{machine.launch_us:g} or {SLOW_LAUNCH_US:g}"),
        "",
        *markdown_table(HEAD, "lrrrrrr", rows),
    ]
    if found.claims:
        goals = [
            (each.claim, number(each.measured), "at most " * each.at_most + number(each.wanted),
             "yes" if each.met else "**no**")
            for each in found.claims
        ]  # fmt: skip
        lines += ["", *markdown_table("| goal | by the model | wanted | met |", "lrrl", goals)]
    stated = [(f"`{each.operator}`", each.launches, each.reason) for each in found.assumptions]
    lines += ["", *markdown_table("| operation | launches assumed | why |", "lll", stated)]
    return "\n".join(lines) + "\n"


def model_in_words(machine: Machine, launch_us: str) -> str:
    """How the times came about, in two clauses; `launch_us` is what a launch was given."""
    bytes_flops = (
        f"its bytes at {machine.bytes_per_s / 1e12:g} TB/s, its FLOPs at "
        f"{machine.product_fraction:g} of the datasheet's peak "
        f"({machine.convolution_fraction:g} in convolutions)"
    )
    waiting = f"{machine.turn_us:g} us for each further turn in which its programs wait for memory"
    return (
        "Launches and bytes are counted by dispatch; the time is a model, not measured: each "
        f"launch takes the longest of {bytes_flops} and {waiting}, and {launch_us} us for itself."
    )


def _measured(profile: Profile) -> list[tuple[RunConfig, float]]:
    found = []
    for cell in profile.cells:
        rates = sorted(repetition.rate for repetition in cell.good)
        if rates:
            config = override(RunConfig(), cell.settings, cell.name)
            found.append((config, rates[len(rates) // 2]))
    return found


def _beside(row: Counted, measured: list[tuple[RunConfig, float]]) -> str:
    config = override(RunConfig(), row.settings, row.name)
    rates = [rate for other, rate in measured if other == config]
    return number(rates[0]) if rates else "not yet measured"


def launches_table(found: Ledger) -> str:
    """The launches of the step with all kernels as Markdown; kernels/README.md shows it."""
    row = found.of(ALL_KERNELS, DETAILED_BATCH)
    large, small = list[Operation](), list[Operation]()
    for each in row.operations:
        of_sample = each.num_bytes / row.batch / 1000
        (large if of_sample >= LEAST_KB else small).append(each)
    lines = [_line(each.name, [each], row.batch, found.machine) for each in large]
    lines.append(_line("others", small, row.batch, found.machine))
    lines.append(_line("**in all**", row.operations, row.batch, found.machine))
    plain = found.of(PLAIN, DETAILED_BATCH)
    lines.append(_line("PyTorch's own operations", plain.operations, plain.batch, found.machine))
    fewest = floor(Shapes(*STUDYS_SHAPE))
    least_kb = sum(work.num_bytes for work in fewest) / 1000
    lines.append(("the floor: eight kernels that fuse all", "8", "", "", f"{least_kb:.1f}", ""))
    head = "| launch | times | reads | writes | KB a sample | us by the model |"
    return "\n".join(markdown_table(head, "lrrrrr", lines)) + "\n"


def _line(
    name: str, operations: Iterable[Operation], batch: int, machine: Machine
) -> tuple[str, str, str, str, str, str]:
    each = list(operations)
    reads, writes = (
        sum(getattr(op, side) for op in each) / batch for side in ("read_bytes", "write_bytes")
    )
    times = sum(op.launches for op in each)
    us = sum(map(machine.us, each))
    kilobytes = (reads + writes) / 1000
    return name, f"{times:.3g}", f"{reads:,.0f}", f"{writes:,.0f}", f"{kilobytes:.1f}", f"{us:.1f}"


def in_words(config: RunConfig, batch: int, shape: tuple[int, int, int]) -> str:
    """A line on the step of a configuration, as an H100 would launch it."""
    operations = operations_on(MACHINES[H100], config, batch, shape)
    launches = sum(each.launches for each in operations)
    kilobytes = sum(each.num_bytes for each in operations) / batch / 1000
    moved = f"moves {kilobytes:.0f} KB a sample"
    return f"counted, not measured: on a GPU a step is {launches:.1f} launches and {moved}"
