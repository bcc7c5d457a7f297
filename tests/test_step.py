"""The network, the optimiser and the step: exact where they can be, else within tolerances."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import NETWORK_NAMES, ModelConfig, OptimConfig, RunConfig, StepConfig
from engine.data.records import Records
from engine.feeds.batch import Batch
from engine.feeds.resident import ResidentFeed
from engine.feeds.synthetic import random_batch
from engine.models import NETWORKS, make_model
from engine.order import PADDING_ID, Order
from engine.train.backends import (
    CONV_BACKWARD,
    compile_arguments,
    has_conv_backward,
    use_backends,
)
from engine.train.capture import check_like
from engine.train.optim import lr_table, make_optimizer
from engine.train.session import open_session
from engine.train.step import TrainStep
from engine.world import World

GOLDEN = Path(__file__).with_name("golden_losses.json")
CPU = torch.device("cpu")


def build(world: World, config: RunConfig, num_steps: int = 20, num_classes: int = 8) -> TrainStep:
    """A step of batch 32 in a run of one epoch of `num_steps`."""
    model = make_model(config.model, 28, 28, num_classes, seed=1)
    order = Order(num_samples=num_steps * 32, global_batch=32)
    static = random_batch(32 * config.step.steps_per_launch, (28, 28), num_classes, CPU)
    return TrainStep(model, replace(config, epochs=1), order, static, world)


def make_step(
    world: World, num_steps: int = 20, learning_rate: float = 2e-3, **step: Any
) -> TrainStep:
    return build(
        world,
        RunConfig(optim=OptimConfig(learning_rate=learning_rate), step=StepConfig(**step)),
        num_steps,
    )


def losses(step: TrainStep, records: Records, num_steps: int = 20) -> list[float]:
    split = records.split("train")
    feed = ResidentFeed(split, Order(num_samples=len(split), global_batch=32, seed=1), CPU)
    found: list[float] = []
    for epoch in range(num_steps):
        for batch in feed.batches(epoch):
            if len(found) == num_steps:
                return found
            step.train(batch)
            found.append(step.read_training().loss)
    raise AssertionError("too few batches")


def test_the_baseline_is_the_studys_network() -> None:
    model = make_model(ModelConfig(name="baseline"), 28, 28, 94, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 432_478


def test_relu_after_the_pool_changes_no_bit() -> None:
    results = []
    for name in ("baseline", "fast"):
        model = make_model(ModelConfig(name=name), 28, 28, 94, seed=0)
        image = random_batch(64, (28, 28), 94, CPU).image_BHW
        logits = model(image)
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_name_in_the_config_is_a_network() -> None:
    assert tuple(NETWORKS) == NETWORK_NAMES


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    a = make_model(ModelConfig(), 28, 28, 94, seed=3)
    assert torch.equal(torch.rand(1), first), "the global random state was touched"
    b = make_model(ModelConfig(), 28, 28, 94, seed=3)
    c = make_model(ModelConfig(), 28, 28, 94, seed=4)
    assert torch.equal(a.fc1.weight, b.fc1.weight) and not torch.equal(a.fc1.weight, c.fc1.weight)


def test_one_cycle_rises_to_the_highest_rate_and_falls_to_almost_zero() -> None:
    table = lr_table(OptimConfig(learning_rate=0.5, warmup_fraction=0.25), 100)
    assert table.dtype == np.float32 and len(table) == 101
    assert table.argmax() == 25 and table.max() == 0.5
    assert (np.diff(table[:26]) > 0).all() and (np.diff(table[25:]) < 0).all()
    assert table[0] == pytest.approx(0.02) and table[100] < 1e-5


def test_biases_are_not_decayed_and_the_moments_remember_as_long_as_they_are_told() -> None:
    model = make_model(ModelConfig(), 28, 28, 94, seed=0)
    groups = make_optimizer(
        OptimConfig(weight_decay=0.1, beta2=0.97), model, torch.ones(()), capturable=False
    ).param_groups
    assert all(group["betas"] == (0.9, 0.97) for group in groups)
    assert [(g["weight_decay"], {p.dim() > 1 for p in g["params"]}) for g in groups] == [
        (0.1, {True}),
        (0.0, {False}),
    ]


def test_golden_losses(small: Records, world: World, one_thread: None) -> None:
    """20 steps, fp32, one thread. Delete the file to renew it if training is meant to change."""
    step = make_step(world, channels_last=False)
    found = losses(step, small)
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{GOLDEN.name} was missing and is written anew; look at it and commit it")
    assert found == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-5)
    assert found[-1] < 0.6 * found[0]


@pytest.mark.parametrize(
    ("switches", "tolerance"),
    [({"channels_last": True}, 1e-4), ({"precision": "bf16"}, 0.05)],
)
def test_every_switch_is_the_same_training(
    switches: dict[str, Any], tolerance: float, small: Records, world: World
) -> None:
    num_steps = 6
    wanted = losses(make_step(world, channels_last=False), small, num_steps)
    assert losses(make_step(world, **switches), small, num_steps) == pytest.approx(
        wanted, rel=tolerance
    )


@pytest.fixture
def fp32_kept() -> Any:
    """The process's own switches, put back at the end."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def test_each_steps_switches_hold_in_its_turn(world: World, fp32_kept: None) -> None:
    first = make_step(world, cudnn_benchmark=True)
    assert torch.backends.cudnn.benchmark
    make_step(world)
    assert not torch.backends.cudnn.benchmark, "off where nobody asks for it, as in parity"
    first.use_backends()
    assert torch.backends.cudnn.benchmark


