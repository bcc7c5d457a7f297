"""`engine.loader`: the feeds' batches, going on to the sample, in other people's training loops.

What needs ranks is done by one pair, `torchrun -m tests.test_iterable RECORDS FOLDER`: a loop with
torch's DDP, one with Lightning Fabric and one with Hugging Face accelerate, whose weights must be
those of one process with both ranks' samples.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import engine
from engine.config import RunConfig, override
from engine.data.records import Records
from engine.errors import UserError
from engine.feeds.build import make_order
from engine.feeds.iterable import Loader, Samples, _device
from engine.host import ROOT, end_rank
from engine.report import read_report
from tests.conftest import child
from tests.test_house import modules

SEED = 11
BLOCKED = {"data.order": "blocked", "data.block_samples": 20, "data.window_blocks": 3}
STRATIFIED = {"data.order": "stratified", "data.loader_workers": 0}
PAIR_BATCH = 16
RATE = 0.05
WAYS = {"DDP": "torch", "Fabric": "lightning_fabric", "accelerate": "accelerate"}
"""The loops of the pair, and the package that each needs."""


def ids_of(batches: Iterator[Samples]) -> list[list[int]]:
    return [id_B.tolist() for _, _, id_B in batches]


def whole_epoch(records: Records, epoch: int, settings: dict[str, Any]) -> list[int]:
    """An epoch's ids in the order of all ranks, one after the other."""
    config = override(RunConfig(), {**settings, "global_batch": 1, "seed": SEED}, "test")
    order = make_order(config, records.split("train"), 0, 1)
    ids: list[int] = order.ids(epoch, 0, order.steps_per_epoch).ravel().tolist()
    return ids


def made(
    records: Records | Path, batch_size: int, num_ranks: int = 1, **given: Any
) -> list[Loader]:
    """The loaders of all ranks."""
    common: dict[str, Any] = {"batch_size": batch_size, "seed": SEED, "world_size": num_ranks}
    return [engine.loader(records, rank=rank, **(common | given)) for rank in range(num_ranks)]


def test_batches_are_the_records_in_another_order_each_epoch(small: Records) -> None:
    (loader,) = made(small, 32)
    train = small.split("train")
    epochs = []
    for epoch in range(2):
        seen = []
        for image_BHW, label_B, id_B in loader:
            assert image_BHW.dtype == torch.uint8 and label_B.dtype == torch.int64
            assert np.array_equal(image_BHW, train.image_NHW[id_B.numpy()])
            assert np.array_equal(label_B, train.label_N[id_B.numpy()])
            seen += id_B.tolist()
        assert len(seen) == len(loader) * 32
        assert seen == whole_epoch(small, epoch, {})[: len(seen)]
        epochs.append(seen)
    assert epochs[0] != epochs[1] and loader.epoch == 2


