"""fp8: its numbers and products against float64 within the formats' bounds, and its training."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from engine.config import ModelConfig, RunConfig, StepConfig, override
from engine.data.records import Records
from engine.models import make_model
from engine.train import available
from engine.train.available import effective_config
from engine.train.flat import FlatAdamW
from engine.train.precision import (
    Fp8Columns,
    Scaled,
    check_product,
    fp8_linear,
    scaled_product,
    to_fp8,
    use_fp8,
)
from engine.train.session import evaluate
from engine.world import World, cannot_compile, cannot_fp8
from tests.conftest import FAST_PRECISION, Command, assert_refused
from tests.test_flat import flat_step
from tests.test_launches import session, trained
from tests.test_step import losses, make_step
from tools.checks.doctor import host_reads

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROUNDING = {E4M3: (2**-4, 2**-10), E5M2: (2**-3, 2**-17)}
"""Half a unit in the last place: of a number, and of the format's least."""
Formats = tuple[torch.dtype, torch.dtype]
needs_bf16 = pytest.mark.skipif(FAST_PRECISION == "fp32", reason="no bf16 instructions")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of many sizes, fp32."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(-6, 3, shape, generator=generator)
    return torch.randn(shape, generator=generator) * 2.0**size


def error_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The most that rounding moves each number of a tensor, float64."""
    relative, least = ROUNDING[dtype]
    return (relative * x.double().abs()).clamp(min=least * float(to_fp8(x, dtype).unit))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_numbers_are_off_by_the_formats_rounding(
    given: torch.dtype, size: float, dtype: torch.dtype
) -> None:
    x = (drawn(64, 48) * size).to(given)
    number, unit = to_fp8(x, dtype)
    assert number.dtype == dtype and unit.dtype == torch.float32
    assert torch.frexp(unit)[0] == 0.5, "a power of two"
    back = number.double() * unit.double()
    assert ((back - x.double()).abs() <= error_of(x, dtype)).all()
    largest = float(number.double().abs().max()) / torch.finfo(dtype).max
    assert 0.5 <= largest <= 1, "the whole range is used, and nothing is cut off"


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_ends_of_fp32(dtype: torch.dtype) -> None:
    """Zeros stay zeros; numbers near both ends keep to the bound, denormal ones if the CPU does."""
    zero = to_fp8(torch.zeros(2, 16), dtype)
    assert not zero.number_MK.double().any() and zero.unit == 2.0**-126
    for largest in (torch.finfo(torch.float32).max, 2.0**-120, 2.0**-126, 1e-40):
        x = torch.tensor([[largest, -largest / 2, 0.0]])
        number, unit = to_fp8(x, dtype)
        assert torch.isfinite(number.double()).all() and torch.isfinite(unit)
        assert torch.isfinite(1 / unit), "what the numbers are divided by"
        back = number.double() * unit.double()
        may_be_zero = largest if largest < 2.0**-126 else 0.0
        bound = error_of(x, dtype).clamp(min=may_be_zero)
        assert ((back - x.double()).abs() <= bound).all()
    exact = torch.tensor([[torch.finfo(dtype).max, 1.0]])
    number, unit = to_fp8(exact, dtype)
    assert torch.equal(number.double() * unit.double(), exact.double())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["x", "weight", "gradient"])
def test_what_is_not_finite_stays_so(bad: float, place: str) -> None:
    """It reaches everything that it is multiplied with, as it would in one row of bf16."""
    x, weight = drawn(32, 64).requires_grad_(), drawn(16, 64, seed=1).requires_grad_()
    grad = torch.ones(32, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        {"x": x, "weight": weight, "gradient": grad}[place][3, 5] = bad
    y = fp8_linear(x, weight, None)
    assert y.isnan().all() or place == "gradient"
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    assert grad_x.isnan().all() or place == "x"
    assert grad_weight.isnan().all() or place == "weight"


def assert_product(
    got: torch.Tensor, a: torch.Tensor, b: torch.Tensor, formats: Formats, added: torch.Tensor
) -> None:
    """`got` is a b + added within the rounding of both sides and of the result, and no nearer."""
    error_a, error_b = error_of(a, formats[0]), error_of(b, formats[1])
    a, b, added = a.double(), b.double(), added.double()
    wanted = a @ b + added
    off = a.abs() @ error_b + error_a @ b.abs() + error_a @ error_b
    rounding = 2**-8 if got.dtype == torch.bfloat16 else 2**-20
    found = (got.double() - wanted).abs()
    assert (found <= off + rounding * (wanted.abs() + off + added.abs())).all()
    in_bf16 = 2**-8 * (a.abs() @ b.abs() + wanted.abs())
    assert (found > in_bf16).any(), "bf16 would be as near: this is no fp8"


@pytest.mark.parametrize("num_rows", [48, 20], ids=["48 rows", "20, filled up to 32"])
def test_the_products_are_within_their_bound(num_rows: int) -> None:
    """Against float64 of what was given: forward, and both gradients."""
    x, weight, bias = drawn(num_rows, 64).bfloat16(), drawn(80, 64, seed=1), drawn(80, seed=2)
    grad, zero = drawn(num_rows, 80, seed=3).bfloat16(), torch.zeros(())
    leaves = [each.clone().requires_grad_() for each in (x, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        y = fp8_linear(*leaves)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(y, leaves, grad)
    assert y.dtype == grad_x.dtype == torch.bfloat16
    assert grad_weight.dtype == grad_bias.dtype == torch.float32
    assert_product(y.detach(), x, weight.t(), (E4M3, E4M3), bias)
    assert_product(grad_x, grad, weight, (E5M2, E4M3), zero)
    assert_product(grad_weight, grad.t(), x, (E5M2, E4M3), zero)
    assert torch.allclose(grad_bias, grad.float().sum(0), rtol=1e-5, atol=1e-5)


def test_the_product_is_torchs() -> None:
    """Small ones: on a CPU torch's own take seconds for a layer."""
    a, b = drawn(24, 32), drawn(16, 32, seed=1)
    bias = drawn(16, seed=2).bfloat16()
    for kinds in ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)):
        left, right = to_fp8(a, kinds[0]), to_fp8(b, kinds[1]).t()
        wanted = torch._scaled_mm(
            left.number_MK, right.number_MK, left.unit, right.unit, out_dtype=torch.float32
        )
        got = scaled_product(left, right, torch.float32)
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(scaled_product(left, right, torch.float32), got)
        added = scaled_product(left, right, torch.bfloat16, bias)
        assert torch.equal(added, (got + bias).bfloat16())


