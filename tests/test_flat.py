"""FlatAdamW against torch.optim.AdamW: the same numbers, the same state, the same runs."""

from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import OptimConfig, RunConfig, override
from engine.data.records import Records
from engine.errors import UserError
from engine.models import make_model
from engine.train import available
from engine.train import step as step_module
from engine.train.available import effective_config
from engine.train.checkpoint import checkpoint_tensors, load_checkpoint, write_checkpoint
from engine.train.flat import SLOT, FlatAdamW
from engine.train.folder import Manifest, Position
from engine.train.optim import make_optimizer
from engine.train.session import evaluate
from engine.train.step import TrainStep
from engine.world import World
from tests.test_launches import assert_same, session
from tests.test_launches import trained as left_by
from tests.test_step import build, losses

STEPS = 25
OPTIM = OptimConfig(weight_decay=0.1, beta2=0.97)


def twins(channels_last: bool = True) -> list[tuple[Any, torch.optim.Optimizer, torch.Tensor]]:
    """(model, optimiser, its learning rate), flat and torch's fused one, from the same weights."""
    found = []
    for flat in (True, False):
        model = make_model(RunConfig().model, 9, 7, 5, seed=0)
        model.conv1.requires_grad_(False)
        if channels_last:
            model.use_channels_last()
        rate = torch.zeros(())
        found.append((model, make_optimizer(OPTIM, model, rate, capturable=False, flat=flat), rate))
    return found


def trained(pairs: list[Any], num_steps: int, seed: int = 0) -> None:
    """Gradients of many sizes, the same for both, at rates that change."""
    drawn = torch.Generator().manual_seed(seed)
    for number in range(num_steps):
        gradients: list[torch.Tensor] = []
        for model, optimizer, rate in pairs:
            rate.fill_(1e-3 * (1 + number % 5))
            chosen = [p for p in model.parameters() if p.requires_grad]
            if not gradients:
                sizes = 10.0 ** torch.randint(-6, 2, (len(chosen),), generator=drawn)
                gradients = [
                    size * torch.randn(p.shape, generator=drawn)
                    for size, p in zip(sizes.tolist(), chosen, strict=True)
                ]
            for p, gradient in zip(chosen, gradients, strict=True):
                p.grad = torch.empty_like(p).copy_(gradient)
            optimizer.step()


def tensors_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in model.named_parameters():
        found[name] = p.detach()
        found |= {f"{name}/{key}": value for key, value in optimizer.state[p].items()}
    return found


def farthest(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Units in the last place of the tensor's typical number, or of the number if it is larger."""
    assert got.keys() == wanted.keys()
    most = 0.0
    for name, tensor in wanted.items():
        one = torch.finfo(torch.float32).eps * tensor.abs().clamp(min=float(tensor.abs().mean()))
        most = max(most, float(((got[name] - tensor).abs() / one.clamp(min=1e-38)).max()))
    return most


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_steps_are_those_of_torchs_fused_adamw(channels_last: bool) -> None:
    pairs = twins(channels_last)
    start = pairs[0][0].fc2.weight.detach().clone()
    trained(pairs, STEPS)
    got, wanted = (tensors_of(model, optimizer) for model, optimizer, _ in pairs)
    assert farthest(got, wanted) <= 2
    assert float(got["fc2.weight/step"]) == STEPS
    assert not torch.equal(start, got["fc2.weight"])


def test_every_parameter_lies_aligned_in_one_buffer_as_it_did() -> None:
    (model, optimizer, _), (twin, _, _) = twins()
    buffer = optimizer._flat.param_P  # type: ignore[attr-defined]
    first = buffer.data_ptr()
    trained_ones = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained_ones:
        place = parameter.data_ptr() - first
        assert place % (4 * SLOT) == 0 and 0 <= place < 4 * buffer.numel()
    assert model.conv1.weight.untyped_storage().data_ptr() != first, "what is frozen is no part"
    for got, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(got, wanted) and got.stride() == wanted.stride()


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, "found before"])
def test_what_is_not_finite_leaves_everything_as_it_was(fault: float | str) -> None:
    pairs = twins()[:1]
    trained(pairs, 3)
    model, optimizer, _ = pairs[0]
    before = {name: t.clone() for name, t in tensors_of(model, optimizer).items()}
    optimizer.found_inf = torch.full((), float(fault == "found before"))
    if isinstance(fault, float):
        model.fc2.bias.grad[-1] = fault
    optimizer.step()
    assert optimizer.found_inf == 1
    assert farthest(tensors_of(model, optimizer), before) == 0