@pytest.mark.parametrize(
    ("feed", "settings", "batch_size", "num_ranks"),
    [
        ("auto", {}, 32, 1),
        ("auto", {}, 16, 4),
        ("auto", {}, 200, 1),
        ("loader", STRATIFIED, 15, 1),
        ("stream", BLOCKED, 32, 1),
        ("stream", BLOCKED, 5, 3),
        ("stream", BLOCKED, 200, 1),
        ("dali", BLOCKED, 5, 3),
    ],
)
def test_an_epoch_goes_on_to_the_sample(
    feed: str,
    settings: dict[str, Any],
    batch_size: int,
    num_ranks: int,
    small: Records,
    small_dir: Path,
) -> None:
    """Saved by 2 ranks after 96 samples of epoch 1; by other batches, ranks and feeds."""
    saved = made(small, 16, 2, settings=settings)
    for loader in saved:
        loader.set_epoch(1)
        assert len(list(islice(loader, 3))) == 3
    states = [json.dumps(loader.state_dict()) for loader in saved]
    assert states[0] == states[1]
    others = made(small_dir, batch_size, num_ranks, feed=feed, settings=settings)
    for loader in others:
        loader.load_state_dict(json.loads(states[0]))
        loader.set_epoch(1)  # as loops do before each epoch
    batch = batch_size * num_ranks
    for epoch, start in ((1, 96), (2, 0)):
        wanted = whole_epoch(small, epoch, settings)[start:]
        assert together(others) == wanted[: len(wanted) // batch * batch]
    for loader in others:
        loader.close()


def together(loaders: list[Loader]) -> list[int]:
    """The ids of an epoch's rest over all ranks, in the global order."""
    steps = zip(*(ids_of(iter(loader)) for loader in loaders), strict=True)
    return [number for step in steps for part in step for number in part]


def test_evaluation_counts_each_sample_once(small: Records) -> None:
    num = len(small.split("val"))
    for batch_size, num_ranks in ((20, 1), (20, 3), (num, 2)):
        loaders = made(small, batch_size, num_ranks, split="val")
        for _ in range(2):
            assert together(loaders) == list(range(num))
    (first, second) = made(small, 20, 2, split="val")
    assert [len(part) for part in ids_of(iter(first))] == [20, 8]
    assert [len(part) for part in ids_of(iter(second))] == [20, 0]
    next(iter(first))
    (alone,) = made(small, 7, split="val")
    alone.load_state_dict(first.state_dict())
    assert together([alone]) == list(range(40, num))


def test_where_an_iteration_begins(small: Records) -> None:
    (loader,) = made(small, 32)
    epochs = [whole_epoch(small, epoch, {}) for epoch in range(6)]

    def first() -> list[int]:
        return next(iter(loader))[2].tolist()

    assert first() == epochs[0][:32]
    assert first() == epochs[1][:32], "an epoch that was left early is over"
    loader.set_epoch(1)
    assert first() == epochs[1][:32], "unless it is asked for again"
    loader.set_epoch(5)
    assert first() == epochs[5][:32]
    state = loader.state_dict()
    loader.set_epoch(3)
    loader.load_state_dict(state)
    assert first() == epochs[5][32:64]
    ends = iter(loader)
    assert len(list(ends)) == len(loader)
    loader.load_state_dict(state | {"num_samples": len(loader) * 32})
    assert list(loader) == [] and loader.epoch == 6, "saved at its last batch, an epoch is done"


@pytest.mark.parametrize("epoch", [-1, 1.5, "2"])
def test_an_epoch_is_a_whole_number(epoch: Any, small: Records) -> None:
    (loader,) = made(small, 32)
    with pytest.raises(UserError, match="loader: epoch is .*; give a whole number from 0 on"):
        loader.set_epoch(epoch)
    assert loader.epoch == 0


def test_an_old_iteration_says_that_it_is_over(small: Records) -> None:
    (loader,) = made(small, 32)
    old = iter(loader)
    next(old)
    for moved in (lambda: next(iter(loader)), lambda: loader.set_epoch(7)):
        with pytest.raises(RuntimeError, match="this iteration is over: .*make a loader for each"):
            moved()
            next(old)
        old = iter(loader)
        next(old)


def test_a_batch_is_overwritten_unless_it_owns_its_tensors(small: Records) -> None:
    train = small.split("train")
    for owns in (False, True):
        (loader,) = made(small, 32, own_tensors=owns)
        kept = list(loader)
        same = [
            np.array_equal(image_BHW, train.image_NHW[id_B.numpy()]) for image_BHW, _, id_B in kept
        ]
        assert all(same)
        for each in zip(*kept, strict=True):
            assert len({tensor.data_ptr() for tensor in each}) == (len(kept) if owns else 1)


def test_the_loop_of_the_readme_runs(small: Records, small_dir: Path) -> None:
    text = (ROOT / "engine" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for shown, small_one in (('"records"', repr(str(small_dir))), ("size=512", "size=32")):
        code = code.replace(shown, small_one)
    model = network(small)
    names: dict[str, Any] = {"cross_entropy": cross_entropy}
    names["network"] = lambda images: model(images.float())
    exec(code, names)
    assert names["state"]["epoch"] == 3 and names["state"]["num_samples"] == 7 * 32
    assert names["loss"].requires_grad


def test_settings_are_those_of_a_run(small: Records) -> None:
    (plain,), (turned,) = made(small, 32), made(small, 32, settings={"augment.rotate_degrees": 20})
    for (image_BHW, _, id_B), (other_BHW, _, other_B) in zip(plain, turned, strict=True):
        assert torch.equal(id_B, other_B) and not torch.equal(image_BHW, other_BHW)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"batch_size": 225},
            "a batch of 225 on 1 rank.* larger than train of 224 samples; .* 224",
        ),
        ({"batch_size": 100, "rank": 0, "world_size": 3}, "larger than .* at most 74"),
        ({"batch_size": 1, "rank": 0, "world_size": 300}, "give fewer ranks"),
        ({"batch_size": 0}, "batch_size is 0; give a whole number"),
        ({"batch_size": "32"}, "batch_size is '32'"),
        ({"rank": 2, "world_size": 2}, "no rank 2 of 2; ranks count from 0"),
        ({"rank": -1, "world_size": 2}, "no rank -1 of 2"),
        ({"rank": 0}, "rank is 0 and world_size is None; give both"),
        ({"feed": "fast"}, "data.feed: is 'fast'; choose one of auto, resident"),
        ({"feed": "stream"}, "set data.order=blocked too"),
        ({"feed": "stream", "settings": BLOCKED}, "open them with in_memory=False"),
        ({"seed": -1}, "seed is -1; give a value from 0"),
        ({"settings": {"optim.name": "adam"}}, "optim.name is no setting of a loader"),
        ({"settings": {"data.order": "random"}}, "data.order: is 'random'; choose one of exact"),
        ({"settings": {"augment.turn": 3}}, "augment.turn: unknown setting"),
        ({"split": "dev"}, "there is no split 'dev'; choose one of train, val, test"),
        ({"device": "gpu"}, "there is no device 'gpu'"),
        ({"device": "meta"}, "device meta: torch has none here"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    given: dict[str, Any], sentence: str, small: Records
) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        engine.loader(small, **({"batch_size": 32} | given))
    assert "\n" not in str(refused.value)