def plain(*shape: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    return torch.zeros(shape).to(dtype)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (plain(8, 16, dtype=E5M2), plain(32, 16, dtype=E5M2).t(), "e5m2 on one side only"),
        (plain(8, 16).float(), plain(32, 16).t(), "takes e4m3 and e5m2, not torch.float32"),
        (plain(8, 24), plain(32, 24).t(), r"multiples of 16, not \[24, 32\]"),
        (plain(8, 16), plain(94, 16).t(), r"multiples of 16, not \[16, 94\]"),
        (plain(16, 8).t(), plain(32, 16).t(), "left side's rows"),
        (plain(8, 16), plain(16, 32), "right side's columns"),
    ],
    ids=["e5m2 twice", "fp32", "inner", "outer", "left columns", "right rows"],
)
def test_what_a_gpu_refuses_is_refused_on_a_cpu(
    a: torch.Tensor, b: torch.Tensor, text: str
) -> None:
    unit = torch.ones(())
    with pytest.raises(ValueError, match=text):
        scaled_product(Scaled(a, unit), Scaled(b, unit), torch.bfloat16)
    check_product(plain(8, 16), plain(32, 16).t())


def test_odd_layers_stay_in_bf16_and_are_named() -> None:
    """94 classes; and a layer of a subclass, whose forward may be another."""
    model = make_model(RunConfig().model, 28, 28, 94, seed=0).train()
    names = model.state_dict().keys()
    text = use_fp8(model)
    assert text == "fp8 computes fc1, bf16 all else (fc2: 94 cannot be divided by 16)"
    assert type(model.fc1) is Fp8Columns and type(model.fc2) is torch.nn.Linear
    assert model.state_dict().keys() == names
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    attention = torch.nn.MultiheadAttention(32, 2)
    assert "out_proj: it is of a class of its own" in use_fp8(attention)
    wide = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(6)))
    assert use_fp8(wide) == "fp8 computes 0, 1, 2, 3 and 2 others, bf16 all else"
    odd = torch.nn.Sequential(*(torch.nn.Linear(17, 17 + 2 * (n == 3)) for n in range(7)))
    assert use_fp8(odd) == (
        "fp8 computes no layer, bf16 all else (0, 1, 2, 4 and 2 others: 17 cannot be divided by "
        "16; 3: 17 and 19 cannot be divided by 16)"
    )


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", ["fast", "vit"])
def test_evaluation_is_bf16s_to_the_bit(name: str, channels_last: bool) -> None:
    """Of Columns, and of plain linear layers."""
    twins = [make_model(ModelConfig(name=name), 28, 28, 94, seed=0) for _ in range(2)]
    use_fp8(twins[0])
    image = torch.randint(256, (4, 28, 28), dtype=torch.uint8)
    for model in twins:
        if channels_last:
            model.use_channels_last()
    for training, equal in ((False, True), (True, False)):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            got, wanted = (model.train(training)(image) for model in twins)
        assert torch.equal(got, wanted) is equal
        assert functional.cosine_similarity(got, wanted).min() > 0.99


def test_tokens_are_rows() -> None:
    """[B, T, K], as a transformer has them; the result is that of its rows."""
    x, weight = drawn(4, 5, 32), drawn(48, 32, seed=1)
    assert torch.equal(
        fp8_linear(x, weight, None).flatten(0, 1), fp8_linear(x.flatten(0, 1), weight, None)
    )


