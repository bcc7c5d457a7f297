"""Every network: shapes, sizes, training, resume, launches, ranks, and one of the user's own.

As `python -m tests.test_models FOLDER RECORDS` it is one of two ranks.
"""

import re
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import NETWORK_NAMES, ModelConfig, OptimConfig, RunConfig, override
from engine.data.records import Records, open_records
from engine.errors import UserError
from engine.feeds.synthetic import random_batch
from engine.host import ROOT, end_rank
from engine.models import make_model
from engine.models.baseline import FastGlyphNet
from engine.models.pixels import Pixels
from engine.models.residual import ResidualNet
from engine.models.vit import SIZES
from engine.stop import STOP
from engine.train.checkpoint import checkpoint_tensors
from engine.train.folder import checkpoints
from engine.train.objective import Objective
from engine.train.optim import make_optimizer
from engine.train.session import Session, evaluate, open_session
from engine.world import World, start_world
from tests.conftest import CLASSES, Command, assert_refused, child
from tests.test_resume import assert_same, stop_after, trained
from tools.checks.doctor import host_reads
from tools.measure.products import products
from tools.measure.roofline import Shapes, floor

EPOCHS = 5
NEW = ("residual", "vit")
BN_COUNT = "norm1.num_batches_tracked"
__all__ = ["stop_after"]  # a fixture


def config_of(name: str, **settings: Any) -> RunConfig:
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    common = {"model.name": name, "global_batch": 32, "epochs": 3, "data.feed": "resident"}
    return override(RunConfig(), common | {"optim.learning_rate": 2e-3} | dotted, "test")


def opened(records: Records, world: World, name: str, **settings: Any) -> Session:
    return open_session(config_of(name, **settings), records, world)


@pytest.mark.parametrize("name", ["baseline", "fast", "residual"])
@pytest.mark.parametrize("weights", [True, False])
def test_activations_are_nhwc_whichever_way_weights_lie(name: str, weights: bool) -> None:
    """Under fsdp weights stay NCHW; a pool of NCHW takes three times as long on a CPU."""
    model = make_model(ModelConfig(name=name), 28, 28, 10, seed=1)
    model.use_channels_last(weights=weights)
    outputs: list[torch.Tensor] = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _, __, y: outputs.append(y))
    model(torch.zeros(4, 28, 28, dtype=torch.uint8))
    assert outputs and all(y.stride(1) == 1 and y.stride(3) == y.shape[1] for y in outputs)


def state_after(session: Session, num_epochs: int = 1) -> dict[str, torch.Tensor]:
    """What training leaves, with the losses."""
    with closing(session):
        losses = []
        for epoch in range(num_epochs):
            for _ in session.step.train_epoch(session.feed, epoch):
                pass
            losses.append(session.step.read_training().loss_S)
        files = checkpoint_tensors(session.step.state)
        found = {name: t for tensors in files.values() for name, t in tensors.items()}
        found = {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}
        return found | {"loss": torch.from_numpy(np.concatenate(losses))}


def unequal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    assert got.keys() == wanted.keys()
    return [name for name in wanted if not torch.equal(got[name], wanted[name])]


@pytest.mark.parametrize("name", NETWORK_NAMES)
@pytest.mark.parametrize("size", [(4, 4), (5, 11), (28, 28)], ids=str)
def test_images_of_any_size_give_logits_of_every_class(name: str, size: tuple[int, int]) -> None:
    model = make_model(ModelConfig(name=name, vit_patch_pixels=7), *size, 9, seed=0)
    assert not model.training
    assert model(random_batch(3, size, 9, torch.device("cpu")).image_BHW).shape == (3, 9)


def test_they_are_as_large_as_they_are_said_to_be() -> None:
    found = {}
    for name, size in (("residual", "tiny"), *(("vit", size) for size in SIZES)):
        model = make_model(ModelConfig(name=name, vit_size=size), 28, 28, 94, seed=0)  # type: ignore[arg-type]
        found[name, size] = sum(p.numel() for p in model.parameters())
    assert list(found.values()) == [836_542, 574_846, 4_780_126, 25_302_110]


