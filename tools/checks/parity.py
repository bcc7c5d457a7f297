"""tools/verify parity: every fast way of training is the training of the eager step on one rank.

A variant trains two epochs of 9 steps on the same samples and leaves its *state*: the loss of each
step, the gradients of the last, parameters, optimiser, loss scale, counters. Each is compared with
the reference's. Ranks are processes of `torchrun -m tools.checks.parity FOLDER DEVICE MODEL
PRECISION...`, which leave their state as FOLDER/<precision>.safetensors, and that of a canonical
training, which has a reference of its own, as FOLDER/<precision>-canonical.safetensors, and that of
sharded parameters (--parallel fsdp) as FOLDER/<precision>-fsdp.safetensors. With
BatchNorm, parts of a batch are normalised by themselves: several ranks are then compared with one
that has as many canonical shards.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from engine.config import RunConfig, override
from engine.data.records import Records, open_records
from engine.data.sample import ensure_sample
from engine.errors import UserError
from engine.host import end_rank
from engine.late_dynamo import import_late
from engine.train.checkpoint import checkpoint_tensors, load_checkpoint, write_checkpoint
from engine.train.folder import Manifest, Position
from engine.train.parallel import whole
from engine.train.session import open_session
from engine.train.step import TrainStep
from engine.world import World, cannot_fuse, fused_on_cpu, start_world
from tools.measure.runner import module_on_ranks
from tools.measure.steps import train_epochs

BATCH = 128
STEPS = 9
EPOCHS = 2
K = 4
"""Two launches of four steps per epoch, and one of one."""
RANKS: dict[int, tuple[str, dict[str, Any]]] = {
    1: ("torchrun, 1 rank", {}),
    2: (f"2 ranks, {K} steps per launch", {"step.steps_per_launch": K}),
    4: ("4 ranks, each batch in 2 parts", {"step.accumulate": 2}),
}
"""Numbers of ranks, and what else is different there."""
NUM_SHARDS = 4
FUSED = {"kernels": "all", "step.cuda_graphs": True, "step.steps_per_launch": K}
GROUPS = ("loss", "parameters", "gradients", "optimiser", "scaler", "counters")
TOLERANCE = {
    "fp32": (1e-3, 1e-2),
    "tf32": (1e-2, 1e-1),
    **dict.fromkeys(("bf16", "fp16", "fp8"), (5e-2, 5e-1)),
}
"""For what adds in another order (ranks, fused layers): of losses and parameters, of gradients
and optimiser.

The largest norm of a difference over the norm, over the tensors of a group; scaler and counters
must be equal. Measured with 4 ranks on two cores: 1e-5 and 6e-4 in fp32, 8e-3 and 0.3 in bf16,
where each rank rounds its sums to 8 bits; in fp8, whose ranks and parts scale by numbers of their
own, 1e-2 and 0.24, with fused layers 3e-2 and 0.40.
"""
RUNNING = ".running_mean"
AMPLIFIED = (1e-1, 5e-1)
"""What parameters, and gradients and optimiser, may differ by at least where a network with
BatchNorm adds in another order; losses keep their tolerance.

Such a network amplifies rounding: weights nudged by 1e-7 at the start, on one rank with 8 shards
of 16 samples, end 18 steps later with 3e-2, 2e-1 and a loss that differs by 7e-5; 4 ranks with
their batches in 2 parts, 3e-2, 2e-1 and 8e-5.