@needs_bf16
def test_it_trains_as_bf16_does(small: Records, world: World) -> None:
    got, wanted = (losses(make_step(world, precision=p), small) for p in ("fp8", "bf16"))
    assert got != wanted
    assert got[-1] == pytest.approx(wanted[-1], rel=0.1)
    assert wanted[-1] < 0.5 * wanted[0], "the loss must fall, or nearness shows nothing"


@needs_bf16
@pytest.mark.parametrize(("name", "taken"), [("fast", "fc1, "), ("vit", "blocks.0.qkv, ")])
def test_a_run_keeps_what_bf16s_keeps_and_reads_nothing(
    small: Records, world: World, name: str, taken: str
) -> None:
    """The state is fp32's, by the same names; K steps in a launch change no bit."""
    settings = {"step.precision": "fp8", "model.name": name, "model.vit_patch_pixels": 14}
    with closing(session(small, world, settings)) as opened:
        assert any(note.startswith(f"fp8 computes {taken}") for note in opened.notes)
        assert not opened.step.scaler.is_enabled()
        assert host_reads(opened.step.train_epoch(opened.feed, 0), world.device) == []
        assert 0 < evaluate(opened, "val")[0] < 3
        kept = opened.step.state.model_tensors() | opened.step.state.optimizer_tensors()
    with closing(session(small, world, settings | {"step.precision": "bf16"})) as other:
        for _ in other.step.train_epoch(other.feed, 0):
            pass
        wanted = other.step.state.model_tensors() | other.step.state.optimizer_tensors()
    assert {n: (t.shape, t.dtype) for n, t in kept.items()} == {
        n: (t.shape, t.dtype) for n, t in wanted.items()
    }
    one, three = (
        trained(session(small, world, settings | {"step.steps_per_launch": k})) for k in (1, 3)
    )
    assert one.keys() == three.keys()
    assert all((one[name] == three[name]).all() for name in one)


@pytest.mark.slow
def test_it_compiles_into_one_graph() -> None:
    """Forward and backward; inductor leaves the bias unrounded, and some gradients follow."""
    if why := cannot_compile(torch.device("cpu")):
        pytest.skip(why)
    x, weight, bias = drawn(20, 64).bfloat16(), drawn(48, 64, seed=1), drawn(48, seed=2)
    leaves = [each.requires_grad_() for each in (x, weight, bias)]

    def loss(*given: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fp8_linear(*given).float().square().mean()

    found = []
    for work in (loss, torch.compile(loss, fullgraph=True, dynamic=False)):
        value = work(*leaves)
        found.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for wanted, got in zip(*found, strict=True):
        assert got.dtype == wanted.dtype
        assert float((got - wanted).norm()) <= 0.02 * float(wanted.norm())


def test_the_flat_optimiser_takes_fp8s_weights_in_fp32(world: World, small: Records) -> None:
    """The others keep bf16 shadows."""
    flat = flat_step(world, precision="fp8")
    assert isinstance(flat.optimizer, FlatAdamW)
    named = dict(flat.model.named_parameters())
    shadowed = {name for name, p in named.items() if p in flat.optimizer.shadows}
    assert named.keys() - shadowed == {"fc1.weight", "fc1.bias"}
    plain_losses = losses(make_step(world, precision="fp8"), small, 8)
    assert losses(flat, small, 8) == pytest.approx(plain_losses, rel=3e-2)


def effective(records: Records, world: World, **settings: object) -> tuple[RunConfig, list[str]]:
    given = {"step.precision": "fp8", "global_batch": 32}
    config = override(RunConfig(), given | settings, "test")
    return effective_config(config, records, world)


def test_what_does_not_go_with_it_is_taken_back(
    small: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "cannot_fuse", lambda device: "")
    monkeypatch.setattr(available, "has_fast_bf16", lambda device: True)
    names = ["linear_cross_entropy", "softmax_cross_entropy", "adamw"]
    config, notes = effective(small, world, kernels=names)
    assert config.step.precision == "fp8"
    assert config.kernels == ("softmax_cross_entropy", "adamw")
    why = "linear_cross_entropy is not used: its product for the layer before is bf16's"
    assert any(why in note for note in notes)
    assert any("slower than bf16" in note for note in notes), "it is emulated here"
    monkeypatch.setattr(available, "has_fast_bf16", lambda device: False)
    config, notes = effective(small, world)
    assert config.step == StepConfig(precision="fp32")
    assert any("fp8 is not used: this device has no bf16" in note for note in notes)


def test_it_needs_ada_or_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    for capability, text in (((8, 9), ""), ((9, 0), ""), ((8, 6), "8.9"), ((7, 5), "8.9")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert text in cannot_fp8(gpu) and bool(text) == bool(cannot_fp8(gpu))


def test_a_torch_without_it_ends_the_command_with_a_line(
    command: Command, small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch, "_scaled_mm")
    flags = ("--amp=fp8", "--batch-size=32", "--data", small_dir, "--out", tmp_path / "run")
    done = command("python", "-m", "engine.run", "--device=cpu", *flags)
    assert_refused(done, "--amp fp8: torch", "has no such products; use --amp bf16")
