"""One traced pass over steps of training: where a step's time goes, and a trace to look at.

It tells by stage, operator and kernel. It runs the very TrainStep and feed of training under
torch.profiler, eagerly: a captured graph is one launch without stages, so graphs are set aside for
the pass. The profiler slows the host; throughput is measured elsewhere, untraced.
"""

import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from engine import meters
from engine.config import RunConfig
from engine.data.sample import ensure_sample
from engine.durable import write_file, writing
from engine.errors import first_cause, sentence
from engine.feeds.build import open_for
from engine.report import write_json
from engine.train.session import Session, open_session
from engine.world import start_world
from tools.measure.ledger import in_words
from tools.measure.steps import endless

STAGES = ("copy", "forward", "backward", "all_reduce", "optimiser")
"""In their order; all but all_reduce are spans of the step."""
ALL_REDUCE = ("gloo:all_reduce", "ncclDevKernel", "ncclKernel")
"""How gloo's on the host and NCCL's kernels are named."""
PRODUCTS = {"aten::conv2d", "aten::mm", "aten::addmm", "aten::bmm"}
"""Operators whose FLOPs the profiler knows."""
NUM_UNTRACED = 3
NUM_SHOWN = 20
_CUDA = torch._C._autograd.DeviceType.CUDA


class Traced(NamedTuple):
    """What the profiler saw of some steps."""

    profiler: profile
    num_steps: int
    wall_ms: float
    """Of a step."""
    wait_ms: float
    """The host's waiting for the feed, of a step."""


def traced(session: Session, num_steps: int, *, detailed: bool = False) -> Traced:
    """Train at least `num_steps` steps, eagerly, under the profiler; call inside world.on_stream().

    Args:
        detailed: note shapes and FLOPs of operators, too.
    """
    device = session.world.device
    done = 0
    wait_s = 0.0
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with meters.tracing(), ExitStack() as after:
        after.enter_context(session.step.eagerly())
        launches = endless(session)
        for _ in islice(launches, NUM_UNTRACED):
            pass
        session.world.synchronize()
        with profile(
            activities=activities, record_shapes=detailed, with_flops=detailed
        ) as profiler:
            start = perf_counter()
            while done < num_steps:
                launch = next(launches)
                done += launch.num_steps
                wait_s += launch.wait_s
            alone = replace(session.world, size=1)  # a barrier would wait for other ranks
            alone.synchronize()
            wall_s = perf_counter() - start
    return Traced(profiler, done, 1000 * wall_s / done, 1000 * wait_s / done)


def stages(trace: Traced, device: torch.device) -> dict[str, float]:
    """Milliseconds per step in copy, forward, backward, all_reduce, optimiser and launch_gap.

    They are shares to compare: their sum is more than the untraced step takes, and they are no
    account of a captured graph.

    On the CPU a stage is the host's time in it. copy includes the wait for the feed, and launch_gap
    is what is left of the wall: the host between the stages.

    On a GPU a stage is the time of the kernels launched in it, and launch_gap the time in which the
    device ran none. all_reduce may overlap with the others there.
    """
    events = trace.profiler.events()
    on_gpu = device.type == "cuda"
    total_us = _kernels_us(events) if on_gpu else _host_us(events)
    found = {name: us / 1000 / trace.num_steps for name, us in total_us.items()}
    if on_gpu:
        busy_us = sum(end - start for start, end in device_ranges_us(events))
        return found | {"launch_gap": max(trace.wall_ms - busy_us / 1000 / trace.num_steps, 0.0)}
    found["copy"] += trace.wait_ms
    # there is one bucket, and backward waits for it
    found["backward"] = max(found["backward"] - found["all_reduce"], 0.0)
    return found | {"launch_gap": max(trace.wall_ms - sum(found.values()), 0.0)}


def _host_us(events: Any) -> dict[str, float]:
    total_us = dict.fromkeys(STAGES, 0.0)
    for event in events:
        name = "all_reduce" if event.name.startswith(ALL_REDUCE) else event.name
        if name in STAGES:
            total_us[name] += event.time_range.elapsed_us()
    return total_us


