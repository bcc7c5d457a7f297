"""The ledger: what is counted, where directions come from, and that the committed file is current.

test_kernels.py proves the kernels whose bytes are counted here; test_tools.py that RESULTS.md shows
the committed file.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from engine.config import RunConfig, override
from engine.errors import UserError
from engine.host import ROOT
from engine.report import environment
from kernels import bias_pool_relu as second
from kernels import conv2_pool_relu as whole
from kernels import conv_pool_relu as first
from kernels import gather_warp as gather
from kernels import launch
from kernels import linear_cross_entropy as head
from tests.conftest import Command, assert_refused
from tools.measure import ledger
from tools.measure.assumed import Operation
from tools.measure.operations import Operations, step_operations
from tools.measure.results import CellResult, Profile, Repetition
from tools.measure.started import launched_bytes, pointers

H100 = ledger.MACHINES[ledger.H100]
SMALL = """
title = "One"
[[rung]]
name = "{name}"
set = {{ "data.feed" = "resident", {settings} }}
batches = [8]
"""


def test_directions_come_from_a_kernels_source() -> None:
    """Through local addresses that are named again, helpers, and branches that a constant picks."""
    backward = pointers(second.bias_pool_relu_backward)
    assert backward.loaded == {"grad_ptr", "code_ptr"}
    assert backward.stored == {"grad_x_ptr", "partial_ptr"} and not backward.has_products
    forward = pointers(first.conv_pool_relu_forward)
    assert forward.loaded == {"image_ptr", "weight_ptr", "bias_ptr"}
    assert forward.stored == {"y_ptr", "code_ptr"} and forward.has_products
    gathered = pointers(gather.gather_warp_forward)
    assert gathered.stored == {"out_ptr", "out_label_ptr", "out_id_ptr"}
    assert {"image_ptr", "matrix_ptr", "table_ptr"} < gathered.loaded
    plain = pointers(gather.gather_warp_forward, frozenset({"WARPED"}))
    assert gathered.loaded - plain.loaded == {"matrix_ptr"}


def test_a_kernels_bytes_are_those_of_its_docstring() -> None:
    """14x14 of 64 channels in bf16; no kernel runs."""
    x = torch.zeros(4, 64, 14, 14, dtype=torch.bfloat16).requires_grad_()
    bias = torch.zeros(64)
    found = launched_bytes(lambda: second.bias_pool_relu(x, bias), 132)
    assert found == 4 * (25_088 + 6_272 + 1_176) + 64 * 4
    assert not launch.on_triton(x), "afterwards CPU tensors get what they did"
    y = x.detach()
    code = second._op(y, bias)[1]
    grad = torch.zeros(4, 64, 7, 7, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    sizes = (14, 14, torch.float32)
    back = launched_bytes(lambda: second._backward_op(grad, code, *sizes), 132)
    assert back == 4 * (25_088 + 6_272 + 1_176) + 4 * 64 * 4, "4 programs' partial sums"


def test_flops_are_those_of_the_products() -> None:
    """Of the head: logits, and two gradients; of the second layer the forward's."""
    hidden, label = torch.zeros(6, 128), torch.zeros(6, dtype=torch.uint8)
    counted = Operations()
    with launch.listening(counted.started, 132):
        head._op(hidden, torch.zeros(94, 128), torch.zeros(94), label, 0.0)
        weight = torch.zeros(64, 32, 3, 3)
        whole._op(torch.zeros(6, 32, 14, 14), weight, torch.zeros(64), weight)
    flops = {each.name: each.flops for each in counted.found}
    assert flops["linear_cross_entropy_forward"] == 3 * 2 * 6 * 128 * 94
    assert flops["conv2_pool_relu_forward"] == 2 * 6 * 14 * 14 * 9 * 32 * 64


