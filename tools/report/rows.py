"""Result files: the one shape in which benchmarks and the GPU round leave their figures.

A file is a Result as JSON: a title, an environment with the command in it, rows, and claims.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from engine.durable import Damaged
from engine.errors import UserError
from engine.report import Environment, command_line, write_json
from engine.typed import read_as


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure: the median of n repetitions, and their extremes."""

    name: str
    value: float
    unit: str
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A figure that must be reached, and whether it was."""

    claim: str
    measured: float
    wanted: float
    at_most: bool = False
    met: bool


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result file."""

    title: str
    environment: Environment
    rows: list[Row]
    claims: list[Claim]


def row(name: str, values: list[float], unit: str) -> Row:
    """A result line from repetitions."""
    low, high = min(values), max(values)
    return Row(name=name, value=median(values), unit=unit, low=low, high=high, n=len(values))


def claim(text: str, measured: float, wanted: float, at_most: bool = False) -> Claim:
    """Whether a figure that must be reached was: measured >= wanted, or <=."""
    met = measured <= wanted if at_most else measured >= wanted
    return Claim(claim=text, measured=measured, wanted=wanted, at_most=at_most, met=met)


def write_result(
    path: Path, *, title: str, environment: Environment, rows: list[Row], claims: list[Claim]
) -> Result:
    """Write a result file, and return it.

    Its command is this process's, though a child may have measured.
    """
    facts = replace(environment, command=command_line())
    result = Result(title=title, environment=facts, rows=rows, claims=claims)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, path)
    return result


def read_result(path: Path) -> Result:
    """A result file.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return read_as(Result, path)
    except (OSError, Damaged) as error:
        raise UserError(f"{path}: is no result file ({error}); measure it anew") from None


def to_markdown(result: Result, source: str) -> str:
    """A result file as a section of RESULTS.md."""
    head = "| result | median | low | high | n | unit |"
    cells = [
        (r.name, number(r.value), number(r.low), number(r.high), r.n, r.unit) for r in result.rows
    ]
    changed = " with changes" if result.environment.dirty else ""
    machine = f"{_machine(result.environment)}; {_commit(result.environment)}{changed}"
    lines = _opening(result.title, machine, result.environment, source)
    lines += markdown_table(head, "lrrrrl", cells)
    if result.claims:
        head = "| must reach | measured | wanted | met |"
        lines += ["", *markdown_table(head, "lrrl", map(_reached, result.claims))]
    return "\n".join(lines) + "\n"


def _reached(it: Claim) -> tuple[str, str, str, str]:
    wanted = "at most " * it.at_most + number(it.wanted)
    return it.claim, number(it.measured), wanted, "yes" if it.met else "**no**"


@dataclass(frozen=True, kw_only=True)
class Proof:
    """A row of what `make reliability` left: what was done, how often, and how often it failed."""

    row: str
    what: str
    tried: int
    failed: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Proofs:
    """The file that `make reliability` left."""

    environment: Environment
    rows: list[Proof]


def proofs_to_markdown(proofs: Proofs, source: str) -> str:
    """What `make reliability` left as a section of RESULTS.md."""
    facts = proofs.environment
    machine = f"{facts.cpu_name}, {_commit(facts)}"
    lines = _opening("Reliability of packing and records", machine, facts, source)
    cells = [
        (r.row, r.what, f"{r.tried:,}", f"{r.failed:,}", f"{r.seconds:.0f}") for r in proofs.rows
    ]
    head = "| row | what is done to them | tried | failed | seconds |"
    return "\n".join([*lines, *markdown_table(head, "llrrr", cells)]) + "\n"


def _opening(title: str, machine: str, facts: Environment, source: str) -> list[str]:
    return [f"## {title}", "", f"{machine}; `{facts.command}`; file `{source}`", ""]


def _commit(facts: Environment) -> str:
    return f"commit {facts.commit[:12]}"


def _machine(facts: Environment) -> str:
    machine = facts.gpu_name or f"{facts.cpu_name}, {facts.num_cpus} cores, no GPU"
    if facts.gpu_power_limit_w:
        machine += f", power limit {facts.gpu_power_limit_w:.0f} W"
        machine += f", driver {facts.gpu_driver}, CUDA {facts.cuda}"
    versions = f"torch {facts.torch}, triton {facts.triton}, DALI {facts.dali}"
    return f"{machine}; {versions}, Python {facts.python}; allocator: {facts.allocator}"


def markdown_table(head: str, align: str, rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a table: its first one as given, `align` of an l or r a column."""
    texts = [[str(value).replace("|", "\\|") for value in row] for row in rows]
    body = ("".join(f"| {text} " if text else "| " for text in row) + "|" for row in texts)
    return [head, f"|{'|'.join('--:' if a == 'r' else '---' for a in align)}|", *body]


def number(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