def _kernels_us(events: Any) -> dict[str, float]:
    """Each kernel's time in the span in which the host launched it.

    Autograd's thread launches, too: what counts is when, not where.
    """
    total_us = dict.fromkeys((*STAGES, ""), 0.0)
    spans = [(e.time_range, e.name) for e in events if e.name in STAGES and e.device_type != _CUDA]
    for event in events:
        at = event.time_range.start
        stage = next((name for inside, name in spans if inside.start <= at <= inside.end), "")
        for kernel in _kernels([event]):
            is_reduce = kernel.name.startswith(ALL_REDUCE)
            total_us["all_reduce" if is_reduce else stage] += kernel.duration
    total_us.pop("")  # between the stages: counters and logs
    return total_us


def device_ranges_us(events: Any) -> list[tuple[float, float]]:
    """Start and end of each stretch in which kernels or copies ran without a pause."""
    kernels = [e.time_range for e in events if e.device_type == _CUDA and not e.is_user_annotation]
    merged: list[tuple[float, float]] = []
    for start, end in sorted((kernel.start, kernel.end) for kernel in kernels):
        if merged and start <= merged[-1][1]:
            start, end = merged[-1][0], max(merged.pop()[1], end)
        merged.append((start, end))
    return merged


def operators(trace: Traced, device: torch.device) -> pd.DataFrame:
    """A row for each outermost operator and its input shapes, the slowest first, per step.

    Time is the host's on the CPU, the kernels' on a GPU, children included; shares are of the wall.
    tflop_per_s rests on the profiler's FLOPs.
    """
    events = [e for e in trace.profiler.events() if e.device_type != _CUDA]
    rows = [_operator(e, device.type == "cuda") for e in events if _is_counted(e)]
    groups = pd.DataFrame(rows).groupby(["operator", "shapes", "kernels"], as_index=False)
    frame = groups.agg(calls=("ms", "size"), ms=("ms", "sum"), flops=("flops", "sum"))
    frame = frame[frame["ms"] > 0].sort_values("ms", ascending=False, ignore_index=True)
    flops = frame.pop("flops")
    tflop_per_s = flops.where(flops > 0) / frame["ms"] / 1e9
    frame[["calls", "ms"]] /= trace.num_steps
    return frame.assign(share_fraction=frame["ms"] / trace.wall_ms, tflop_per_s=tflop_per_s)


def _is_counted(event: Any) -> bool:
    """Outermost operators, and what launches kernels outside of one: a Triton kernel's function."""
    parent = event.cpu_parent
    while parent and not parent.name.startswith("aten::"):
        parent = parent.cpu_parent
    return not parent and (event.name.startswith("aten::") or bool(_kernels([event])))


class Operator(NamedTuple):
    """One call of an operator, or of a kernel outside of any."""

    operator: str
    shapes: str
    kernels: str
    ms: float
    flops: int


def _operator(event: Any, on_gpu: bool) -> Operator:
    inside = list(_inside(event)) if event.name.startswith("aten::") else [event]
    kernels = _kernels(inside)
    us = sum(kernel.duration for kernel in kernels) if on_gpu else event.time_range.elapsed_us()
    names = dict.fromkeys(kernel.name for kernel in kernels)
    shapes = " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)
    name = event.name.removeprefix("aten::")
    return Operator(name, shapes, "; ".join(names), us / 1000, _flops(event))


def _inside(event: Any) -> Iterator[Any]:
    yield event
    for child in event.cpu_children:
        yield from _inside(child)


def _kernels(events: list[Any]) -> list[Any]:
    return [kernel for event in events for kernel in event.kernels if kernel.name not in STAGES]


def _flops(event: Any) -> int:
    if event.name in PRODUCTS:
        return int(event.flops)
    return sum(map(_flops, event.cpu_children))


def trace_config(
    config: RunConfig, num_steps: int, take_out: Callable[[], Path], device: str
) -> str:
    """Trace steps of a configuration as `write_trace` does; returns the text to print.

    On ranks other than 0 it is empty.

    Args:
        take_out: takes the folder for the files; called on rank 0 only.
    """
    with start_world(device) as world, world.on_stream():
        records = open_for(config.data, config.data.path or ensure_sample())
        out = world.first(take_out)
        with closing(open_session(config, records, world)) as session:
            return write_trace(session, num_steps, out)