def test_a_session_puts_back_what_it_switched(
    small: Records, world: World, fp32_kept: None
) -> None:
    torch.backends.cudnn.benchmark = True
    config = RunConfig(global_batch=32)
    with closing(open_session(config, small, world)):
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark


def test_the_compiler_gets_each_switch(fp32_kept: None) -> None:
    """By its mode or by that mode's options; torch refuses a name that it does not know."""
    config = torch._dynamo.config
    before = config.optimize_ddp
    try:
        for whole in (True, False):
            use_backends(StepConfig(compile="default", split_under_ddp=not whole))
            assert config.optimize_ddp is not whole
    finally:
        config.optimize_ddp = before
    plain = StepConfig(compile="max-autotune")
    assert compile_arguments(plain)["mode"] == "max-autotune-no-cudagraphs"
    if not has_conv_backward():
        pytest.skip("this torch's inductor cannot write convolution gradients")
    step = StepConfig(compile="max-autotune", triton_conv_backward=True)
    wrapper = torch._TorchCompileInductorWrapper(None, compile_arguments(step)["options"], False)
    assert all(wrapper.config[name] == "ATEN,TRITON" for name in CONV_BACKWARD)
    assert wrapper.config["max_autotune"], "the mode's own options stay"


@pytest.mark.parametrize("precisions", [("fp32", "tf32"), ("tf32", "bf16")])
def test_steps_of_two_precisions_cannot_mix(
    precisions: tuple[str, str], world: World, fp32_kept: None
) -> None:
    """The later one's is the process's; the earlier one refuses to go on until it takes it back."""
    first, second = (make_step(world, precision=precision) for precision in precisions)
    batch = random_batch(32, (28, 28), 8, CPU)
    second.train(batch)
    for refused in (first.train, first.evaluate):
        with pytest.raises(RuntimeError, match=r"precision .*call use_backends\(\)"):
            refused(batch)
    first.use_backends()
    assert torch.backends.cudnn.allow_tf32 == (precisions[0] == "tf32")
    first.train(batch)
    first.evaluate(batch)
    with pytest.raises(RuntimeError, match="call use_backends"):
        second.train(batch)


def test_channels_last_is_really_used(world: World, small: Records) -> None:
    """With one input channel both layouts have the same strides; conv2 and what follows tell."""
    step = make_step(world)
    seen: list[torch.Tensor] = []
    step.model.conv2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    losses(step, small, 1)
    assert step.model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()