def test_a_parameter_without_a_gradient_is_refused_with_a_sentence() -> None:
    _, optimizer, _ = twins()[0]
    with pytest.raises(UserError, match=r"shape \[64, 32, 3, 3\] has no gradient.*freeze"):
        optimizer.step()


@pytest.mark.parametrize("first", ["flat", "torch"])
def test_each_takes_the_others_state(first: str) -> None:
    """Of a state dict; then both go on as one would."""
    pairs = twins() if first == "flat" else twins()[::-1]
    (model, optimizer, _), (other_model, other, _) = pairs
    trained(pairs[:1], 5)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(deepcopy(optimizer.state_dict()))  # as from a file: torch shares
    got, wanted = tensors_of(other_model, other), tensors_of(model, optimizer)
    assert farthest(got, wanted) == 0 and float(got["fc1.bias/step"]) == 5
    for _, each, rate in pairs:
        for group in each.param_groups:
            group["lr"] = rate
    trained(pairs, 5, seed=1)
    got, wanted = tensors_of(other_model, other), tensors_of(model, optimizer)
    assert 0 < farthest(got, wanted) <= 2 and float(got["fc1.bias/step"]) == 10


def flat_step(world: World, num_steps: int = 20, **step: Any) -> TrainStep:
    """As a GPU would train, the kernel's reference in the kernel's place."""
    settings = {"optim.learning_rate": 2e-3, "kernels": ["adamw"]}
    settings |= {f"step.{name}": value for name, value in step.items()}
    return build(world, override(RunConfig(), settings, "test"), num_steps)


def plain_step(world: World, **step: Any) -> TrainStep:
    settings = {"optim.learning_rate": 2e-3} | {f"step.{name}": v for name, v in step.items()}
    return build(world, override(RunConfig(), settings, "test"))


Maker = Callable[..., TrainStep]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_trains_as_torchs(precision: str, world: World, small: Records) -> None:
    flat, plain = flat_step(world, precision=precision), plain_step(world, precision=precision)
    assert isinstance(flat.optimizer, FlatAdamW)
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    assert losses(flat, small, 8) == pytest.approx(losses(plain, small, 8), rel=tolerance)