def write_trace(session: Session, num_steps: int, out: Path | None) -> str:
    """Trace steps and write OUT/trace.json.gz, operators.csv, stages.csv and tables.json.

    The first is for Perfetto or chrome://tracing. On a GPU there is memory.pickle, too, torch's
    snapshot of its memory for pytorch.org/memory_viz: torch writes it, and nothing here reads it.

    Args:
        out: None on ranks other than 0, which write nothing.
    Returns:
        The tables as text.
    """
    device = session.world.device
    on_gpu = device.type == "cuda"
    if on_gpu:  # without stacks: they hold the user's folders
        torch.cuda.memory._record_memory_history(context=None)
    trace = traced(session, num_steps, detailed=True)
    if out is None:
        return ""
    ms = stages(trace, device)
    stage_frame = pd.DataFrame({"stage": ms.keys(), "ms": ms.values()})
    stage_frame["share_fraction"] = stage_frame["ms"] / trace.wall_ms
    operator_frame = operators(trace, device)
    gaps = launch_gaps(trace)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(out / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        _write_chrome_trace(trace.profiler, out / "trace.json.gz")
        write_file(out / "operators.csv", operator_frame.to_csv(index=False).encode())
        write_file(out / "stages.csv", stage_frame.to_csv(index=False).encode())
        tables = {"stage_ms": ms, "launch_gaps": gaps, "operators": _records(operator_frame)}
        write_json(_circumstances(session, trace) | tables, out / "tables.json")
    place = f"written: {out / 'trace.json.gz'} (open it at ui.perfetto.dev), tables beside it\n"
    shown = _shown(stage_frame, operator_frame, gaps, trace)
    return "\n\n".join([*shown, *_launches(session), place])


def _launches(session: Session) -> list[str]:
    """The line of the ledger, where what was asked for can be counted."""
    config, records = session.requested, session.records
    if config.step.compile != "off" or session.world.size > 1:
        return []
    shape = (*records.height_width, len(records.classes))
    try:
        return [in_words(config, config.global_batch, shape)]
    except Exception as error:  # a network of one's own may do what fake tensors cannot
        return [f"launches are not counted: {sentence(first_cause(error))}"]


def _circumstances(session: Session, trace: Traced) -> dict[str, object]:
    return {
        "environment": asdict(session.environment),
        "effective": session.effective,
        "notes": session.notes,
        "num_steps": trace.num_steps,
        "wall_ms": trace.wall_ms,
    }


def _records(frame: pd.DataFrame) -> list[Any]:
    """The rows of a table for JSON, which has no NaN."""
    return list(frame.astype(object).where(frame.notna(), None).to_dict("records"))


def launch_gaps(trace: Traced) -> dict[str, float] | None:
    """Pauses between kernels: how many per step, their median and 90th percentile.

    None where no device was traced.
    """
    busy = device_ranges_us(trace.profiler.events())
    gap_us = np.array([after[0] - before[1] for before, after in pairwise(busy)])
    if not len(gap_us):
        return None
    p50, p90 = np.percentile(gap_us, [50, 90])
    num_per_step = len(gap_us) / trace.num_steps
    return {"num_per_step": num_per_step, "median_us": float(p50), "p90_us": float(p90)}


def _write_chrome_trace(profiler: profile, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        tree = json.loads(raw.read_bytes())
    tree.pop("traceName", None)  # the path of the file above
    write_file(path, gzip.compress(json.dumps(tree).encode(), mtime=0))


def _shown(
    stage_frame: pd.DataFrame, operator_frame: pd.DataFrame, gaps: Any, trace: Traced
) -> list[str]:
    long = dict.fromkeys(("kernels", "shapes"), r"(.{40}).+")
    top = operator_frame.head(NUM_SHOWN).replace(long, r"\1...", regex=True)
    top = top if top["kernels"].any() else top.drop(columns="kernels")
    steps = f"{trace.num_steps} steps, traced and eager"
    lines = [f"{steps}: {trace.wall_ms:.2f} ms per step, slower than untraced"]
    for frame in (stage_frame, top):
        lines.append(frame.to_string(index=False, float_format="{:.3g}".format, na_rep=""))
    if gaps:
        spread = "median {median_us:.1f} us, p90 {p90_us:.1f} us"
        lines.append(
            f"{{num_per_step:.0f}} pauses between kernels per step, {spread}".format(**gaps)
        )
    return lines
