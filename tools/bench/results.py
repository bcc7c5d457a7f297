"""Result files: the one shape in which benchmarks and the GPU round leave their figures.

A file is JSON: title, command, environment, and rows of {name, value, unit, low, high, n}; value is a median, low and
high are the extremes of n repetitions. Claims are rows of {claim, measured, met}.
"""

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from engine.report import Environment, command_line, write_json


def row(name: str, values: list[float], unit: str) -> dict[str, Any]:
    """A result line from repetitions."""
    return {
        "name": name,
        "value": median(values),
        "unit": unit,
        "low": min(values),
        "high": max(values),
        "n": len(values),
    }


def claim(text: str, measured: float, wanted: float, at_most: bool = False) -> dict[str, Any]:
    """Whether a figure that must be reached was: measured >= wanted, or <=."""
    met = measured <= wanted if at_most else measured >= wanted
    return {"claim": text, "measured": measured, "wanted": wanted, "at_most": at_most, "met": met}


def write_result(
    path: Path, *, title: str, environment: Environment, rows: list[dict[str, Any]], claims: list[dict[str, Any]]
) -> None:
    """Write a result file; its command is this process's, though a child may have measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = asdict(environment) | {"command": command_line()}
    write_json({"title": title, "environment": facts, "rows": rows, "claims": claims}, path)


def to_markdown(result: dict[str, Any], source: str) -> str:
    """A result file as a section of RESULTS.md."""
    facts = result["environment"]
    if "tried" in result["rows"][0]:
        return _reliability(result, facts, source)
    machine = facts["gpu_name"] or f"{facts['cpu_name']}, {facts['num_cpus']} cores, no GPU"
    if facts["gpu_power_limit_w"]:
        machine += (
            f", power limit {facts['gpu_power_limit_w']:.0f} W, driver {facts['gpu_driver']}, CUDA {facts['cuda']}"
        )
    commit = facts["commit"][:12] + (" with changes" if facts["dirty"] else "")
    lines = [
        f"## {result['title']}",
        "",
        f"{machine}; torch {facts['torch']}, triton {facts['triton']}, DALI {facts['dali']}, Python {facts['python']}; "
        f"allocator: {facts['allocator']}; commit {commit}; `{facts['command']}`; file `{source}`",
        "",
        "| result | median | low | high | n | unit |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {_cell(r['name'])} | {number(r['value'])} | {number(r['low'])} | {number(r['high'])} "
            f"| {r['n']} | {_cell(r['unit'])} |"
        )
    if result["claims"]:
        lines += ["", "| must reach | measured | wanted | met |", "|---|--:|--:|---|"]
        for c in result["claims"]:
            met = "yes" if c["met"] else "**no**"
            wanted = f"{'at most ' if c.get('at_most') else ''}{number(c['wanted'])}"
            lines.append(f"| {_cell(c['claim'])} | {number(c['measured'])} | {wanted} | {met} |")
    return "\n".join(lines) + "\n"


def _reliability(result: dict[str, Any], facts: dict[str, Any], source: str) -> str:
    """What `make reliability` left."""
    lines = ["## Reliability of packing and records", ""]
    lines += [f"{facts['cpu_name']}, commit {facts['commit'][:12]}; `{facts['command']}`; file `{source}`", ""]
    lines += ["| row | what is done to them | tried | failed | seconds |", "|---|---|--:|--:|--:|"]
    for r in result["rows"]:
        lines.append(f"| {r['row']} | {_cell(r['what'])} | {r['tried']:,} | {r['failed']:,} | {r['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
