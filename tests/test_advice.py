"""The adviser on fp8: what it counts of a layer, and when it says no."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import RunConfig, override
from engine.config_text import with_own_network
from tests.conftest import Command, assert_refused
from tools.measure.advice import (
    Advice,
    Layer,
    _bound,
    _verdict,
    advise,
    layer_advice,
    layers_of,
    to_markdown,
)
from tools.measure.assumed import Operation
from tools.measure.ledger import H100, MACHINES
from tools.measure.operations import STUDYS_SHAPE as SHAPE
from tools.measure.operations import layer_operations
from tools.measure.roofline import PEAK_FLOPS

A100 = "NVIDIA A100-SXM4-80GB"


def wide(side: int) -> torch.nn.Linear:
    """A linear layer whose memory nobody touches."""
    layer: torch.nn.Linear = torch.nn.utils.skip_init(torch.nn.Linear, side, side)
    return layer


def like(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


@pytest.fixture(scope="module")
def studys() -> Advice:
    return advise(override(RunConfig(), {"global_batch": 512}, "test"), H100)


def test_the_products_of_fp8_are_counted_where_training_makes_them() -> None:
    """Three of one byte a number; a gradient of the weight in fp32, of the activations in bf16."""
    from engine.train.precision import Fp8Linear

    rows, side = 64, 256
    layer = wide(side)
    plain = layer_operations(layer, like(rows, side), torch.bfloat16)
    layer.__class__ = Fp8Linear
    found = layer_operations(layer.train(), like(rows, side), torch.bfloat16)
    products = [each for each in found if each.flops]
    assert {each.name for each in products} == {"_scaled_mm"}
    assert {each.dtype for each in products} == {"fp8"}
    assert sum(each.launches for each in products) == 3
    flops = sum(each.flops for each in products)
    assert flops == sum(each.flops for each in plain) == 3 * 2 * rows * side * side
    x, weight = rows * side, side * side
    written = sum(each.write_bytes for each in products)
    assert written == 2 * x + 2 * x + 4 * weight
    read = sum(each.read_bytes for each in products)
    assert read == 2 * (2 * x + weight) + 2 * side + 3 * 2 * 4, "and a bias, and six units"
    casts = sum(each.num_bytes for each in found if not each.flops)
    least = 2 * (2 * x * 2 + 4 * weight) + 3 * (2 * x + weight)
    assert casts > least, "each tensor is read for its scale and for its rounding, and turned once"


def test_fp8_helps_where_products_are_large_and_not_where_casts_are() -> None:
    machine = MACHINES[H100]
    for side, text in ((8192, "fp8 helps: it saves"), (128, "fp8 cannot help: 10% of the time")):
        layer = Layer(name="x", module=wide(side), x=like(side, side))
        advice = layer_advice(layer, machine, 1.0)
        of_ten = layer_advice(layer, machine, 10 * advice.us["bf16"])
        assert of_ten.verdict.startswith(text), of_ten.verdict
    assert advice.bound == "launches" and advice.us["fp8"] > advice.us["bf16"]


def product(dtype: str, us: float) -> Operation:
    """A product that takes so long on an H100, beside its launch's 2 us."""
    flops = us * 1e-6 * MACHINES[H100].product_fraction * PEAK_FLOPS[H100][dtype]
    return Operation(name="mm", read_bytes=0, write_bytes=0, flops=flops, dtype=dtype)


def cast(us: float) -> Operation:
    """Bytes that take so long, its launch with them."""
    return Operation(name="copy", read_bytes=(us - 2) * 3e6, write_bytes=0)


@pytest.mark.parametrize(
    ("product_us", "cast_us", "step_us", "text"),
    [
        (50, 10, 1000, "fp8 helps: it saves 4% of the step"),
        (50, 10, 2001, "fp8 is not worth it: it saves 2.0% of the step"),
        (50, 60, 1000, "fp8 cannot help: 10% of the time, casts cost more (products save 50.0 us, "
         "casts and scales cost 60.0 us)"),
        (101, 5, 1000, "fp8 cannot help: 10% of the time, casts cost more (products save nothing, "
         "casts and scales cost 5.0 us)"),
    ],
    ids=["helps", "not worth it", "casts cost more", "products are slower"],
)  # fmt: skip
def test_a_verdict_weighs_what_products_save_against_casts(
    product_us: float, cast_us: float, step_us: float, text: str
) -> None:
    found = {"bf16": [product("bf16", 100)], "fp8": [product("fp8", product_us), cast(cast_us)]}
    assert _verdict(found, MACHINES[H100], step_us) == text


