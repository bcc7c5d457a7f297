"""Collectives and bytes of ranks that are not there."""

import pytest

from engine.config import RunConfig, override
from engine.models import make_model
from tests.bench.child import measured
from tools.measure.counted import Counted, activation_bytes, count
from tools.measure.operations import STUDYS_SHAPE as SHAPE

BASELINE_BYTES = 4 * 432_478
FINITE = ("all-reduce", 4, 1)
"""Under fsdp: whether a rank's part of the gradients is not finite."""


def of(num_ranks: int, **changed: object) -> Counted:
    """Of the study's network, settings with __ for the point."""
    dotted = {name.replace("__", "."): value for name, value in changed.items()}
    config = override(RunConfig(), {"model.name": "baseline"} | dotted, "a test")
    return count(config, num_ranks, SHAPE)


def sent(counted: Counted) -> list[tuple[str, int, int]]:
    return [(each.kind, each.num_bytes, each.times) for each in counted.collectives]


@pytest.mark.parametrize("num_ranks", [2, 3, 1024])
def test_ddp_sends_all_gradients_at_once_and_keeps_everything(num_ranks: int) -> None:
    found = of(num_ranks)
    assert sent(found) == [("all-reduce", BASELINE_BYTES, 1)]
    assert found.kept == found.kept_under_ddp and found.gathered_bytes == 0
    assert found.kept.parameters_bytes == found.kept.gradients_bytes == BASELINE_BYTES
    assert BASELINE_BYTES * 2 <= found.kept.optimizer_bytes < BASELINE_BYTES * 2.01


def test_one_rank_sends_nothing_and_has_nothing_to_divide() -> None:
    found = of(1, step__parallel="fsdp")
    assert not found.collectives and found.kept == found.kept_under_ddp


def test_frozen_layers_are_not_sent_and_statistics_are() -> None:
    """The whitened layer; the running means and variances of BatchNorm."""
    (whitened,) = of(2, model__name="fast", model__first_layer="whitened").collectives
    assert whitened.num_bytes == BASELINE_BYTES - 4 * (32 * 9 + 32)
    config = override(RunConfig(), {"model.name": "residual"}, "a test")
    model = make_model(config.model, *SHAPE, config.seed)
    num = sum(p.numel() for p in model.parameters())
    running = [b for name, b in model.named_buffers() if "running" in name]
    of_residual = sent(of(2, model__name="residual"))
    assert of_residual[0] == ("all-reduce", 4 * num, 1)
    assert of_residual[1:] == [("all-reduce", 4 * sum(b.numel() for b in running), 1)]


def test_fsdp_divides_rows_and_pads_what_has_too_few() -> None:
    """On 1,024 ranks every bias and filter of fewer rows is sent as 1,024."""
    two, many = (of(n, step__parallel="fsdp") for n in (2, 1024))
    whole = [("all-gather", BASELINE_BYTES, 1), ("reduce-scatter", BASELINE_BYTES, 1)]
    assert sent(two) == [*whole, FINITE]
    assert two.kept.parameters_bytes * 2 == BASELINE_BYTES
    assert two.gathered_bytes == 2 * BASELINE_BYTES
    rows = (9, 1, 32 * 9, 1, 3136, 1, 128, 1)
    padded = 1024 * 4 * sum(rows)
    assert sent(many) == [("all-gather", padded, 1), ("reduce-scatter", padded, 1), FINITE]
    assert many.kept.parameters_bytes == padded // 1024


@pytest.mark.parametrize("again", [True, False])
def test_large_blocks_are_gathered_by_themselves(again: bool) -> None:
    """In bf16, their gradients in fp32; twice a step where they are freed in between."""
    found = of(
        4,
        model__name="vit",
        model__vit_size="small",
        step__parallel="fsdp",
        step__precision="bf16",
        step__reshard_after_forward=again,
    )
    root, block = (each for each in found.collectives if each.kind == "all-gather")
    scatters = [each for each in found.collectives if each.kind == "reduce-scatter"]
    num_blocks = max(each.times for each in scatters)
    assert root.times == 1 and num_blocks > 1
    assert block.times == (2 * num_blocks - (0 if again else num_blocks))
    whole = max(scatters, key=lambda each: each.num_bytes)
    assert whole.num_bytes == 2 * block.num_bytes, "fp32"
    held = 2 if again else num_blocks
    assert found.gathered_bytes == root.num_bytes + held * block.num_bytes + whole.num_bytes


def test_what_waits_for_the_backward_is_counted() -> None:
    """At least the two pooled images, in the bytes of a number; kernels keep less."""
    config = override(RunConfig(), {"model.name": "baseline"}, "a test")
    pooled = 32 * 14 * 14 + 64 * 7 * 7
    fp32 = activation_bytes(config, SHAPE)
    bf16 = activation_bytes(override(config, {"step.precision": "bf16"}, "a test"), SHAPE)
    assert fp32 > 4 * pooled and 2 * pooled < bf16 < fp32
    fused = activation_bytes(override(config, {"kernels": ["conv_pool_relu"]}, "a test"), SHAPE)
    assert fused < fp32 - 4 * 32 * 28 * 28, "the first layer's image before pooling"


@pytest.mark.slow
def test_two_real_ranks_keep_what_was_counted() -> None:
    changed = {"model.name": "baseline", "step.precision": "fp32", "step.parallel": "fsdp"}
    real = measured("rung_bf16", batch_size=8, num_steps=2, num_ranks=2, changed=changed)
    assert real.kept == of(2, step__parallel="fsdp").kept
