"""What the ranks of a run send each other, and what each keeps: counted on one, without the others.

The real network trains a few steps in the wrapper of training, DDP or FSDP2, as rank 0 of as many
ranks as are asked for. torch's fake process group stands for the others: it answers at once, and a
dispatch mode sees the collectives of a step, their bytes and their padding. Rank 0 keeps the
most.

It trains a tiny batch, since gradients and parameters do not depend on it; what a step keeps for
its backward is counted over two batches. It does not see what a start sends once, what libraries
take for themselves, or what hides behind computing.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import RunConfig
from engine.feeds.synthetic import SyntheticFeed, random_batch
from engine.models import make_model
from engine.order import Order
from engine.report import RankBytes
from engine.train.backends import backends_kept
from engine.train.step import TrainStep
from engine.world import World
from tools.measure.fit import Kind

MOST_RANKS = 1024
FEW = 2
"""Samples of a rank; BatchNorm wants more than one."""
SEEN: dict[str, tuple[Kind, int]] = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "_c10d_functional::all_reduce": ("all-reduce", 0),
}
"""torch's operators, and which argument is the whole tensor."""
SILENT = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")
"""What is called like a collective, and sends nothing."""
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """What a step does `times` times."""

    kind: Kind
    num_bytes: int
    """Of the whole tensor, with what pads it."""
    times: int


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A way of training on several ranks: what goes between them, and what lies on each."""

    num_ranks: int
    parallel: str
    precision: str
    collectives: list[Collective]
    """Of a step."""
    kept: RankBytes
    """On rank 0 between two steps."""
    kept_under_ddp: RankBytes
    """What it would keep there."""
    gathered_bytes: int
    """What rank 0 has beside it within a step, at most: parameters of others, whole gradients."""

    @property
    def sent_bytes(self) -> int:
        """The whole tensors of a step."""
        return sum(each.num_bytes * each.times for each in self.collectives)


class Collectives(TorchDispatchMode):
    """Notes kind and bytes of every collective while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Kind, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # it sends by operators of its own, which come here, too
        name = func._schema.name
        if func.namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            kind, place = SEEN[name]
            whole = args[place]
            tensors = [whole] if isinstance(whole, torch.Tensor) else whole
            self.found.append((kind, sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


def count(config: RunConfig, num_ranks: int, shape: tuple[int, int, int]) -> Counted:
    """What a step of `config` sends, and what a rank keeps.

    Args:
        config: its step.parallel and step.precision are those counted; any batch.
        num_ranks: up to MOST_RANKS.
        shape: height and width of an image, and classes.
    """
    mode = Collectives()
    with ExitStack() as stack:
        stack.enter_context(backends_kept())
        stack.enter_context(_fake_group(num_ranks))
        plain = replace(_plain(config), kernels=())  # they send nothing, and fit one wrapper only
        step, feed = _step(plain, num_ranks, FEW, shape)
        launches = step.train_epoch(feed, 0)
        next(launches)
        next(launches)  # DDP lays its buckets out anew after the first
        with mode:
            next(launches)
        is_sharded = config.step.parallel == "fsdp" and num_ranks > 1
        kept, under_ddp = (step.state.rank_bytes(is_whole=w) for w in (not is_sharded, True))
    times = Counter(mode.found)
    return Counted(
        num_ranks=num_ranks,
        parallel=config.step.parallel,
        precision=config.step.precision,
        collectives=[Collective(kind=k, num_bytes=n, times=t) for (k, n), t in times.items()],
        kept=kept,
        kept_under_ddp=under_ddp,
        gathered_bytes=_gathered_bytes(mode.found, config) if is_sharded else 0,
    )


def activation_bytes(config: RunConfig, shape: tuple[int, int, int]) -> float:
    """Bytes of a sample that a step keeps from the forward to the backward, with its kernels."""
    sizes = [_saved_bytes(_plain(config), batch, shape) for batch in (2 * FEW, 4 * FEW)]
    return (sizes[1] - sizes[0]) / (2 * FEW)


def _saved_bytes(config: RunConfig, batch: int, shape: tuple[int, int, int]) -> int:
    """Of the memory that autograd holds of a step, on one rank."""
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        found[memory.data_ptr()] = memory.nbytes()
        return tensor

    with backends_kept():
        step, feed = _step(config, 1, batch, shape)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            next(step.train_epoch(feed, 0))
    return sum(found.values())


def _plain(config: RunConfig) -> RunConfig:
    """One step a launch, eager: neither changes what is sent or kept."""
    step = replace(
        config.step, compile="off", cuda_graphs=False, steps_per_launch=1, noise_scale=False
    )
    return replace(config, step=step, epochs=1, schedule_epochs=0)


@contextmanager
def _fake_group(num_ranks: int) -> Iterator[None]:
    """The default process group of rank 0 of so many; nobody else is there."""
    if num_ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _step(
    config: RunConfig, num_ranks: int, batch: int, shape: tuple[int, int, int]
) -> tuple[TrainStep, SyntheticFeed]:
    """The step of training as rank 0's, and random samples for it."""
    if num_ranks == 1:
        config = replace(config, step=replace(config.step, parallel="ddp"))
    global_batch = batch * num_ranks
    order = Order(
        num_samples=4 * global_batch,
        global_batch=global_batch,
        world_size=num_ranks,
        seed=config.seed,
    )
    static = random_batch(batch, shape[:2], shape[2], _CPU)
    model = make_model(config.model, *shape, config.seed, frozenset(config.kernels))
    world = World(rank=0, size=num_ranks, device=_CPU, stream=None)
    step = TrainStep(model, config, order, static, world)
    if isinstance(step._net, DistributedDataParallel):
        step._net.register_comm_hook(None, _reduced)  # the fake group's own answer lacks the sum
    return step, SyntheticFeed(static, order)


def _reduced(
    _: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """DDP's all-reduce of a bucket; torch reads the types."""
    dist.all_reduce(bucket.buffer())
    done = torch.futures.Future[torch.Tensor]()
    done.set_result(bucket.buffer())
    return done


def _gathered_bytes(found: list[tuple[Kind, int]], config: RunConfig) -> int:
    """The root's parameters, those of two blocks (one is gathered ahead), and a block's gradients.

    Without reshard_after_forward all blocks' parameters stay.
    """
    gathers = [num_bytes for kind, num_bytes in found if kind == "all-gather"]
    scatters = [num_bytes for kind, num_bytes in found if kind == "reduce-scatter"]
    blocks = gathers[1:]
    if config.step.reshard_after_forward:
        blocks = sorted(blocks)[-2:]
    return gathers[0] + sum(blocks) + max(scatters)