@pytest.mark.parametrize(
    ("operations", "wanted"),
    [
        ([cast(12), product("bf16", 9)], "bytes"),
        ([cast(11), product("bf16", 10)], "FLOPs"),
        ([cast(3), product("bf16", 3)], "launches"),
        ([replace(cast(3), turns=9)], "waiting"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_layer_is_bound_by_what_takes_most(operations: list[Operation], wanted: str) -> None:
    assert _bound(operations, MACHINES[H100]) == wanted


def test_each_layer_of_the_studys_network_has_a_verdict(studys: Advice) -> None:
    verdicts = {each.name: each.verdict for each in studys.layers}
    assert list(verdicts) == ["conv1", "conv2", "fc1", "fc2"]
    assert verdicts["conv2"] == "fp8 cannot help: torch has no convolution in it"
    assert verdicts["fc1"].startswith("fp8 cannot help: ") and "casts cost more" in verdicts["fc1"]
    assert verdicts["fc2"] == "fp8 is not used: 94 cannot be divided by 16"
    flops = {each.name: each.flops / 512 for each in studys.layers}
    assert flops["fc1"] == 3 * 2 * 3136 * 128 and flops["fc2"] == 3 * 2 * 128 * 94
    assert flops["conv1"] == 2 * 2 * 9 * 32 * 28 * 28, "no gradient of pixels"
    assert list(studys.step_us) == ["fp32", "tf32", "bf16", "fp16", "fp8"]
    assert studys.step_us["bf16"] == studys.step_us["fp16"] < studys.step_us["fp8"]
    assert studys.step_us["tf32"] < studys.step_us["fp32"]
    for each in studys.layers:
        assert each.us["bf16"] < studys.step_us["bf16"]


def test_alike_layers_are_one_line_of_their_sum() -> None:
    settings = {"model.name": "vit", "global_batch": 64}
    layers = {each.name: each for each in layers_of(override(RunConfig(), settings, "test"), SHAPE)}
    assert {name: each.count for name, each in layers.items()} == {
        "embed": 1,
        **dict.fromkeys((f"blocks.0.{name}" for name in ("qkv", "out", "up", "down")), 5),
        "head": 1,
    }
    tokens = 64 * 49
    five = layer_advice(layers["blocks.0.qkv"], MACHINES[H100], 1.0)
    assert five.name == "blocks.0.qkv and 4 alike"
    assert five.flops == 5 * 3 * 2 * tokens * 96 * 288
    one = layer_advice(layers["embed"], None, 0.0)
    assert one.flops == 2 * 2 * tokens * 16 * 96, "no gradient of pixels"


OWN = """
from torch import nn
from engine.models import Network

class Net(Network):
    def __init__(self, height, width, num_classes):
        super().__init__()
        more = ({}, {"stride": 2}, {"padding": 2}, {"dilation": 2}, {})
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, **each) for each in more)
        self.first, self.last = nn.Conv2d(1, 16, 3), nn.Linear(16, num_classes)

    def forward(self, image_BHW):
        x = self.first(image_BHW[:, None].float())
        y = sum(conv(x).mean((2, 3)) for conv in self.convs)
        return self.last(y)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network of convolutions that have the same weights and the same input."""
    file = tmp_path_factory.mktemp("own") / "convs.py"
    file.write_text(OWN)
    return f"{file}:Net"


def test_layers_of_other_strides_and_paddings_are_not_alike(own: str) -> None:
    config = override(RunConfig(), with_own_network({"model.name": own}, "test"), "test")
    layers = layers_of(replace(config, global_batch=8), SHAPE)
    assert {each.name: each.count for each in layers} == {
        "first": 1, "convs.0": 2, "convs.1": 1, "convs.2": 1, "convs.3": 1, "last": 1,
    }  # fmt: skip


def test_what_is_not_known_is_not_said(studys: Advice) -> None:
    unknown = advise(override(RunConfig(), {"global_batch": 512}, "test"), "NVIDIA H100")
    assert not unknown.step_us and not any(each.us or each.verdict for each in unknown.layers)
    assert [each.num_bytes for each in unknown.layers] == [e.num_bytes for e in studys.layers]
    text = to_markdown(unknown)
    assert "No verdict: nothing is known of NVIDIA H100. Name one" in text and "help" not in text
    older = advise(override(RunConfig(), {"global_batch": 512}, "test"), A100)
    assert {each.name: each.verdict for each in older.layers}["fc1"].endswith("this GPU has none")
    assert "fp8" not in older.step_us and "fp8 us" not in to_markdown(older)


def test_the_command_needs_no_gpu(command: Command, tmp_path: Path, own: str) -> None:
    done = command("tools/profile", "advise", "--device", H100, "--batch-size", 64)
    assert done.returncode == 0, done.stderr
    assert "a model, not measured" in done.stdout and "| **the step** |" in done.stdout
    assert "MXFP8 and NVFP4 need Blackwell" in done.stdout
    if not torch.cuda.is_available():
        none = command("tools/profile", "advise", "--model", own, "--batch-size", 8)
        assert "## convs.py:Net, batch 8: counted" in none.stdout, none.stderr
        assert "No verdict: this machine has no GPU" in none.stdout
    wrong = command("tools/profile", "advise", "--model", "lenet")
    assert_refused(wrong, "model.name: is 'lenet'; choose one of", "or give FILE.py:NAME")
    file = tmp_path / "odd.toml"
    file.write_text("[step]\nprecision = 'fp4'\n")
    assert_refused(command("tools/profile", "advise", file), "step.precision", "fp8")