def test_several_steps_in_a_launch_change_no_bit(
    small: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From warm-up, whose traces are put back, to the end, through the run's own session."""
    monkeypatch.setattr(available, "cannot_fuse", lambda device: "")
    found = []
    for steps_per_launch in (1, 3):
        settings = {"kernels": ["adamw"], "step.steps_per_launch": steps_per_launch}
        opened = session(small, world, settings)
        assert isinstance(opened.step.optimizer, FlatAdamW)
        found.append(left_by(opened))
    assert_same(*found)


@pytest.mark.parametrize(
    ("fused", "num_shadows"),
    [
        ((), 8),
        (("conv_pool_relu", "bias_pool_relu"), 5),
        (("conv2_pool_relu", "linear_cross_entropy"), 4),
    ],
)
def test_shadows_are_autocasts_casts_to_the_bit(
    fused: tuple[str, ...],
    num_shadows: int,
    small: Records,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same sessions, with shadows and with autocast's casts."""
    monkeypatch.setattr(available, "cannot_fuse", lambda device: "")
    monkeypatch.setattr(available, "has_fast_bf16", lambda device: True)
    found = []
    for why in ("", "not now"):
        monkeypatch.setattr(step_module, "why_not_rounded", lambda config, size, why=why: why)
        opened = session(small, world, {"kernels": [*fused, "adamw"], "step.precision": "bf16"})
        with closing(opened):
            step = opened.step
            for _ in step.train_epoch(opened.feed, 0):
                pass
            assert len(step.objective.rounded) == (0 if why else num_shadows)
            left = tensors_of(step.model, step.optimizer) | step.gradients()
            loss = torch.from_numpy(step.read_training().loss_S)
            accuracy = torch.tensor(evaluate(opened, "val"))
            found.append(
                {k: t.clone() for k, t in (left | {"loss": loss, "val": accuracy}).items()}
            )
    assert [name for name, t in found[1].items() if not torch.equal(found[0][name], t)] == []
    assert found[0]["loss"][-1] < found[0]["loss"][0]


def test_bf16_says_why_it_keeps_no_shadows(
    small: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "cannot_fuse", lambda device: "")
    monkeypatch.setattr(available, "has_fast_bf16", lambda device: True)
    common = {"kernels": ["adamw"], "step.precision": "bf16"}
    two = replace(world, size=2)
    for settings, here, wanted in (
        ({}, world, ""),
        ({"step.accumulate": 2}, world, "a batch is computed in parts"),
        ({}, two, "several ranks add their gradients in fp32"),
    ):
        config = override(RunConfig(global_batch=32), common | settings, "test")
        notes = " ".join(effective_config(config, small, here)[1])
        assert ("cast to bf16 in each step" in notes) == bool(wanted) and wanted in notes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("makers", [(flat_step, plain_step), (plain_step, flat_step)])
def test_runs_go_back_and_forth(
    makers: tuple[Maker, Maker], precision: str, small: Records, world: World, tmp_path: Path
) -> None:
    """A checkpoint of one, read by the other and by itself: the same bits, the same training."""
    first, other, again = (make(world, precision=precision) for make in (*makers, makers[0]))
    losses(first, small, 4)
    manifest = Manifest(
        training={}, dataset_fingerprint="", position=Position(), scaler={}, sha256={}
    )
    live = checkpoint_tensors(first.state).items()
    files = {name: first.state.in_files(tensors) for name, tensors in live}
    write_checkpoint(tmp_path, manifest, files)
    for step in (other, again):
        step.prepare()
        load_checkpoint(tmp_path, step.state)
        step.resume_at(4)
        assert farthest(*(tensors_of(s.model, s.optimizer) for s in (step, first))) == 0
    wanted = losses(first, small, 4)
    assert losses(again, small, 4) == wanted
    assert losses(other, small, 4) == pytest.approx(
        wanted, rel=1e-5 if precision == "fp32" else 1e-2
    )


def test_the_scaler_of_fp16_skips_the_same_steps() -> None:
    """It reads nothing on the host; both halve the scale and leave the step out."""
    pairs = twins()
    for model, optimizer, rate in pairs:
        rate.fill_(1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(()))
        for number in range(4):
            for p in model.parameters():
                scale = float(scaler.get_scale()) * (torch.inf if number == 2 else 1)
                p.grad = torch.full_like(p, 1e-3 * scale) if p.requires_grad else None
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 512 and optimizer.state[model.fc2.bias]["step"] == 3
    got, wanted = (tensors_of(model, optimizer) for model, optimizer, _ in pairs)
    assert farthest(got, wanted) <= 2


def test_another_optimiser_leaves_it_off(
    small: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    settings = {"kernels": "all", "optim.name": "adam"}
    config, notes = effective_config(override(RunConfig(), settings, "test"), small, world)
    assert "adamw" not in config.kernels
    assert "the kernel adamw is not used: the optimiser is adam" in notes