def test_views_are_no_launches_and_pytorchs_are_as_assumed() -> None:
    counted = Operations()
    x = torch.zeros(2, 3, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    with counted:
        seen = last.permute(0, 2, 3, 1).flatten(1).expand(2, 48).detach()
        torch.empty_like(seen)
        assert not counted.found
        x.contiguous(memory_format=torch.channels_last)
        x.flatten(1)[0].zero_()
    assert [each.name for each in counted.found] == ["clone", "zero_"]
    assert [each.num_bytes for each in counted.found] == [2 * 96 * 4, 48 * 4]
    counted.found.clear()
    pooled = torch.zeros(2, 3, 4, 4).requires_grad_()
    tensors = [torch.zeros(3) for _ in range(111)]
    large = [torch.zeros(401_408)]
    with counted:
        torch.autograd.grad(functional.max_pool2d(pooled, 2).sum(), pooled)
        torch._foreach_add_(tensors, 1)
        torch._foreach_add_(large, 1)
    names = [each.name for each in counted.found]
    assert names.count("max_pool2d_with_indices_backward (zeros)") == 1
    many, one = counted.found[-2:]
    assert many.launches == 2, "110 tensors fit into a launch of one list"
    assert one.launches == 1 and one.turns == 32


def test_the_step_is_that_of_training() -> None:
    """Each launch is a K-th of a launch of K steps, whatever K; kernels make it fewer."""
    settings = {"step.precision": "bf16", "step.cuda_graphs": True, "kernels": "all"}
    found = {}
    for steps in (1, 2):
        config = override(RunConfig(), settings | {"step.steps_per_launch": steps}, "test")
        operations = step_operations(config, 8, H100.processors)
        found[steps] = {(each.name, each.num_bytes): each.launches for each in operations}
        assert sum(each.flops for each in operations) == pytest.approx(8 * 25.06e6, rel=0.001)
    names = [name for name, _ in found[1]]
    kernels = ("gather_warp_forward", "conv_pool_relu_backward_sum", "bias_pool_relu_backward",
               "softmax_cross_entropy_forward_sum")  # fmt: skip
    assert all(names.count(kernel) == 1 for kernel in kernels)
    assert not {"zeros", "max_pool2d_with_indices", "_log_softmax"} & set(names)
    head = sum(found[1].values()) - sum(found[2].values())
    assert 2 < 2 * head < 12, "what a launch does once is shared by its steps"


def test_the_committed_ledger_is_what_is_counted() -> None:
    """Two of its rows, one of them launch by launch; the command makes all of it anew."""
    kept = ledger.read_ledger()
    if kept.torch != ledger.torch_version():
        pytest.skip(f"counted with torch {kept.torch}")
    remedy = "tools/profile ledger --out bench_configs/results/ledger.json"
    _, cells = ledger.read_cells([ledger.ROWS])
    assert [(row.name, row.batch) for row in kept.rows] == [
        (cell.rung, cell.axes["batch"]) for cell in cells
    ], remedy
    for name, batch in ((ledger.PLAIN, 64), (ledger.ALL_KERNELS, ledger.DETAILED_BATCH)):
        cell = next(c for c in cells if (c.rung, c.axes["batch"]) == (name, batch))
        assert ledger.counted(cell, kept.machine) == kept.of(name, batch), remedy
    assert ledger.launches_table(kept) in (ROOT / "kernels" / "README.md").read_text(), remedy


def test_a_launch_takes_the_longest_of_three() -> None:
    base = Operation(name="x", read_bytes=1e6, write_bytes=2e6, dtype="bf16")
    assert H100.us(base) == pytest.approx(1 + 2), "3 MB at 3 TB/s, and the launch"
    assert H100.us(replace(base, turns=33)) == pytest.approx(32 * 0.7 + 2)
    product = replace(base, flops=0.81 * 989e12 / 1e4)
    assert H100.us(product) == pytest.approx(100 + 2)
    assert H100.us(replace(product, name="convolution")) > H100.us(product)
    assert H100.us(replace(product, dtype="fp32")) > 10 * H100.us(product)
    three = Operation(name="x", launches=3, read_bytes=3e6, write_bytes=6e6)
    assert H100.us(three) == pytest.approx(3 * 3)


def test_what_a_gpu_measured_stands_beside_the_model() -> None:
    kept = ledger.read_ledger()
    row = kept.of(ledger.ALL_KERNELS, 2048)
    facts = environment(num_threads=1, allocator="", gpu={})
    rates = (4e6, 5e6, 6e6)
    repetitions = [Repetition(seed=0, environment=facts, samples_per_s=rate) for rate in rates]
    cell = CellResult(id="c000", name="of a GPU", ladder=True, axes={"batch": 2048, "ranks": 1},
                      settings=row.settings | {"data.feed": "resident"},
                      repetitions=repetitions)  # fmt: skip
    profile = Profile(title="", command="", cells=[cell])
    shown = ledger.to_markdown(kept, "x", profile)
    assert shown.count("5,000,000 |") == 1 and "not measured" in shown
    assert shown.count("| not yet measured |") == len(kept.rows) - 1
    assert ledger.to_markdown(kept, "x").count("| not yet measured |") == len(kept.rows)


def test_the_command_counts_a_matrix(command: Command, tmp_path: Path) -> None:
    matrix = tmp_path / "small.toml"
    out = tmp_path / "ledger.json"
    matrix.write_text(SMALL.format(name="plain", settings='"optim.fused" = false'))
    done = command("tools/profile", "ledger", matrix, "--out", out)
    assert done.returncode == 0, done.stderr
    found = ledger.read_ledger(out)
    assert found.rows[0].launches > 50 and not found.claims
    assert f"| plain | 8 | {found.rows[0].launches:.1f} |" in done.stdout
    refused = command("tools/profile", "ledger", matrix, "--gpu", "NVIDIA H100")
    assert_refused(refused, "choose from NVIDIA H100 80GB HBM3")
    matrix.write_text(SMALL.format(name="fp8", settings='"step.precision" = "fp8"'))
    refused = command("tools/profile", "ledger", matrix, "--gpu", "NVIDIA A100-SXM4-80GB")
    assert_refused(refused, "fp8: NVIDIA A100-SXM4-80GB has no fp8; name another --gpu")
    matrix.write_text(SMALL.format(name="compiled", settings='"step.compile" = "default"'))
    assert_refused(command("tools/profile", "ledger", matrix), "leave out step.compile")


def test_a_damaged_ledger_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ledger.json"
    file.write_text(ledger.RESULT.read_text()[:-2])
    with pytest.raises(UserError, match="make it anew"):
        ledger.read_ledger(file)
