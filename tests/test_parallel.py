"""--parallel fsdp: two real ranks leave what DDP leaves, in the same files; what gives way is said.

All that needs ranks is done by one pair, `torchrun -m tests.test_parallel RECORDS FOLDER`, which
leaves tensors and facts in FOLDER. Four ranks are compared by tools/verify parity.
"""

import json
import shutil
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine.config import RunConfig, override
from engine.data.records import Records, open_records
from engine.errors import UserError
from engine.host import end_rank
from engine.models import Network
from engine.models.columns import Columns
from engine.models.vit import VitNet
from engine.report import read_report
from engine.train import parallel
from engine.train.available import effective_config
from engine.train.checkpoint import FILES, deal_out, whole_tensors
from engine.train.folder import checkpoints
from engine.train.objective import Objective
from engine.train.parallel import large_blocks, own_part
from engine.train.session import Session, evaluate, open_session
from engine.train.state import Tensors
from engine.train.trainer import Trainer, fit
from engine.world import World, start_world
from kernels import cpu
from tests.conftest import FAST_PRECISION, child

CPU = torch.device("cpu")
BATCH = 32
"""Seven steps an epoch of the tiny records."""
BLOCK = 2**14
"""Parameters of a large block here: less than those of the smallest vit."""
FSDP = {"step.parallel": "fsdp"}
NCHW = {"model.name": "baseline", "step.channels_last": False}
VIT = {"model.name": "vit", "model.vit_patch_pixels": 4, "step.channels_last": False}
ONCE = {"step.reshard_after_forward": False, "optim.name": "adam", "optim.fused": False}
CASES: dict[str, dict[str, Any]] = {
    "plain": NCHW,
    "frozen layer, NHWC": {"model.first_layer": "whitened"},
    "BatchNorm, two parts": NCHW | {"model.name": "residual", "step.accumulate": 2},
    "blocks": VIT,
    "half precision, gathered once": VIT | ONCE | {"step.precision": FAST_PRECISION},
}
ALLOWED = {"frozen layer, NHWC": 1e-5, "half precision, gathered once": 2e-2}
"""Relative differences of losses, else 1e-6: FSDP's weights are NCHW, whose gradient a convolution
adds in another order; and its blocks compute in bf16 with their norms."""
RUN = RunConfig(global_batch=BATCH, epochs=2, seed=5)


def quiet(line: str) -> None:
    pass


def opened(records: Records, world: World, settings: dict[str, Any]) -> Session:
    common = {"global_batch": BATCH, "data.feed": "resident", "optim.learning_rate": 1e-3}
    return open_session(override(RunConfig(), common | settings, "test"), records, world)


def left_by(session: Session) -> Tensors:
    """Losses of an epoch, its evaluation, and what a checkpoint would hold, whole."""
    for _ in session.step.train_epoch(session.feed, 0):
        pass
    losses = torch.from_numpy(session.step.read_training().loss_S.copy())
    loss, accuracy = evaluate(session, "val")
    found = {"losses": losses, "evaluation": torch.tensor([loss, accuracy])}
    whole = {name: tensor for _, name, tensor in whole_tensors(session.step.state)}
    return found | {name: tensor.detach().contiguous() for name, tensor in whole.items()}


def train_both_ways(records: Records, world: World, folder: Path) -> None:
    """Every case by DDP and by FSDP."""
    for name, settings in CASES.items():
        for side, changed in (("ddp", {}), ("fsdp", FSDP)):
            with closing(opened(records, world, settings | changed)) as session:
                left = left_by(session)
                parts = [own_part(p) is not p for p in session.step.model.parameters()]
                assert all(parts) if changed else not any(parts), name
            world.first(partial(save_file, left, folder / f"{name}, {side}.safetensors"))


def bad_of_all(records: Records, world: World) -> list[float]:
    """What both ranks find, and by how much they step, where the last one's part is infinite."""
    with closing(opened(records, world, FSDP)) as session:
        step = session.step
        next(step.train_epoch(session.feed, 0))
        parameters = list(step.model.parameters())
        assert parameters[-1].grad is not None
        if world.rank == world.size - 1:
            own_part(parameters[-1].grad).fill_(float("inf"))
        before = [own_part(p).clone() for p in parameters]
        bad = torch.zeros(())
        step._update(bad)
        moved = sum(
            float((own_part(p) - b).abs().sum()) for p, b in zip(parameters, before, strict=True)
        )
    return [*world.sum(bad.reshape(1)).tolist(), *world.most([moved])]


