"""Spans, the traced pass and its tables on the real step, and events as a GPU's would be."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from engine.config import RunConfig, override
from engine.data.records import Records
from engine.meters import span, tracing
from engine.train.session import Session, open_session
from engine.world import World
from tests.conftest import FAST_PRECISION, Command, assert_refused
from tools.measure import trace
from tools.measure.steps import endless


@pytest.fixture
def session(small: Records, world: World) -> Session:
    return open_session(override(RunConfig(), {"global_batch": 32}, "test"), small, world)


def test_spans_are_free_unless_traced() -> None:
    with torch.profiler.profile() as profiler:
        assert span("copy") is span("forward")
        with span("copy"), tracing(), span("forward"):
            pass
    assert [e.name for e in profiler.events() if e.name in trace.STAGES] == ["forward"]
    assert span("copy") is span("forward"), "tracing went on"


@pytest.mark.parametrize(
    "settings", [{}, {"data.feed": "resident", "step.steps_per_launch": 2, "step.accumulate": 2}]
)
def test_stages_make_up_the_wall(small: Records, world: World, settings: dict[str, Any]) -> None:
    config = override(RunConfig(), {"global_batch": 32} | settings, "test")
    traced = trace.traced(open_session(config, small, world), 4)
    ms = trace.stages(traced, world.device)
    assert list(ms) == [*trace.STAGES, "launch_gap"]
    assert ms.pop("all_reduce") == 0 and all(value > 0 for value in ms.values())
    assert sum(ms.values()) == pytest.approx(traced.wall_ms)
    assert ms["backward"] > ms["copy"]
    num_forward = sum(e.name == "forward" for e in traced.profiler.events())
    assert num_forward == traced.num_steps * config.step.accumulate


def test_graphs_are_set_aside_and_come_back(session: Session) -> None:
    def graph() -> None:
        raise AssertionError("a captured launch was traced")

    graphs: Any = {1: graph}
    session.step._graphs = graphs
    assert trace.stages(trace.traced(session, 1), session.world.device)["forward"] > 0
    assert session.step._graphs is graphs
    with pytest.raises(AssertionError, match="captured"):
        next(endless(session))


def test_the_launches_of_the_same_step_on_a_gpu_are_told(session: Session) -> None:
    (line,) = trace._launches(session)
    assert "counted, not measured" in line and "launches and moves" in line, line


def test_operators_carry_the_profilers_flops(session: Session) -> None:
    traced = trace.traced(session, 3, detailed=True)
    frame = trace.operators(traced, torch.device("cpu"))
    assert frame["ms"].is_monotonic_decreasing and 0.3 < frame["share_fraction"].sum() <= 1
    conv2 = frame[frame["shapes"] == "32x32x14x14 64x32x3x3 64"].iloc[0]
    flops = 2 * 9 * 32 * 64 * 14 * 14 * 32
    assert conv2["operator"] == "conv2d" and conv2["calls"] == 1
    assert conv2["tflop_per_s"] * conv2["ms"] * 1e9 == pytest.approx(flops)
    assert frame.loc[frame["operator"] == "cross_entropy_loss", "tflop_per_s"].isna().all(), (
        "scalars are no work"
    )
    known = (frame["tflop_per_s"] * frame["ms"] * 1e9).sum()
    whole = 32 * 25.1e6  # forward and both gradients of the network, a multiply-add counted twice
    assert flops < known < whole, "backward of convolutions is not told by the profiler"


def test_the_command_leaves_a_trace_and_tables_of_two_ranks(
    command: Command, small_dir: Path, tmp_path: Path
) -> None:
    words = ("torchrun", "--standalone", "--nproc-per-node=2", "-m", "tools.profile", "trace")
    flags = (
        "--data",
        small_dir,
        "--steps",
        2,
        "--batch-size",
        16,
        "--out",
        tmp_path,
        "--device",
        "cpu",
    )
    done = command(*words, "bench_configs/rung_bf16.toml", *flags)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("all_reduce") == 1 and "convolution_backward" in done.stdout
    tree = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    assert {"forward", "backward", "optimiser"} <= {
        event.get("name") for event in tree["traceEvents"]
    }
    assert "traceName" not in tree
    tables = json.loads((tmp_path / "tables.json").read_text())
    assert tables["effective"]["precision"] == FAST_PRECISION and tables["launch_gaps"] is None
    assert tables["stage_ms"]["all_reduce"] > 0 and tables["stage_ms"]["backward"] > 0
    assert list(pd.read_csv(tmp_path / "operators.csv")["operator"]) == [
        row["operator"] for row in tables["operators"]
    ]
    stages = pd.read_csv(tmp_path / "stages.csv").set_index("stage")["ms"].to_dict()
    assert stages == pytest.approx(tables["stage_ms"])


def test_a_config_that_is_not_there_is_refused(command: Command, tmp_path: Path) -> None:
    assert_refused(command("tools/profile", "trace", tmp_path / "x.toml"), "x.toml: cannot be read")


def event(name: str, start: float, end: float, on_device: bool = False, **more: Any) -> Any:
    kinds = torch._C._autograd.DeviceType
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    rest = {
        "kernels": [],
        "cpu_parent": None,
        "cpu_children": [],
        "input_shapes": [],
        "flops": 0,
    } | more
    kind = kinds.CUDA if on_device else kinds.CPU
    return SimpleNamespace(
        name=name, time_range=span, device_type=kind, is_user_annotation=False, **rest
    )


def test_kernels_of_a_device_go_to_the_span_that_launched_them() -> None:
    """As on a GPU: kernels run after their launch, on two streams, some from autograd's thread."""

    def kernel(name: str, us: float) -> Any:
        return SimpleNamespace(name=name, duration=us)

    triton = event("forward", 0, 100, kernels=[kernel("fused_conv", 500), kernel("forward", 900)])
    events = [
        triton,
        event("backward", 100, 300),
        event("aten::mm", 150, 160, kernels=[kernel("gemm", 1000)]),
        event("nccl", 200, 210, kernels=[kernel("ncclDevKernel_AllReduce", 2000)]),
        event("aten::add", 400, 410, kernels=[kernel("counter", 5)]),
        event("fused_conv", 1000, 1500, on_device=True),
        event("gemm", 2000, 3000, on_device=True),
        event("ncclDevKernel_AllReduce", 2500, 4500, on_device=True),
        event("Memcpy", 2600, 2700, on_device=True),
        event("counter", 4600, 4605, on_device=True),
    ]
    annotation = event("forward", 0, 9000, on_device=True)
    annotation.is_user_annotation = True
    profiler: Any = SimpleNamespace(events=lambda: [*events, annotation])
    traced = trace.Traced(profiler, 1, 5.0, 0.0)
    ms = trace.stages(traced, torch.device("cuda"))
    expected = {
        "copy": 0,
        "forward": 0.5,
        "backward": 1,
        "all_reduce": 2,
        "optimiser": 0,
        "launch_gap": 1.995,
    }
    assert ms == pytest.approx(expected)
    gaps = trace.launch_gaps(traced)
    assert gaps and (gaps["num_per_step"], gaps["median_us"]) == (2, 300)
    frame = trace.operators(traced, torch.device("cuda")).set_index("operator")
    assert frame["ms"].to_dict() == pytest.approx(
        {"nccl": 2, "mm": 1, "forward": 0.5, "add": 0.005}
    )
    assert frame.loc["forward", "kernels"] == "fused_conv"
