"""Result files: the one shape in which benchmarks and the GPU round leave their figures.

A file is JSON: title, command, environment, and rows of {name, value, unit, low, high, n}; value is a median, low and
high are the extremes of n repetitions. Claims are rows of {claim, measured, met}.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from engine.report import Environment, command_line, write_json


def row(name: str, values: list[float], unit: str) -> dict[str, Any]:
    """A result line from repetitions."""
    figures = {
        "value": median(values),
        "unit": unit,
        "low": min(values),
        "high": max(values),
        "n": len(values),
    }
    return {"name": name} | figures


def claim(text: str, measured: float, wanted: float, at_most: bool = False) -> dict[str, Any]:
    """Whether a figure that must be reached was: measured >= wanted, or <=."""
    met = measured <= wanted if at_most else measured >= wanted
    return {"claim": text, "measured": measured, "wanted": wanted, "at_most": at_most, "met": met}


def write_result(
    path: Path,
    *,
    title: str,
    environment: Environment,
    rows: list[dict[str, Any]],
    claims: list[dict[str, Any]],
) -> dict[str, Any]:
    """Write a result file, and return it; its command is this process's, though a child may have measured."""
    facts = asdict(environment) | {"command": command_line()}
    result = {"title": title, "environment": facts, "rows": rows, "claims": claims}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, path)
    return result


def to_markdown(result: dict[str, Any], source: str) -> str:
    """A result file as a section of RESULTS.md; what `make reliability` left has rows of its own."""
    facts, rows, claims = result["environment"], result["rows"], result.get("claims")
    commit = facts["commit"][:12]
    if "tried" in rows[0]:
        title, machine = (
            "Reliability of packing and records",
            f"{facts['cpu_name']}, commit {commit}",
        )
        head, align = "| row | what is done to them | tried | failed | seconds |", "llrrr"
        cells = [
            (r["row"], r["what"], f"{r['tried']:,}", f"{r['failed']:,}", f"{r['seconds']:.0f}")
            for r in rows
        ]
    else:
        title, machine = (
            result["title"],
            _machine(facts) + f"; commit {commit}{' with changes' * bool(facts['dirty'])}",
        )
        head, align = "| result | median | low | high | n | unit |", "lrrrrl"
        cells = [
            (r["name"], *(number(r[k]) for k in ("value", "low", "high")), r["n"], r["unit"])
            for r in rows
        ]
    lines = [f"## {title}", "", f"{machine}; `{facts['command']}`; file `{source}`", ""]
    lines += markdown_table(head, align, cells)
    if claims:
        wanted = [f"{'at most ' * c.get('at_most', False)}{number(c['wanted'])}" for c in claims]
        mets = ["yes" if c["met"] else "**no**" for c in claims]
        reached = [
            (c["claim"], number(c["measured"]), w, m)
            for c, w, m in zip(claims, wanted, mets, strict=True)
        ]
        lines += ["", *markdown_table("| must reach | measured | wanted | met |", "lrrl", reached)]
    return "\n".join(lines) + "\n"


def _machine(facts: dict[str, Any]) -> str:
    machine = facts["gpu_name"] or f"{facts['cpu_name']}, {facts['num_cpus']} cores, no GPU"
    if facts["gpu_power_limit_w"]:
        limit_w, driver, cuda = facts["gpu_power_limit_w"], facts["gpu_driver"], facts["cuda"]
        machine += f", power limit {limit_w:.0f} W, driver {driver}, CUDA {cuda}"
    versions = ", ".join(
        f"{name} {facts[name.lower()]}" for name in ("torch", "triton", "DALI", "Python")
    )
    return f"{machine}; {versions}; allocator: {facts['allocator']}"


def markdown_table(head: str, align: str, rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a table: its first one as given, `align` of an l or r a column."""
    texts = [[str(value).replace("|", "\\|") for value in row] for row in rows]
    body = ("".join(f"| {text} " if text else "| " for text in row) + "|" for row in texts)
    return [head, f"|{'|'.join('--:' if a == 'r' else '---' for a in align)}|", *body]


def number(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