def save_while_busy(records: Records, world: World, out: Path) -> int:
    """Checkpoints left by a saver that was busy when a save was due: no rank waits for another."""
    with closing(opened(records, world, FSDP)) as session:
        trainer = Trainer(session, out, quiet)
        if trainer.saver:
            trainer.saver._idle.clear()
        trainer._save(wait=False)
        world.synchronize()
        if trainer.saver:
            trainer.saver.close()
    return len(checkpoints(out))


class Scalar(Network):
    """Has a parameter that is a single number."""

    def __init__(self, height: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def refusal(network: Network, world: World) -> str:
    """What a network is refused with."""
    config = override(RunConfig(), FSDP, "test")
    with pytest.raises(UserError) as refused:
        parallel.shard(Objective(network, config, CPU), config.step, world)
    return str(refused.value)


def read_back(records: Records, world: World, stored: Path, out: Path) -> None:
    """Take up a checkpoint, and leave it again as this pair has it."""
    files = {file: load_file(stored / file) for file in FILES} if world.is_first else {}
    files.get("optim.safetensors", {}).pop("log/loss_S", None)
    with closing(opened(records, world, FSDP)) as session:
        state = session.step.state
        deal_out(state, files, world)
        again = {name: tensor for _, name, tensor in whole_tensors(state)}
    world.first(lambda: save_file({n: t.contiguous() for n, t in again.items()}, out))


def rank_main(records: Records, folder: Path) -> None:
    """What both ranks do; `folder` holds a run of one epoch of one rank, which is gone on with."""
    with start_world("cpu") as world:
        read_back(records, world, checkpoints(folder / "one")[0], folder / "again.safetensors")
        sharded = override(RUN, FSDP, "test")
        first = override(sharded, {"epochs": 1, "schedule_epochs": 2}, "test")
        fit(first, records, world, folder / "two", resume=False, say=quiet)
        fit(sharded, records, world, folder / "one", resume=True, say=quiet)
        facts = {
            "bad": bad_of_all(records, world),
            "saved": save_while_busy(records, world, folder / "busy"),
            "scalar": refusal(Scalar(28, 28, 8), world),
            "double": refusal(VitNet(28, 28, 8).double(), world),
        }
        parallel.LARGE = BLOCK
        train_both_ways(records, world, folder)
        world.first(lambda: (folder / "facts.json").write_text(json.dumps(facts)))
    end_rank()


def run_first_epoch(records: Records, world: World, out: Path) -> None:
    """Of two, on one rank."""
    first = override(RUN, {"epochs": 1, "schedule_epochs": 2}, "test")
    fit(first, records, world, out, resume=False, say=quiet)


@pytest.fixture(scope="module")
def pair(tiny_dir: Path, tiny: Records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two ranks left."""
    folder = tmp_path_factory.mktemp("pair")
    for name in ("one", "two", "busy"):
        (folder / name).mkdir()
    run_first_epoch(tiny, World(rank=0, size=1, device=CPU, stream=None), folder / "one")
    shutil.copytree(folder / "one", folder / "kept")
    words = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "tests.test_parallel"]
    done = child([*words, str(tiny_dir), str(folder)], {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference over the norm."""
    difference = (got.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm().clamp(min=1e-12))


@pytest.mark.parametrize("case", CASES)
def test_fsdp_is_the_training_that_ddp_is(case: str, pair: Path) -> None:
    wanted, got = (load_file(pair / f"{case}, {side}.safetensors") for side in ("ddp", "fsdp"))
    assert {name: t.shape for name, t in got.items()} == {n: t.shape for n, t in wanted.items()}
    allowed = ALLOWED.get(case, 1e-6)
    assert distance(got["losses"], wanted["losses"]) <= allowed
    assert distance(got["evaluation"], wanted["evaluation"]) <= 10 * allowed
    far = {name: distance(tensor, wanted[name]) for name, tensor in got.items()}
    # In half precision gradients that are 0 but for rounding differ.
    if case != "half precision, gathered once":
        assert max(far.values()) <= 1000 * allowed, far


def test_a_run_goes_on_with_either_on_any_number_of_ranks(
    pair: Path, tiny: Records, world: World, tmp_path: Path
) -> None:
    """Each second epoch where the first was the other's: as one rank alone trains both."""
    whole = tmp_path
    fit(RUN, tiny, world, whole, resume=False, say=quiet)
    fit(RUN, tiny, world, pair / "two", resume=True, say=quiet)
    wanted = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for out in ("one", "two"):
        lines = (pair / out / "metrics.jsonl").read_text().splitlines()
        for got, want in zip(map(json.loads, lines), wanted, strict=True):
            assert got["train_loss"] == pytest.approx(want["train_loss"], rel=1e-3)
            assert got["val_loss"] == pytest.approx(want["val_loss"], rel=1e-2)
        segments = read_report(pair / out).segments
        assert {s.effective["parallel"] for s in segments} == {"ddp", "fsdp"}
        assert (
            load_file(pair / out / "model.safetensors").keys()
            == load_file(whole / "model.safetensors").keys()
        )


def test_a_checkpoint_is_dealt_out_and_gathered_to_the_bit(pair: Path) -> None:
    stored = checkpoints(pair / "kept")[0]
    files = {name: t for file in FILES for name, t in load_file(stored / file).items()}
    again = load_file(pair / "again.safetensors")
    assert again.keys() == files.keys() - {"log/loss_S"}
    assert [n for n in again if not torch.equal(again[n].flatten(), files[n].flatten())] == []


def test_the_report_says_what_a_rank_keeps(pair: Path) -> None:
    report = read_report(pair / "one")
    kept, whole = report.kept, report.kept_under_ddp
    assert kept and whole
    assert whole.parameters_bytes == whole.gradients_bytes == 4 * report.num_parameters
    assert 0.5 <= kept.total_bytes / whole.total_bytes < 0.51  # of 28 x 28 and 8 classes
    saved_mb = (whole.total_bytes - kept.total_bytes) / 1e6
    millions = report.num_parameters / 1e6
    sentence = f"at {millions:.2f} M parameters FSDP saves at most {saved_mb:.1f} MB a rank"
    assert sentence in report.notes


def test_what_one_rank_finds_bad_stops_the_step_of_all(pair: Path) -> None:
    """A rank sees its part of the gradients: one that steps alone would leave two networks."""
    facts = json.loads((pair / "facts.json").read_text())
    assert facts["bad"] == [2.0, 0.0]


def test_a_busy_saver_keeps_no_rank_waiting(pair: Path) -> None:
    assert json.loads((pair / "facts.json").read_text())["saved"] == 0


def test_parameters_that_cannot_be_divided_are_refused_by_name(pair: Path) -> None:
    facts = json.loads((pair / "facts.json").read_text())
    assert facts["scalar"] == (
        "--parallel fsdp: the network's parameter scale is a single number, which has no rows to "
        "divide; make it of shape [1], or use --parallel ddp"
    )
    assert "position_TD is float64; make it float32" in facts["double"]


@pytest.mark.parametrize(
    ("num_ranks", "settings", "changes", "note"),
    [
        (1, {}, {"step.parallel": "ddp"}, "there is one rank, which keeps everything"),
        (2, {"step.canonical": 2}, {"step.parallel": "ddp"}, "adds whole gradients"),
        (2, {"step.noise_scale": True}, {"step.parallel": "ddp"}, "norms of whole gradients"),
        (2, {"step.compile": "default"}, {"step.compile": "off"}, "torch.compile is not used"),
        (2, {"kernels": ["adamw"]}, {"kernels": ()}, "the kernel adamw is not used"),
    ],
)
def test_what_gives_way_to_what_is_said(
    num_ranks: int,
    settings: dict[str, Any],
    changes: dict[str, Any],
    note: str,
    tiny: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the kernel adamw runs, where Triton is there
    world = World(rank=0, size=num_ranks, device=CPU, stream=None)
    config = override(RunConfig(global_batch=BATCH), FSDP | settings, "test")
    found, notes = effective_config(config, tiny, world)
    for name, value in changes.items():
        section, _, setting = name.rpartition(".")
        assert getattr(getattr(found, section) if section else found, setting) == value
    assert any(note in text for text in notes), notes


def test_blocks_are_large_or_left_to_the_rest() -> None:
    assert large_blocks(VitNet(28, 28, 94)) == []
    base = VitNet(28, 28, 94, size="base")
    assert large_blocks(base) == list(base.blocks)
    nested = nn.Sequential(nn.Linear(1024, 1024), nn.ModuleList([nn.Linear(8, 8)]))
    assert large_blocks(nn.ModuleDict({"a": nested})) == [nested[0]]


def test_columns_of_plain_weights_add_up_as_their_input_lies() -> None:
    """FSDP's weights are NCHW: the sum over NHWC columns is the same to the bit all the same."""
    layer = Columns((8, 3, 3), 5)
    x_BCHW = torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    plain = layer(x_BCHW)
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert torch.equal(plain, layer(x_BCHW))


def test_numpy_holds_no_parameter_that_fsdp_frees() -> None:
    if not cpu.is_here():
        pytest.skip("numba is not installed")
    bias_C = torch.zeros(32)
    cpu.bias_pool_relu(torch.zeros(1, 32, 4, 4), bias_C)
    bias_C.untyped_storage().resize_(0)


if __name__ == "__main__":
    rank_main(open_records(Path(sys.argv[1])), Path(sys.argv[2]))