def test_fused_and_plain_optimisers_agree(world: World, small: Records) -> None:
    found = []
    for fused in (True, False):
        config = RunConfig(optim=OptimConfig(fused=fused), step=StepConfig(channels_last=False))
        found.append(losses(build(world, config), small))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_warm_up_changes_nothing(precision: str, world: World, small: Records) -> None:
    cold, warm = make_step(world, precision=precision), make_step(world, precision=precision)
    before = {name: t.clone() for name, t in warm.model.state_dict().items()}
    rng = torch.get_rng_state()
    drawing = warm.model.conv2.register_forward_hook(
        lambda module, inputs, output: output + 0 * torch.rand(1)
    )
    warm.prepare()
    drawing.remove()
    assert all(torch.equal(before[name], t) for name, t in warm.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert warm.scaler.state_dict() == cold.scaler.state_dict()
    assert not warm.counter_21.any() and warm.read_evaluation()[2] == 0
    assert losses(warm, small, 3) == losses(cold, small, 3)


def test_sums_are_the_batches_own(world: World, small: Records) -> None:
    step = make_step(world)
    split = small.split("val")
    feed = ResidentFeed(split, Order(num_samples=len(split), global_batch=32, shuffle=False), CPU)
    padded = 0
    for batch in feed.batches(0):
        padded += int((batch.id_B == PADDING_ID).sum())
        step.evaluate(batch)
    assert padded > 0
    loss, accuracy, seen = step.read_evaluation()
    with torch.no_grad():
        logits = step.model(torch.from_numpy(split.image_NHW))
    label = torch.from_numpy(split.label_N).long()
    assert seen == len(split)
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, label)), rel=1e-5)
    assert accuracy == pytest.approx(float((logits.argmax(1) == label).float().mean()))
    assert step.read_evaluation() == (0.0, 0.0, 0)


def test_the_learning_rate_follows_the_table_at_the_device_counter(
    world: World, small: Records
) -> None:
    step = make_step(world, num_steps=20)
    table = lr_table(OptimConfig(learning_rate=2e-3), 20)
    for number in range(3):
        losses(step, small, 1)
        assert float(step.optimizer.param_groups[0]["lr"]) == table[number]
    step.resume_at(10)
    losses(step, small, 1)
    assert float(step.optimizer.param_groups[0]["lr"]) == table[10]


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimiser_to_be_captured_bakes_nothing_in(fused: bool) -> None:
    """torch captures capturable groups only, fused or not; a float rate would be baked in."""
    model = make_model(ModelConfig(), 28, 28, 8, 0)
    groups = make_optimizer(
        OptimConfig(fused=fused), model, torch.ones(()), capturable=True
    ).param_groups
    assert all(group["capturable"] for group in groups)
    assert (
        isinstance(groups[0]["lr"], torch.Tensor)
        and len({id(group["lr"]) for group in groups}) == 1
    )


@pytest.mark.parametrize("fused", [True, False])
def test_steps_beyond_the_table_keep_its_last_rate(
    fused: bool, world: World, small: Records
) -> None:
    """Profiles run longer than the epochs of their config."""
    config = RunConfig(optim=OptimConfig(fused=fused))
    step = build(world, config, num_steps=2)
    losses(step, small, 5)
    assert float(step.optimizer.param_groups[1]["lr"]) == lr_table(config.optim, 2)[-1]


@pytest.mark.parametrize("fault", ["shape", "dtype", "strides"])
def test_a_batch_of_another_kind_is_refused_with_a_sentence(fault: str) -> None:
    static = random_batch(8, (28, 28), 8, CPU)
    if fault == "shape":
        with pytest.raises(ValueError, match="has shape .* was built for"):
            check_like(random_batch(9, (28, 28), 8, CPU), static)
    if fault == "dtype":
        with pytest.raises(AssertionError, match="uint8"):
            Batch(static.image_BHW.float(), static.label_B, static.id_B)
    if fault == "strides":
        with pytest.raises(ValueError, match="strides"):
            check_like(Batch(static.image_BHW.transpose(1, 2), static.label_B, static.id_B), static)
