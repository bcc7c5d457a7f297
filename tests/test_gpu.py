"""What only a GPU can show. Run offline by python3 -m tools.gpu; skipped elsewhere."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.config import OptimConfig, RunConfig, StepConfig
from engine.feeds.synthetic import random_batch
from engine.records import Records
from engine.trainer import Session, evaluate, open_session
from engine.world import World, start_world

pytestmark = pytest.mark.gpu
BATCH = 32


@pytest.fixture
def gpu_world() -> Iterator[World]:
    with start_world("cuda") as world, world.on_stream():
        yield world


def session(records: Records, world: World, feed: Any = "resident", **step: Any) -> Session:
    config = RunConfig(optim=OptimConfig(learning_rate=2e-3), step=StepConfig(**step), global_batch=BATCH, epochs=4)
    return open_session(replace(config, data=replace(config.data, feed=feed)), records, world)


def losses(opened: Session, num_epochs: int = 3) -> list[float]:
    found = []
    for epoch in range(num_epochs):
        for batch in opened.feed.batches(epoch):
            opened.step.train(batch)
            found.append(opened.step.take_sums(training=True)[0])
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_graph_trains_as_the_eager_step(precision: str, small: Records, gpu_world: World) -> None:
    eager = session(small, gpu_world, precision=precision)
    wanted, wanted_evaluation = losses(eager), evaluate(eager, "val")
    eager.close()
    graph = session(small, gpu_world, precision=precision, cuda_graphs=True)
    assert graph.effective["cuda_graphs"], graph.notes
    found, evaluation = losses(graph), evaluate(graph, "val")
    assert found == pytest.approx(wanted, rel=1e-3 if precision == "fp32" else 2e-2)
    assert evaluation[0] == pytest.approx(wanted_evaluation[0], rel=5e-2)
    assert wanted[-1] < 0.6 * wanted[0], "the loss must fall, or equality shows nothing"
    assert int(graph.step.step_index) == len(found)
    graph.close()


@pytest.mark.parametrize("graphs", [False, True])
def test_warm_up_and_capture_change_nothing(graphs: bool, small: Records, gpu_world: World) -> None:
    opened = session(small, gpu_world, precision="fp16", cuda_graphs=graphs)
    for values in opened.step.optimizer.state.values():
        assert all(not t.any() for t in values.values() if isinstance(t, torch.Tensor))
    assert int(opened.step.step_index) == 0
    assert opened.step.scaler.state_dict()["scale"] == 65536.0
    opened.close()


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_never_waits_for_the_device(graphs: bool, small: Records, gpu_world: World) -> None:
    opened = session(small, gpu_world, precision="bf16", cuda_graphs=graphs)
    batch = next(opened.feed.batches(0))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            opened.step.train(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    opened.close()


def test_a_graph_refuses_another_batch(small: Records, gpu_world: World) -> None:
    opened = session(small, gpu_world, precision="bf16", cuda_graphs=True)
    with pytest.raises(ValueError, match="was built for"):
        opened.step.train(random_batch(BATCH + 1, (28, 28), 8, gpu_world.device))
    opened.close()


@pytest.mark.parametrize("feed", ["dali", "loader"])
def test_feeds_bring_the_same_batches_to_the_gpu(feed: str, small: Records, gpu_world: World) -> None:
    if feed == "dali":
        pytest.importorskip("nvidia.dali")
    a, b = session(small, gpu_world), session(small, gpu_world, feed)
    for wanted, got in zip(a.feed.batches(1), b.feed.batches(1), strict=True):
        assert torch.equal(wanted.image_BHW, got.image_BHW)
        assert torch.equal(wanted.label_B, got.label_B) and torch.equal(wanted.id_B, got.id_B)
    a.close()
    b.close()
