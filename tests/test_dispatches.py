"""One training step moves no tensor that it need not: every copy and cast is named with its reason.

Counted by torch's dispatch, in NHWC and bf16, for each set of kernels that runs on a CPU, and in
fp8. What a kernel of torch copies inside itself is not seen.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import RunConfig, override
from engine.feeds.synthetic import random_batch
from engine.models import make_model
from engine.order import Order
from engine.train.step import TrainStep
from engine.world import World

CPU = torch.device("cpu")
MOVES = {"_to_copy", "copy_", "clone", "contiguous", "_foreach_copy_"}
NUM_CLASSES = 8

COMMON = {
    "logits to fp32, for the loss": "_to_copy bfloat16 float32 [32, 8]",
    "their gradient back": "_to_copy float32 bfloat16 [32, 8]",
    "labels to what torch's cross entropy takes": "_to_copy uint8 int64 [32]",
}
FIRST = {
    "pixels to fp32": "_to_copy uint8 float32 [32, 1, 28, 28]",
    "scaled pixels to bf16": "_to_copy float32 bfloat16 [32, 1, 28, 28]",
}
FIRST_ON_CPU = {
    "pixels to fp32, forward": "_to_copy uint8 float32 [32, 28, 28]",
    "pixels to fp32, backward": "_to_copy uint8 float32 [32, 28, 28]",
    "288 scaled weights as the kernel reads them": "clone float32 - [9, 32]",
    "their gradient as the parameter is": "clone float32 - [32, 1, 3, 3]",
    "a bias that NumPy may look at": "clone float32 - [32]",
    "conv2's bias, likewise": "clone float32 - [64]",
}
SHAPES = {
    "conv1.weight": "[32, 1, 3, 3]",
    "conv1.bias": "[32]",
    "conv2.weight": "[64, 32, 3, 3]",
    "conv2.bias": "[64]",
    "fc1.weight": "[128, 3136]",
    "fc1.bias": "[128]",
    "fc2.weight": "[8, 128]",
    "fc2.bias": "[8]",
}
IN_FP8 = {
    "fc1's activations to e4m3": "_to_copy bfloat16 float8_e4m3fn [32, 3136]",
    "fc1's weight to e4m3": "_to_copy float32 float8_e4m3fn [128, 3136]",
    "fc1's gradient to e5m2": "_to_copy bfloat16 float8_e5m2 [32, 128]",
    "fc1's bias to the product's type": "_to_copy float32 bfloat16 [128]",
    "columns of the weight, for the activations' gradient": "clone float8_e4m3fn - [3136, 128]",
    "columns of the activations, for the weight's": "clone float8_e4m3fn - [3136, 32]",
    "rows of the gradient turned, for the weight's": "clone float8_e5m2 - [128, 32]",
}
EMULATED = {
    "forward, left": "_to_copy float8_e4m3fn float32 [32, 3136]",
    "forward, right": "_to_copy float8_e4m3fn float32 [3136, 128]",
    "forward, result": "_to_copy float32 bfloat16 [32, 128]",
    "activations' gradient, left": "_to_copy float8_e5m2 float32 [32, 128]",
    "activations' gradient, right": "_to_copy float8_e4m3fn float32 [128, 3136]",
    "activations' gradient, result": "_to_copy float32 bfloat16 [32, 3136]",
    "weight's gradient, left": "_to_copy float8_e5m2 float32 [128, 32]",
    "weight's gradient, right": "_to_copy float8_e4m3fn float32 [32, 3136]",
}
"""By a CPU alone: its products are of fp32."""
FUSED = {"conv1.weight", "conv1.bias", "conv2.bias"}
"""What conv_pool_relu and bias_pool_relu take as they are."""
FC1 = {"fc1.weight", "fc1.bias"}


def casts(names: set[str]) -> dict[str, str]:
    """Autocast's: each weight to bf16, its gradient back."""
    there = {f"{name} to bf16": f"_to_copy float32 bfloat16 {SHAPES[name]}" for name in names}
    back = {f"{name}'s gradient": f"_to_copy bfloat16 float32 {SHAPES[name]}" for name in names}
    return there | back


class Moves(TorchDispatchMode):
    """What is dispatched while it is entered, of MOVES."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name in MOVES:
            first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            kinds = (first.dtype, (kwargs or {}).get("dtype") or "-")
            words = " ".join(str(kind).removeprefix("torch.") for kind in kinds)
            self.found[f"{name} {words} {list(first.shape)}"] += 1
        return function(*args, **(kwargs or {}))


def moves(settings: dict[str, Any]) -> Counter[str]:
    """Of the second step, in NHWC and, unless the settings say otherwise, in bf16."""
    common = {"step.precision": "bf16", "step.channels_last": True, "global_batch": 32}
    config = override(RunConfig(), common | {"epochs": 1} | settings, "test")
    model = make_model(config.model, 28, 28, NUM_CLASSES, 1, frozenset(config.kernels))
    order = Order(num_samples=320, global_batch=32)
    batch = random_batch(32, (28, 28), NUM_CLASSES, CPU)
    world = World(rank=0, size=1, device=CPU, stream=None)
    step = TrainStep(model, config, order, batch, world)
    step.train(batch)
    with Moves() as seen:
        step.train(batch)
    return seen.found


def reference(num_rounded: int) -> dict[str, str]:
    """What kernels/adamw.py's reference moves in the kernel's place; the kernel itself does not."""
    return {
        "gradients to fp32": f"_to_copy bfloat16 float32 [{num_rounded}]",
        "parameters rounded to bf16": f"copy_ bfloat16 - [{num_rounded}]",
    }


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        ({}, COMMON | FIRST | casts(set(SHAPES))),
        (
            {"kernels": ["conv_pool_relu", "bias_pool_relu"]},
            COMMON | FIRST_ON_CPU | casts(set(SHAPES) - FUSED),
        ),
        (
            {"step.precision": "fp8"},
            COMMON | FIRST | casts(set(SHAPES) - FC1) | IN_FP8 | EMULATED,
        ),
        ({"kernels": ["adamw"]}, COMMON | FIRST | reference(421_392)),
        (
            {"kernels": ["conv_pool_relu", "bias_pool_relu", "adamw"]},
            COMMON | FIRST_ON_CPU | reference(421_392 - 288 - 32 - 64),
        ),
    ],
    ids=["torch", "kernels of a CPU", "fp8", "adamw", "all of these"],
)
def test_a_step_moves_nothing_without_a_reason(
    settings: dict[str, Any], reasons: dict[str, str]
) -> None:
    assert moves(settings) == Counter(reasons.values())


def test_nchw_in_the_network_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count can fail: columns in NCHW's order are a copy of the activations."""
    from engine.models.columns import Columns

    def plain(self: Columns, x_BCHW: torch.Tensor) -> torch.Tensor:
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return torch.nn.functional.linear(x_BCHW.flatten(1), weight, self.bias)

    monkeypatch.setattr(Columns, "forward", plain)
    assert moves({})["clone bfloat16 - [32, 64, 7, 7]"] == 1
