"""One traced pass over steps of training: where a step's time goes, by stage, operator and kernel; a trace to look at.

It runs the very TrainStep and feed of training under torch.profiler, eagerly: a captured graph is one launch without
stages, so graphs are set aside for the pass. The profiler slows the host; throughput is measured elsewhere, untraced.
"""

import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from itertools import islice, pairwise
from math import nan, prod
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
from engine.feeds.build import open_for
from engine.report import write_json
from engine.train.session import Session, open_session
from engine.world import start_world
from tools.measure.steps import endless

STAGES = ("copy", "forward", "backward", "all_reduce", "optimiser")
"""In their order; all but all_reduce are spans of the step."""
ALL_REDUCE = ("gloo:all_reduce", "ncclDevKernel", "ncclKernel")
"""How gloo's on the host and NCCL's kernels are named."""
PRODUCTS = {"aten::conv2d", "aten::mm", "aten::addmm", "aten::bmm"}
READS_ALL = {"conv2d", "convolution_backward", "mm", "addmm", "linear", "relu", "threshold_backward", "max_pool2d",
             "max_pool2d_with_indices_backward", "copy_", "mul_", "sum", "argmax", "cross_entropy_loss"}  # fmt: skip
ITEM_BYTES = {
    "float": 4,
    "double": 8,
    "long int": 8,
    "unsigned char": 1,
    "c10::BFloat16": 2,
    "c10::Half": 2,
}
NUM_UNTRACED, NUM_SHOWN = 3, 20
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
    device, done, wait_s = session.world.device, 0, 0.0
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
                done, wait_s = done + launch.num_steps, wait_s + launch.wait_s
            replace(
                session.world, size=1
            ).synchronize()  # the device alone: a barrier would wait for other ranks
            wall_s = perf_counter() - start
    return Traced(profiler, done, 1000 * wall_s / done, 1000 * wait_s / done)


def stages(trace: Traced, device: torch.device) -> dict[str, float]:
    """Milliseconds a step in copy, forward, backward, all_reduce, optimiser and launch_gap.

    Shares to compare, whose sum is more than the untraced step takes, and no account of a captured graph. On the CPU a
    stage is the host's time in it, copy includes the wait for the feed, and launch_gap is what is left of the wall: the
    host between the stages. On a GPU a stage is the time of the kernels launched in it, and launch_gap the time in
    which the device ran none; all_reduce may overlap with the others there.
    """
    events = trace.profiler.events()
    on_gpu = device.type == "cuda"
    total_us = _kernels_us(events) if on_gpu else _host_us(events)
    found = {name: us / 1000 / trace.num_steps for name, us in total_us.items()}
    if on_gpu:
        busy_us = sum(end - start for start, end in device_ranges_us(events))
        return found | {"launch_gap": max(trace.wall_ms - busy_us / 1000 / trace.num_steps, 0.0)}
    found["copy"] += trace.wait_ms
    found["backward"] = max(
        found["backward"] - found["all_reduce"], 0.0
    )  # one bucket, and backward waits for it
    return found | {"launch_gap": max(trace.wall_ms - sum(found.values()), 0.0)}


def _host_us(events: Any) -> dict[str, float]:
    total_us = dict.fromkeys(STAGES, 0.0)
    for event in events:
        name = "all_reduce" if event.name.startswith(ALL_REDUCE) else event.name
        if name in STAGES:
            total_us[name] += event.time_range.elapsed_us()
    return total_us


def _kernels_us(events: Any) -> dict[str, float]:
    """Each kernel's time goes to the span in which the host launched it: autograd's thread launches, too."""
    total_us = dict.fromkeys((*STAGES, ""), 0.0)
    spans = [(e.time_range, e.name) for e in events if e.name in STAGES and e.device_type != _CUDA]
    for event in events:
        if kernels := _kernels([event]):
            at = event.time_range.start
            stage = next((name for inside, name in spans if inside.start <= at <= inside.end), "")
            for kernel in kernels:
                total_us["all_reduce" if kernel.name.startswith(ALL_REDUCE) else stage] += (
                    kernel.duration
                )
    total_us.pop("")  # between the stages: counters and logs
    return total_us


def device_ranges_us(events: Any) -> list[tuple[float, float]]:
    """When the device was busy: start and end of each stretch in which kernels or copies ran without a pause."""
    kernels = [e.time_range for e in events if e.device_type == _CUDA and not e.is_user_annotation]
    merged: list[tuple[float, float]] = []
    for start, end in sorted((kernel.start, kernel.end) for kernel in kernels):
        if merged and start <= merged[-1][1]:
            start, end = merged[-1][0], max(merged.pop()[1], end)
        merged.append((start, end))
    return merged


def operators(trace: Traced, device: torch.device) -> pd.DataFrame:
    """A row for each outermost operator and its input shapes, the slowest first, figures of a step.

    Time is the host's on the CPU, the kernels' on a GPU, children included; shares are of the wall. tflop_per_s rests
    on the profiler's FLOPs. The inputs' bytes are an estimate from shapes and dtypes: outputs and caches are not in
    it, and it is NaN for views, lists and operators that read a part of their input.
    """
    events = [e for e in trace.profiler.events() if e.device_type != _CUDA]
    rows = [_operator(e, device.type == "cuda") for e in events if _is_counted(e)]
    groups = pd.DataFrame(rows).groupby(["operator", "shapes", "kernels"], as_index=False)
    frame = groups.agg(
        calls=("ms", "size"),
        ms=("ms", "sum"),
        flops=("flops", "sum"),
        input_mb_estimate=("mb", "first"),
    )
    frame = frame[frame["ms"] > 0].sort_values("ms", ascending=False, ignore_index=True)
    mb, flops = frame["input_mb_estimate"] * frame["calls"], frame.pop("flops")
    frame["gb_per_s_estimate"] = mb / frame["ms"]
    frame["tflop_per_s"] = flops.where(flops > 0) / frame["ms"] / 1e9
    frame[["calls", "ms"]] /= trace.num_steps
    frame.insert(5, "share_fraction", frame["ms"] / trace.wall_ms)
    return frame