@pytest.mark.parametrize("name", NEW)
def test_weights_are_a_function_of_the_seed(name: str) -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    a, b, c = (make_model(ModelConfig(name=name), 8, 8, 9, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert unequal(dict(a.named_parameters()), dict(b.named_parameters())) == []
    assert unequal(dict(a.named_parameters()), dict(c.named_parameters())) != []


@pytest.mark.parametrize("name", NEW)
def test_a_short_training_learns(name: str, tiny: Records, world: World) -> None:
    with closing(opened(tiny, world, name, epochs=EPOCHS)) as session:
        before = evaluate(session, "val")
        for epoch in range(EPOCHS):
            assert host_reads(session.step.train_epoch(session.feed, epoch), world.device) == []
            for _ in session.step.train_epoch(session.feed, epoch, first_step=5):
                pass
        loss, accuracy = evaluate(session, "val")
    assert loss < 0.7 * before[0] and accuracy > 2 / len(CLASSES)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NEW)
def test_launches_of_k_steps_change_no_bit(
    name: str, precision: str, tiny: Records, world: World
) -> None:
    runs = [
        opened(tiny, world, name, step__steps_per_launch=k, step__precision=precision)
        for k in (1, 3)
    ]
    assert unequal(*map(state_after, runs)) == []


@pytest.mark.parametrize("name", NEW)
def test_a_run_stopped_in_an_epoch_goes_on_to_the_same_bits(
    name: str,
    tiny: Records,
    world: World,
    stop_after: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = config_of(name, epochs=2)
    whole = trained(tiny, world, tmp_path / "whole", config)
    stop_after(9)
    run = trained(tiny, world, tmp_path / "run", config)
    monkeypatch.undo()
    monkeypatch.setattr(STOP, "number", 0)
    trained(tiny, world, run, config, resume=True)
    assert_same(run, whole)
    stored = load_file(checkpoints(run)[0] / "model.safetensors")
    assert float(stored["pixels.mean"]) > 1 and float(stored["pixels.std"]) > 1
    if name == "residual":
        assert int(stored[BN_COUNT]) == 14 and stored["norm1.running_var"].std() > 0


def test_evaluation_goes_by_the_running_statistics_and_leaves_them(
    tiny: Records, world: World
) -> None:
    with closing(opened(tiny, world, "residual")) as session:
        step = session.step
        next(step.train_epoch(session.feed, 0))
        before = {name: t.clone() for name, t in step.model.state_dict().items()}
        loss, _ = evaluate(session, "val")
        assert step.model.training and unequal(dict(step.model.state_dict()), before) == []
        val = tiny.split("val")
        with torch.no_grad():
            logits = step.model.eval()(torch.from_numpy(val.image_NHW))
        label = torch.from_numpy(val.label_N).long()
        assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, label)))


def test_pixels_are_standardised_by_the_training_images(tiny: Records, world: World) -> None:
    image_NHW = tiny.split("train").image_NHW
    pixels = Pixels()
    image = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8)
    assert pixels(image).flatten().tolist() == pytest.approx([0, 0.2, 1])
    pixels.fill(image_NHW)
    assert float(pixels.mean) == pytest.approx(np.mean(image_NHW), rel=1e-6)
    assert float(pixels.std) == pytest.approx(np.std(image_NHW), rel=1e-6)
    with closing(opened(tiny, world, "vit")) as session:
        assert torch.equal(session.step.model.state_dict()["pixels.mean"], pixels.mean)
    pixels.fill(np.full((2, 3, 3), 7, np.uint8))
    assert (float(pixels.mean), float(pixels.std)) == (7, 1)


def test_norms_biases_and_positions_are_not_decayed() -> None:
    model = make_model(ModelConfig(name="vit"), 8, 8, 9, seed=0)
    groups = make_optimizer(
        OptimConfig(weight_decay=0.1), model, torch.ones(()), capturable=False
    ).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    plain = {names[parameter] for parameter in groups[1]["params"]}
    assert groups[1]["weight_decay"] == 0 and "position_TD" in plain
    assert all(re.search(r"norm|bias|position", name) for name in plain)
    assert not any(re.search(r"norm|bias|position", names[p]) for p in groups[0]["params"])