So do fused layers: of four nearly equal values another may win the pool, and Adam's first steps are
as large for a small gradient as for a large one. Measured on two cores in fp32: 1e-3, 6e-2 and, of
losses, 5e-6, where each layer alone is within 1e-6 of float64.
"""
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Verdict:
    precision: str
    variant: str
    difference: dict[str, float]
    """Of each group; 0 is equal to the bit."""
    inexact: bool
    """Whether it may differ by TOLERANCE; otherwise only equal to the bit will do."""
    missing: str = ""
    """Why this could not be tried here."""
    amplifies: bool = False
    """Whether the network has BatchNorm, or its layers are fused."""

    @property
    def ok(self) -> bool:
        close, wide = TOLERANCE[self.precision] if self.inexact else (0.0, 0.0)
        least, least_wide = AMPLIFIED if self.inexact and self.amplifies else (0.0, 0.0)
        near, far = max(close, least), max(wide, least_wide)
        allowed = dict(zip(GROUPS, (close, near, far, far, 0.0, 0.0), strict=True))
        return all(value <= allowed[group] for group, value in self.difference.items())


def config_of(precision: str, settings: dict[str, Any] | None = None) -> RunConfig:
    common = {
        "global_batch": BATCH,
        "epochs": EPOCHS,
        "optim.learning_rate": 5e-4,
        "data.feed": "resident",
    }
    return override(
        RunConfig(), common | {"step.precision": precision} | (settings or {}), "parity"
    )


def few(records: Records) -> Records:
    """So many training samples that an epoch has 9 steps, and some are left out."""
    train = records.split("train").take(np.arange(BATCH * STEPS + 5))
    return replace(records, splits=records.splits | {"train": train})


def state_of(step: TrainStep, losses: list[np.ndarray]) -> State:
    """What training left, copied to the CPU; names begin with their group."""
    left = step.state
    state = {"loss": torch.from_numpy(np.concatenate(losses)), "counters": step.counter_21}
    state["scaler"] = torch.tensor(list(left.scaler_numbers().values()))
    state |= {f"parameters {name}": whole(t) for name, t in left.model_tensors().items()}
    state |= {f"optimiser {name}": whole(t) for name, t in left.optimizer_tensors().items()}
    gradients = step.gradients()
    assert gradients.keys() == {name for name, _ in step.model.named_parameters()}
    state |= {f"gradients {name}": tensor for name, tensor in gradients.items()}
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()
    }


def trained(config: RunConfig, records: Records, world: World) -> State:
    with closing(open_session(config, records, world)) as session:
        if (session.config.step, session.config.kernels) != (config.step, config.kernels):
            raise UserError(
                f"parity cannot be shown here: {session.notes[0]}; "
                f"name another --precision or --device"
            )
        return state_of(session.step, train_epochs(session, range(EPOCHS)))


def resumed(config: RunConfig, records: Records, world: World) -> State:
    """Trained, saved after the first epoch, and resumed in another session."""
    manifest = Manifest(
        training=config.training_settings(),
        dataset_fingerprint=records.fingerprint,
        position=Position(epoch=1, num_steps=STEPS),
        scaler={},
        sha256={},
    )
    with tempfile.TemporaryDirectory() as folder:
        with closing(open_session(config, records, world)) as session:
            losses = train_epochs(session, range(1))
            step = session.step
            state = step.state
            manifest = replace(manifest, scaler=state.scaler_numbers())
            live = checkpoint_tensors(state).items()
            files = {name: state.in_files(tensors) for name, tensors in live}
            write_checkpoint(Path(folder), manifest, files)
        with closing(open_session(config, records, world)) as session:
            step = session.step
            load_checkpoint(Path(folder), step.state)
            step.resume_at(STEPS)
            return state_of(step, losses + train_epochs(session, range(1, EPOCHS)))


def differences(got: State, wanted: State) -> dict[str, float]:
    """The largest relative difference per group; infinite where names or shapes differ."""
    worst = dict.fromkeys(GROUPS, 0.0)
    for name in got.keys() | wanted.keys():
        group = name.split()[0]
        a = got.get(name)
        b = wanted.get(name)
        if a is None or b is None or a.shape != b.shape:
            worst[group] = float("inf")
        elif not torch.equal(a, b):
            apart = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
            worst[group] = max(worst[group], apart if np.isfinite(apart) else float("inf"))
    return worst


def parity(
    records: Records, world: World, precisions: list[str], model: str = "fast"
) -> Iterator[Verdict]:
    """A verdict per precision and variant; what needs a GPU, or more, is `missing`."""
    records = few(records)
    on_gpu = world.device.type == "cuda"
    network = {"model.name": model}
    references = {
        precision: trained(config_of(precision, network), records, world)
        for precision in precisions
    }
    on_cpu = fused_on_cpu(world.device)
    for precision, reference in references.items():
        for name, changed, work in _variants(on_gpu, list(on_cpu) or "all"):
            is_fused = "kernels" in changed
            why = cannot_fuse(world.device) if is_fused and not on_cpu else ""
            if changed.get("step.cuda_graphs") and not on_gpu:
                why = "there is no GPU"
            found = {}
            if not why:
                state = work(config_of(precision, network | changed), records, world)
                found = differences(state, reference)
            yield Verdict(precision, name, found, on_gpu or is_fused, why, is_fused)
    yield from _parity_of_ranks(references, records, world, model)


def _variants(
    on_gpu: bool, fused: list[str] | str
) -> list[tuple[str, dict[str, Any], Callable[..., State]]]:
    """(name, settings, how it is trained) of what one process can try."""
    return [
        ("eager, again", {}, trained),
        (f"{K} steps per launch, not captured", {"step.steps_per_launch": K}, trained),
        ("one CUDA graph per step", {"step.cuda_graphs": True}, trained),
        (
            f"one CUDA graph of {K} steps",
            {"step.cuda_graphs": True, "step.steps_per_launch": K},
            trained,
        ),
        ("fused layers", {"kernels": fused}, trained),
        (f"Triton kernels, one CUDA graph of {K} steps", FUSED, trained),
        ("resumed at an epoch's end", {}, resumed),
        (
            f"resumed, {K} steps per launch",
            {"step.steps_per_launch": K, "step.cuda_graphs": on_gpu},
            resumed,
        ),
    ]


def _parity_of_ranks(
    references: dict[str, State], records: Records, world: World, model: str
) -> Iterator[Verdict]:
    """Of plain and of canonical training, whose references are those of one rank."""
    on_gpu = world.device.type == "cuda"
    precisions = list(references)
    num_gpus = torch.cuda.device_count()
    canonical = {p: _in_shards(NUM_SHARDS, p, records, world, model) for p in precisions}
    for num_ranks, (plain, _) in RANKS.items():
        if on_gpu and num_gpus < num_ranks:
            why = f"there are {num_gpus} GPUs"
            names = [plain, _canonical_name(num_ranks)]
            names += [f"{plain}, FSDP"] if num_ranks > 1 else []
            yield from (Verdict(p, name, {}, True, why) for p in precisions for name in names)
            continue
        with tempfile.TemporaryDirectory() as folder:
            _run_ranks(num_ranks, Path(folder), world.device.type, model, precisions)
            for precision in precisions:
                reference = references[precision]
                if amplifies := any(name.endswith(RUNNING) for name in reference):
                    shards = num_ranks * RANKS[num_ranks][1].get("step.accumulate", 1)
                    reference = _in_shards(shards, precision, records, world, model)
                found = differences(load_file(Path(folder) / f"{precision}.safetensors"), reference)
                inexact = on_gpu or num_ranks > 1
                yield Verdict(precision, plain, found, inexact, amplifies=amplifies)
                if num_ranks > 1:
                    file = Path(folder) / f"{precision}-fsdp.safetensors"
                    found = differences(load_file(file), reference)
                    yield Verdict(precision, f"{plain}, FSDP", found, True, amplifies=amplifies)
                file = Path(folder) / f"{precision}-canonical.safetensors"
                found = differences(load_file(file), canonical[precision])
                yield Verdict(precision, _canonical_name(num_ranks), found, False)


def _canonical_name(num_ranks: int) -> str:
    ranks = "torchrun, 1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    return f"{ranks}, --canonical {NUM_SHARDS}"


def _in_shards(
    num_shards: int, precision: str, records: Records, world: World, model: str
) -> State:
    """What one rank leaves that computes each batch in shards."""
    settings = _shard_settings(num_shards, model, world)
    return trained(config_of(precision, settings), records, world)


def _shard_settings(num_shards: int, model: str, world: World) -> dict[str, Any]:
    on_gpu = world.device.type == "cuda"
    return {"model.name": model, "step.canonical": num_shards, "step.cuda_graphs": on_gpu}


def _run_ranks(
    num_ranks: int, folder: Path, device: str, model: str, precisions: list[str]
) -> None:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // num_ranks))
    }
    command = module_on_ranks(
        num_ranks, "tools.checks.parity", str(folder), device, model, *precisions
    )
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(f"{num_ranks} ranks failed:\n{done.stderr}")


def rank_main(folder: Path, device: str, model: str, precisions: list[str]) -> None:
    """What each rank does; rank 0 leaves the state, which is that of all."""
    import_late()
    with start_world(device) as world, world.on_stream():
        records = few(open_records(ensure_sample()))
        for precision in precisions:
            settings = RANKS[world.size][1] | {"model.name": model}
            settings |= {"step.cuda_graphs": world.device.type == "cuda"}
            canonical = _shard_settings(NUM_SHARDS, model, world)
            variants = {"": settings, "-canonical": canonical}
            if world.size > 1:  # eager: graphs of FSDP are not shown yet
                sharded = {"step.parallel": "fsdp", "step.cuda_graphs": False}
                variants |= {"-fsdp": settings | sharded}
            for ending, changed in variants.items():
                state = trained(config_of(precision, changed), records, world)
                file = folder / f"{precision}{ending}.safetensors"
                world.first(partial(save_file, state, file))
    end_rank()


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