def test_each_rank_has_a_gpu_of_its_own_under_any_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun says which; a process that something else started has chosen one itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert _device(None) == torch.device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert _device(None) == torch.device("cuda:3")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="device cuda:4: torch has none here; give the one of this"):
        _device(None)


def test_records_on_disk_need_the_stream_feed(small_dir: Path) -> None:
    stored = engine.open_records(small_dir, in_memory=False)
    with pytest.raises(UserError, match="cannot read records that are opened so; .*in_memory=True"):
        engine.loader(stored, batch_size=32, feed="resident")
    with pytest.raises(UserError, match="no such record directory"):
        engine.loader(small_dir / "missing", batch_size=32)
    with pytest.raises(TypeError, match="unexpected keyword argument 'spilt'"):
        engine.loader(stored, batch_size=32, spilt="val")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dataset_fingerprint": "00" * 32}, "is of data 0000.*, not "),
        ({"seed": 12}, "is of seed 12, not 11; make the loader as that one was"),
        ({"split": "val"}, "is of split val, not train"),
        ({"order": "stratified"}, "is of order stratified, not exact"),
        ({"num_samples": 225}, "after 225 samples of an epoch of 224"),
        ({"num_samples": -1}, "after -1 samples of an epoch of 224"),
        ({"epoch": "1"}, "is no state of one .*epoch is '1'"),
        ({"epoch": None}, "is no state of one"),
        ({"format": 2}, "is no state of one .*format is 2, not one of 1"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    change: dict[str, Any], sentence: str, small: Records
) -> None:
    (loader,) = made(small, 32)
    next(iter(loader))
    before = loader.state_dict()
    with pytest.raises(UserError, match=sentence):
        loader.load_state_dict(before | change)
    with pytest.raises(UserError, match="is no state of one"):
        loader.load_state_dict([1, 2])  # type: ignore[arg-type]
    assert loader.state_dict() == before


def test_an_empty_split_has_no_loader(small: Records) -> None:
    nothing = small.split("val").take(np.arange(0))
    empty = replace(small, splits=small.splits | {"val": nothing})
    with pytest.raises(UserError, match="no image in val; name another split"):
        engine.loader(empty, batch_size=1, split="val")