def test_layers_that_a_network_lacks_are_taken_back(
    tiny: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.train.available.cannot_fuse", lambda device: "")
    from engine.train.available import effective_config

    config = config_of("residual", kernels="all")
    effective, notes = effective_config(config, tiny, world)
    assert effective.kernels == ("gather_warp", "softmax_cross_entropy", "adamw")
    assert "the kernels conv_pool_relu, bias_pool_relu are not used: the network residual" in str(
        notes
    )


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_the_last_layer_and_the_loss_in_one_kernel_are_the_objective(name: str) -> None:
    """By its reference: loss, right answers and every gradient."""
    batch, found = random_batch(6, (12, 12), 8, torch.device("cpu")), []
    for kernels in ((), ("linear_cross_entropy",)):
        config = override(RunConfig(), {"model.name": name, "kernels": kernels}, "test")
        fused = frozenset(config.kernels)
        model = make_model(config.model, 12, 12, 8, seed=1, fused=fused)
        objective = Objective(model, config, torch.device("cpu"))
        loss, correct = objective(batch.image_BHW, batch.label_B)
        grads = torch.autograd.grad(loss, list(objective.parameters()))
        found.append([loss, correct.float(), *grads])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_a_forward_of_ones_own_is_not_replaced() -> None:
    class Own(ResidualNet):
        def forward(self, image_BHW: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(image_BHW)

    assert ResidualNet.kernels - Own.kernels == {"linear_cross_entropy"}


class Shifted(FastGlyphNet):
    """Its hidden layer ends in no ReLU, but its parent's, which it calls, does."""

    def hidden(self, image_BHW: torch.Tensor) -> torch.Tensor:
        return super().hidden(image_BHW) - 0.01


def test_the_head_masks_no_relu_of_a_hidden_layer_of_ones_own() -> None:
    batch, found = random_batch(6, (12, 12), 8, torch.device("cpu")), []
    for kernels in ((), ("linear_cross_entropy",)):
        config = override(RunConfig(), {"kernels": kernels}, "test")
        torch.manual_seed(1)
        model = Shifted(12, 12, 8)
        model.fused = frozenset(config.kernels)
        loss, _ = Objective(model, config, torch.device("cpu"))(batch.image_BHW, batch.label_B)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert FastGlyphNet.relu_bias == "fc1.bias" and not Shifted.relu_bias
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_parts_leave_the_mean_of_their_running_statistics(tiny: Records, world: World) -> None:
    """A batch in 2 parts and 2 shards: the same parts; and by the formula."""
    found = []
    for settings in ({"step__accumulate": 2}, {"step__canonical": 2}):
        session = opened(tiny, world, "residual", **settings)
        assert any("mean of 16 samples at a time" in note for note in session.notes)
        found.append(state_after(session))
    assert int(found[0][BN_COUNT]) == int(found[1][BN_COUNT]) == 7
    running = [name for name in found[0] if "running" in name]
    assert len(running) == 10
    for name in running:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0.02, atol=0.02)
    with closing(opened(tiny, world, "residual", step__accumulate=2)) as session:
        step = session.step
        before = step.model.norm1.running_mean.clone()
        seen: list[torch.Tensor] = []
        step.model.norm1.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0].detach().mean((0, 2, 3)))
        )
        next(step.train_epoch(session.feed, 0))
        wanted = 0.9 * before + 0.1 * (seen[0] + seen[1]) / 2
        torch.testing.assert_close(step.model.norm1.running_mean, wanted)


def test_a_part_of_one_sample_is_refused(tiny: Records, world: World) -> None:
    with pytest.raises(UserError, match="1 samples at a time, which has no variance; give more"):
        opened(tiny, world, "residual", step__accumulate=32)


RANKS = {
    "ranks": {},
    "canonical": {"step__canonical": 2},
    "vit": {"step__steps_per_launch": 3},
    "launches": {"step__canonical": 2, "step__steps_per_launch": 3},
}


def of_ranks(case: str, records: Records, world: World) -> dict[str, torch.Tensor]:
    name = "vit" if case == "vit" else "residual"
    return state_after(opened(records, world, name, **RANKS[case]))