def _is_counted(event: Any) -> bool:
    """Outermost operators, and what launches kernels itself outside of one (a Triton kernel's own function)."""
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
    mb: float


def _operator(event: Any, on_gpu: bool) -> Operator:
    inside = list(_inside(event)) if event.name.startswith("aten::") else [event]
    kernels = _kernels(inside)
    us = sum(kernel.duration for kernel in kernels) if on_gpu else event.time_range.elapsed_us()
    names = dict.fromkeys(kernel.name for kernel in kernels)
    shapes = " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)
    name = event.name.removeprefix("aten::")
    return Operator(name, shapes, "; ".join(names), us / 1000, _flops(event), _input_mb(event))


def _inside(event: Any) -> Iterator[Any]:
    yield event
    for child in event.cpu_children:
        yield from _inside(child)


def _kernels(events: list[Any]) -> list[Any]:
    return [kernel for event in events for kernel in event.kernels if kernel.name not in STAGES]


def _flops(event: Any) -> int:
    return (
        event.flops
        if event.name in PRODUCTS
        else sum(_flops(child) for child in event.cpu_children)
    )


def _input_mb(event: Any) -> float:
    """NaN for an operator that may return a view, or reads a part of its inputs, or lists of tensors."""
    if event.name.removeprefix("aten::") not in READS_ALL:
        return nan
    tensors = zip(event.input_shapes, getattr(event, "input_dtypes", None) or (), strict=False)
    return (
        sum(prod(shape) * ITEM_BYTES.get(dtype, nan) for shape, dtype in tensors if shape) / 1e6
        or nan
    )


def trace_config(
    config: RunConfig, num_steps: int, take_out: Callable[[], Path], device: str
) -> str:
    """Trace steps of a configuration; the text to print, empty on ranks other than 0. See `write_trace`.

    Args:
        take_out: takes the folder for the files; called on rank 0 only.
    """
    with start_world(device) as world, world.on_stream():
        records = open_for(config.data, config.data.path or ensure_sample())
        out = world.first(take_out)
        with closing(open_session(config, records, world)) as session:
            return write_trace(session, num_steps, out)


def write_trace(session: Session, num_steps: int, out: Path | None) -> str:
    """Trace steps and write OUT/trace.json.gz (Perfetto, chrome://tracing), operators.csv, stages.csv, tables.json.

    On a GPU also memory.pickle, torch's memory snapshot for pytorch.org/memory_viz: written by torch, never read here.

    Args:
        out: None on ranks other than 0, which write nothing.
    Returns:
        The tables as text.
    """
    device, history = session.world.device, session.world.device.type == "cuda"
    if history:
        torch.cuda.memory._record_memory_history(
            context=None
        )  # no stacks: they hold the user's folders
    trace = traced(session, num_steps, detailed=True)
    if out is None:
        return ""
    ms = stages(trace, device)
    stage_frame = pd.DataFrame({"stage": ms.keys(), "ms": ms.values()})
    stage_frame["share_fraction"] = stage_frame["ms"] / trace.wall_ms
    operator_frame, gaps = operators(trace, device), launch_gaps(trace)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if history:
            torch.cuda.memory._dump_snapshot(str(out / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        _write_chrome_trace(trace.profiler, out / "trace.json.gz")
        write_file(out / "operators.csv", operator_frame.to_csv(index=False).encode())
        write_file(out / "stages.csv", stage_frame.to_csv(index=False).encode())
        circumstances = {"environment": asdict(session.environment), "effective": session.effective}
        figures = {
            "notes": session.notes,
            "num_steps": trace.num_steps,
            "wall_ms": trace.wall_ms,
            "stage_ms": ms,
        }
        rows = operator_frame.astype(object).where(operator_frame.notna(), None).to_dict("records")
        write_json(
            circumstances | figures | {"launch_gaps": gaps, "operators": rows}, out / "tables.json"
        )
    place = f"written: {out / 'trace.json.gz'} (open it at ui.perfetto.dev), tables beside it\n"
    return "\n\n".join([*_shown(stage_frame, operator_frame, gaps, trace), place])


def launch_gaps(trace: Traced) -> dict[str, float] | None:
    """Pauses between kernels: how many a step, their median and 90th percentile; None where no device was traced."""
    busy = device_ranges_us(trace.profiler.events())
    gap_us = np.array([after[0] - before[1] for before, after in pairwise(busy)])
    if not len(gap_us):
        return None
    p50, p90 = np.percentile(gap_us, [50, 90])
    return {
        "num_per_step": len(gap_us) / trace.num_steps,
        "median_us": float(p50),
        "p90_us": float(p90),
    }


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
    lines = [
        f"{trace.num_steps} steps, traced and eager: {trace.wall_ms:.2f} ms a step, slower than untraced"
    ]
    lines += [
        frame.to_string(index=False, float_format="{:.3g}".format, na_rep="")
        for frame in (stage_frame, top)
    ]
    if gaps:
        pauses = "{num_per_step:.0f} pauses between kernels a step, median {median_us:.1f} us, p90 {p90_us:.1f} us"
        lines.append(pauses.format(**gaps))
    return lines