def test_the_package_is_cheap_to_import() -> None:
    code = """
import sys, engine
heavy = {"torch", "numpy", "pandas", "pyarrow", "click"} & set(sys.modules)
assert not heavy, heavy
assert engine.RunConfig.__module__ == "engine.config" and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_there() -> None:
    """A module of the same name as one of them would hide it."""
    assert set(engine.__all__) <= set(dir(engine))
    for name, module in modules("engine").items():
        parent, _, own = name.rpartition(".")
        assert parent != "engine" or own not in engine.__all__, module
    assert all(callable(getattr(engine, name)) for name in engine.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        engine.nothing  # noqa: B018


def test_a_trainer_is_opened_by_its_public_name(small: Records, tmp_path: Path) -> None:
    config = RunConfig(global_batch=32, epochs=1)
    with engine.Trainer.opened(config, small, tmp_path / "run") as trainer:
        report = trainer.fit(resume=False)
    assert report.num_steps == read_report(tmp_path / "run").num_steps == 7
    with (
        pytest.raises(UserError, match="holds a run"),
        engine.Trainer.opened(config, small, tmp_path / "run"),
    ):
        pass
    ramp = replace(config.optim, batch_schedule="ramp", batch_ramp="32x1")
    with (
        pytest.raises(UserError, match="train it with engine.run"),
        engine.Trainer.opened(replace(config, optim=ramp), small, tmp_path / "other"),
    ):
        pass


def network(records: Records) -> nn.Module:
    torch.manual_seed(0)
    height, width = records.height_width
    return nn.Sequential(nn.Flatten(), nn.Linear(height * width, len(records.classes)))


def trained(
    records: Records,
    batch_size: int,
    wrap: Callable[[nn.Module, torch.optim.Optimizer], tuple[nn.Module, torch.optim.Optimizer]],
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward,
) -> tuple[torch.Tensor, list[int]]:
    """What any loop does, for an epoch: the first layer's weight, and the ids that it saw."""
    own = network(records)
    model, optimizer = wrap(own, torch.optim.SGD(own.parameters(), lr=RATE))
    ids: list[int] = []
    for image_BHW, label_B, id_B in engine.loader(records, batch_size=batch_size, seed=SEED):
        loss = cross_entropy(model(image_BHW.float() / 255), label_B)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        ids += id_B.tolist()
    return own[1].weight.detach().clone(), ids  # type: ignore[index]


def with_ddp(records: Records, folder: str) -> tuple[torch.Tensor, list[int]]:
    return trained(records, PAIR_BATCH, lambda own, opt: (DistributedDataParallel(own), opt))


def with_fabric(records: Records, folder: str) -> tuple[torch.Tensor, list[int]]:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
    fabric.launch()
    return trained(records, PAIR_BATCH, fabric.setup, fabric.backward)


def with_accelerate(records: Records, folder: str) -> tuple[torch.Tensor, list[int]]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == dist.get_world_size()
    loader = engine.loader(records, batch_size=PAIR_BATCH, seed=SEED)
    assert accelerator.prepare(loader) is loader, "it would be divided once more"
    accelerator.register_for_checkpointing(loader)
    next(iter(loader))
    state = loader.state_dict()
    accelerator.save_state(f"{folder}/accelerate")
    accelerator.wait_for_everyone()  # the first rank saves what all load
    loader.set_epoch(5)
    accelerator.load_state(f"{folder}/accelerate")
    assert loader.state_dict() == state, "its own checkpoints keep where a loader stands"
    return trained(records, PAIR_BATCH, accelerator.prepare, accelerator.backward)


LOOPS = {"DDP": with_ddp, "Fabric": with_fabric, "accelerate": with_accelerate}


@pytest.mark.slow
def test_loops_of_ddp_fabric_and_accelerate_train_as_one_process(
    small: Records, small_dir: Path, tmp_path: Path
) -> None:
    words = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "tests.test_iterable"]
    done = child([*words, str(small_dir), str(tmp_path)], {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    weight, ids = trained(small, 2 * PAIR_BATCH, lambda own, opt: (own, opt))
    missing = [way for way, package in WAYS.items() if find_spec(package) is None]
    assert not missing or os.environ.get("CI") != "true", "they are in pyproject's group `test`"
    for way in set(WAYS) - set(missing):
        parts = [json.loads((tmp_path / f"{way}-{rank}.json").read_bytes()) for rank in range(2)]
        for part in parts:
            assert np.abs(np.array(part["weight"]) - weight.numpy()).max() < 1e-6, way
        steps = [np.reshape(part["ids"], (-1, PAIR_BATCH)) for part in parts]
        assert np.concatenate(steps, axis=1).ravel().tolist() == ids, way
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; the other loops are the same")


def main(records_dir: str, folder: str) -> None:
    """One rank of the pair."""
    dist.init_process_group("gloo")
    records = engine.open_records(records_dir)
    for way, package in WAYS.items():
        if find_spec(package):
            weight, ids = LOOPS[way](records, folder)
            found = {"weight": weight.tolist(), "ids": ids}
            path = Path(folder) / f"{way}-{dist.get_rank()}.json"
            path.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    end_rank(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