def test_two_ranks_train_as_one_does(tiny_dir: Path, tmp_path: Path, world: World) -> None:
    """Shards to the bit; DDP within rounding of the same parts on one rank."""
    words = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "tests.test_models"]
    done = child([*words, str(tmp_path), str(tiny_dir)], {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    got = {case: load_file(tmp_path / f"{case}.safetensors") for case in RANKS}
    tiny = open_records(tiny_dir)
    wanted = {case: of_ranks(case, tiny, world) for case in ("canonical", "vit")}
    assert unequal(got["canonical"], wanted["canonical"]) == []
    assert unequal(got["launches"], wanted["canonical"]) == []
    for case, one in (("ranks", "canonical"), ("vit", "vit")):
        for name, tensor in wanted[one].items():
            close = partial(torch.testing.assert_close, rtol=1e-2, atol=1e-3)
            close(got[case][name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def rank_main(folder: Path, records: Path) -> None:
    """What each rank does; rank 1 leaves the buffers, rank 0 all else: they must be the same."""
    with start_world("cpu") as world:
        for case in RANKS:
            state = of_ranks(case, open_records(records), world)
            for name, tensor in state.items():
                other = tensor.clone()
                world.copy_from_first(other)
                assert name == "loss" or torch.equal(other, tensor), name
            world.first(partial(save_file, state, folder / f"{case}.safetensors"))
    end_rank()


def readme_example(folder: Path) -> Path:
    """The class that README.md shows, in a file."""
    text = (ROOT / "engine" / "models" / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    file = folder / "wide.py"
    file.write_text(code)
    return file


def test_the_readmes_own_network_trains_and_goes_on_with_the_same_file_only(
    tiny_dir: Path, tmp_path: Path, command: Command
) -> None:
    file, out = readme_example(tmp_path), tmp_path / "run"
    model = ("--model", f"{file}:Wide")
    line = ("python", "-m", "engine.run", "--device", "cpu", "--data", tiny_dir)
    line += ("--batch-size", 32)
    done = command(*line, "--epochs", 2, "--out", out, *model)
    assert done.returncode == 0, done.stderr
    kept = (out / "config.toml").read_text()
    assert 'name = "wide.py:Wide"' in kept and str(tmp_path) not in kept.replace(str(tiny_dir), "")
    assert not (tmp_path / "__pycache__").exists()
    longer = (*line, "--resume", out, "--epochs", 3)
    assert_refused(command(*longer), "only where a command line names it; add --model PATH/wide.py")
    again = command(*longer, *model)
    assert again.returncode == 0 and "resumed after epoch 2" in again.stdout, again.stderr
    shown = ("tools/predict", out, "--out", tmp_path / "p.png")
    assert_refused(command(*shown), "add --model PATH/wide.py:Wide")
    assert command(*shown, *model).returncode == 0
    answered = ("tools/predict", out / "model.safetensors", tiny_dir)
    assert_refused(command(*answered), "add --model PATH/wide.py:Wide")
    assert "labels right" in command(*answered, *model).stderr
    file.write_text(file.read_text() + "\n")
    assert_refused(command(*line, "--resume", out, "--epochs", 4, *model), "model.sha256 was")
    assert_refused(command(*shown, *model), "is not the network of the run")


@pytest.mark.parametrize(
    ("code", "name", "text"),
    [
        ("class Net:\n    pass\n", "Net", "is no subclass of engine.models.Network"),
        ("x = 1\n", "Net", "Net is no class of it"),
        ("x = (\n", "Net", "cannot be run (line 1: SyntaxError"),
        ("import no_such_module\n", "Net", "ModuleNotFoundError"),
        (None, "Net", "cannot be read (No such file"),
    ],
)
def test_a_file_that_holds_no_network_is_refused(
    code: str | None, name: str, text: str, tiny_dir: Path, tmp_path: Path, command: Command
) -> None:
    file = tmp_path / "net.py"
    if code is not None:
        file.write_text(code)
    line = ("python", "-m", "engine.run", "--data", tiny_dir, "--device", "cpu")
    done = command(*line, "--out", tmp_path / "run", "--model", f"{file}:{name}")
    assert_refused(done, "net.py", text)


def test_no_file_names_code_to_run(tmp_path: Path, tiny_dir: Path, command: Command) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')\n")
    for text, wanted in (
        ('[model]\nname = "evil.py:Net"\n', "add --model PATH/evil.py:Net"),
        ('[model]\nname = "evil.py:Net"\nfile = "evil.py"\n', "only a command line names code"),
        ('[model]\nname = "evil"\n', "choose one of baseline, fast, residual, vit, or give FILE"),
    ):
        (tmp_path / "c.toml").write_text(text)
        line = ("python", "-m", "engine.run", "--data", tiny_dir, "--device", "cpu")
        assert_refused(command(*line, "--config", tmp_path / "c.toml"), wanted)


def test_the_products_of_a_step_are_all_seen() -> None:
    """The study's FLOPs are those of its own floor; a block of attention by hand."""
    shape = (28, 28, 94)
    study = make_model(ModelConfig(name="baseline"), *shape, seed=0)
    wanted = sum(work.flops for work in floor(Shapes(*shape)))
    assert sum(work.flops for work in products(study, *shape)) == wanted
    vit = make_model(ModelConfig(name="vit", vit_patch_pixels=7), *shape, seed=0)
    works = products(vit, *shape)
    attention = [work for work in works if "attention" in work.name]
    tokens, width = 16, SIZES["tiny"].width
    assert len(attention) == 2 * SIZES["tiny"].depth
    assert attention[0].flops == 2 * 2 * tokens * tokens * width
    linear = [work for work in works if work.name == "addmm"]
    assert linear[1].flops == 2 * tokens * width * 3 * width
    assert linear[1].read_bytes == 2 * tokens * width  # the weights are the batch's
    assert linear[1].write_bytes == 2 * tokens * 3 * width


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
@pytest.mark.long
def test_a_compiled_step_is_the_same_training(name: str, tiny: Records, world: World) -> None:
    plain, compiled = (
        state_after(opened(tiny, world, name, step__compile=mode)) for mode in ("off", "default")
    )
    torch.testing.assert_close(compiled["loss"], plain["loss"], rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), Path(sys.argv[2]))
