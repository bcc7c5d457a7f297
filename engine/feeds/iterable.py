"""`engine.loader`: a feed as an iterable, for a training loop that is not the engine's.

Batches are on the device already and belong to this rank: they need no sampler, no collation, and
no wrapper of a library that would divide or move them once more. Where a loader stands is one
number, the samples of the epoch that all ranks together were given; so a loop goes on from it to
the very sample, on any number of ranks, with any batch size and any feed.

It does not scale pixels, and distorts none unless a setting says so.

Shapes: B samples of one rank, H x W pixels, N samples of the split.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
import torch.distributed as dist

from engine.config import RunConfig, override
from engine.data.records import Records, Split, StoredImages
from engine.durable import Damaged
from engine.errors import UserError
from engine.feeds.batch import Batch, Feed
from engine.feeds.build import choose_feed, make_feed, make_order, open_for
from engine.host import env_has_local_rank, env_local_rank, env_rank, env_world_size
from engine.order import Order
from engine.typed import typed

TAKEN = (
    "data.order",
    "data.block_samples",
    "data.window_blocks",
    "data.loader_workers",
    "data.cache_gib",
)
"""Settings that `loader` takes beside those of `augment`."""
Samples = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""image_BHW uint8, label_B int64 (index into Records.classes), id_B int64 (row of the split)."""


class LoaderOptions(TypedDict, total=False):
    """What `loader` takes beside the usual."""

    split: str
    """Default: train."""
    shuffle: bool
    """True: another order in each epoch, which leaves out fewer samples than one batch of all
    ranks. False: the records' own order, to the last sample; a rank's last batch may be shorter, or
    empty. Default: True for train alone."""
    device: torch.device | str
    """cpu or cuda. Default: the GPU of this rank where there is one."""
    own_tensors: bool
    """Whether a batch stays as it is when the next is asked for, which costs a copy. Default:
    False."""
    settings: Mapping[str, Any]
    """As --set of engine.run takes them: {"data.order": "stratified"}, those of `augment`."""


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Where a loader stands."""

    format: Literal[1] = 1
    dataset_fingerprint: str
    split: str
    seed: int = field(metadata={"high": 2**63 - 1})
    order: str
    epoch: int
    num_samples: int
    """Samples of the epoch that all ranks together were given."""


@dataclass(kw_only=True, eq=False, repr=False)
class Loader:
    """The batches of a split, an epoch at a time; `loader` makes one.

    An iteration goes through one epoch; the next one is of the next epoch, also where this one was
    left early. Only after `load_state_dict` does one begin amid an epoch.
    """

    records: Records
    split: str
    config: RunConfig
    order: Order
    """Of whole epochs."""
    device: torch.device
    own_tensors: bool
    epoch: int = field(default=0, init=False)
    """The epoch in hand, or the next one; `set_epoch` sets it."""

    def __post_init__(self) -> None:
        self.batch_size = self.order.rank_batch
        self._num_given = 0
        """Samples of the epoch in hand that all ranks together were given."""
        self._is_begun = False
        """Whether the next iteration is of the next epoch."""
        self._num_iterations = 0
        self._label_B = torch.empty(self.batch_size, dtype=torch.int64, device=self.device)
        self._feed: Feed | None = None
        self._feed_of(self.order)  # what cannot be made is said now

    def __len__(self) -> int:
        """Batches of a whole epoch, equal on every rank."""
        return self.order.steps_per_epoch

    def __iter__(self) -> Iterator[Samples]:
        """The batches of one epoch. A batch is overwritten when the next is asked for.

        Raises:
            UserError: from iteration, when a feed's disk or worker fails.
        """
        if self._is_begun:
            self._place(self.epoch + 1, 0)
        self._num_iterations += 1
        return self._batches(self._num_iterations)

    def _batches(self, iteration: int) -> Iterator[Samples]:
        self._check_current(iteration)
        self._is_begun = True
        order, step = self._rest()
        num_left = order.steps_per_epoch - step
        batches = self._feed_of(order).batches(self.epoch, step) if num_left else iter(())
        last = order.num_samples - order.rank * self.batch_size
        for batch in batches:
            num = last - self._num_given
            self._num_given = min(self._num_given + order.global_batch, order.num_samples)
            num_left -= 1
            yield self._samples(batch, num)
            self._check_current(iteration)
        if num_left:
            raise RuntimeError(f"the feed ended {num_left} batches before its epoch")
        self._place(self.epoch + 1, 0)

    def _rest(self) -> tuple[Order, int]:
        """The order of the epoch in hand, and its next step."""
        batch = self.order.global_batch
        if self._num_given % batch == 0:
            return self.order, self._num_given // batch
        return replace(self.order, start=self._num_given), 0

    def _samples(self, batch: Batch, num: int) -> Samples:
        """A batch, or its first `num` samples; labels as wide as losses want them."""
        label_B = self._label_B
        if num < self.batch_size:
            batch = batch.rows(0, max(num, 0))
            label_B = label_B[: max(num, 0)]
        label_B.copy_(batch.label_B)
        if self.own_tensors:
            return batch.image_BHW.clone(), label_B.clone(), batch.id_B.clone()
        return batch.image_BHW, label_B, batch.id_B

    def _check_current(self, iteration: int) -> None:
        if iteration != self._num_iterations:
            why = "another one was begun, or the loader was moved"
            raise RuntimeError(f"this iteration is over: {why}; make a loader for each loop")

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be of this epoch; after `load_state_dict` with that epoch it goes
        on where the state says.

        Raises:
            UserError: it is no whole number from 0 on.
        """
        if not isinstance(epoch, int) or epoch < 0:
            raise UserError(f"loader: epoch is {epoch!r}; give a whole number from 0 on")
        if epoch != self.epoch or self._is_begun:
            self._place(epoch, 0)

    def _place(self, epoch: int, num_given: int) -> None:
        self.epoch = epoch
        self._num_given = num_given
        self._is_begun = False
        self._num_iterations += 1

    def state_dict(self) -> dict[str, int | str]:
        """Where this loader stands after the batch that it gave last: plain numbers and texts.

        It is the same on every rank that was given as many batches.
        """
        return asdict(self._state())

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on after the batch that the state was taken at, to the sample.

        Batch size, ranks, feed and device may be others; the rest of the epoch is then divided into
        batches of this loader's size.

        Raises:
            UserError: it is no state, or of other data, another split, seed or order.
        """
        try:
            found = typed(LoaderState, dict(state), "")
        except (Damaged, TypeError, ValueError) as error:
            remedy = "give what state_dict of a loader returned"
            raise UserError(f"loader: this is no state of one ({error}); {remedy}") from None
        own = self._state()
        for name, what in KEPT.items():
            theirs, ours = getattr(found, name), getattr(own, name)
            if theirs != ours:
                text = f"{what} {str(theirs)[:24]}, not {str(ours)[:24]}"
                remedy = "make the loader as that one was"
                raise UserError(f"loader: the state is of {text}; {remedy}")
        if not 0 <= found.num_samples <= self.order.num_samples:
            text = f"{found.num_samples} samples of an epoch of {self.order.num_samples}"
            raise UserError(f"loader: the state is after {text}; give one that is whole")
        self._place(found.epoch, found.num_samples)

    def _state(self) -> LoaderState:
        return LoaderState(
            dataset_fingerprint=self.records.fingerprint,
            split=self.split,
            seed=self.order.seed,
            order=_order_name(self.config, self.order),
            epoch=self.epoch,
            num_samples=self._num_given,
        )

    def close(self) -> None:
        """End the feed's threads and processes, and let go of its memory."""
        if self._feed is not None:
            self._feed.close()
        self._feed = None

    def _feed_of(self, order: Order) -> Feed:
        """The feed of an order of this loader's; one at a time: two may not fit into memory."""
        if self._feed is None or self._feed.order != order:
            self.close()
            split, num_classes = self.records.split(self.split), len(self.records.classes)
            self._feed = make_feed(self.config, split, order, num_classes, self.device)
        return self._feed


KEPT = {"dataset_fingerprint": "data", "split": "split", "seed": "seed", "order": "order"}
"""Fields of a state that must be the loader's, and what they are called."""


def loader(
    records: Records | str | Path,
    *,
    batch_size: int,
    seed: int = 0,
    feed: str = "auto",
    rank: int | None = None,
    world_size: int | None = None,
    **options: Unpack[LoaderOptions],
) -> Loader:
    """An iterable of (image_BHW uint8, label_B int64, id_B int64) on the device.

    Args:
        records: opened, or the path or URL of a record directory.
        batch_size: samples of one rank.
        seed: of the order; equal on every rank.
        feed: as --feed of engine.run; it changes neither order nor batches.
        rank: with `world_size`; None: of the process group, else as torchrun gave them.
        options: LoaderOptions.
    Raises:
        UserError: no such records, split, feed, setting, rank or device; or a shuffled split is
            smaller than the batch of all ranks.
    """
    _check_arguments(batch_size, options)
    place = _ranks(rank, world_size)
    config = _config(batch_size * place[1], seed, feed, options.get("settings", {}))
    opened = records if isinstance(records, Records) else open_for(config.data, records)
    name = options.get("split", "train")
    split = opened.split(name)
    shuffle = options.get("shuffle", name == "train")
    if len(split) < (config.global_batch if shuffle else 1):
        raise UserError(_too_small(name, len(split), batch_size, place[1]))
    device = _device(options.get("device"))
    return Loader(
        records=opened,
        split=name,
        config=_with_feed(config, split, device),
        order=make_order(config, split, *place, shuffle),
        device=device,
        own_tensors=options.get("own_tensors", False),
    )


def _check_arguments(batch_size: object, options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in LoaderOptions.__annotations__:
            raise TypeError(f"loader() got an unexpected keyword argument {name!r}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"loader: batch_size is {batch_size!r}; give a whole number from 1 on")


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world size) as given, of the process group, or of torchrun."""
    if rank is None and world_size is None:
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return env_rank(), env_world_size()
    if rank is None or world_size is None:
        given = f"rank is {rank} and world_size is {world_size}"
        raise UserError(f"loader: {given}; give both, or neither")
    if not 0 <= rank < world_size:
        raise UserError(f"loader: there is no rank {rank} of {world_size}; ranks count from 0")
    return rank, world_size


def _config(batch: int, seed: int, feed: str, settings: Mapping[str, Any]) -> RunConfig:
    """The config of a run that has these settings, each checked as a run's."""
    for name in settings:
        if name not in TAKEN and not name.startswith("augment."):
            remedy = f"give some of {', '.join(TAKEN)}, augment.*"
            raise UserError(f"loader: {name} is no setting of a loader; {remedy}")
    own = {"global_batch": batch, "seed": seed, "data.feed": feed}
    return override(RunConfig(), {**settings, **own}, "loader")


def _with_feed(config: RunConfig, split: Split, device: torch.device) -> RunConfig:
    """The config with the feed that it names, or that auto means, where that can read the split."""
    name: str = config.data.feed
    if name == "auto":
        name = choose_feed(config.data, split, device)[0]
    if (name == "stream") != isinstance(split.image_NHW, StoredImages):
        how = "in_memory=False" if name == "stream" else "in_memory=True"
        remedy = f"open them with {how}, or give their path"
        raise UserError(f"loader: the feed {name} cannot read records that are opened so; {remedy}")
    return override(config, {"data.feed": name}, "loader")


def _device(given: torch.device | str | None) -> torch.device:
    try:
        device = _own_device() if given is None else torch.device(given)
    except RuntimeError:
        raise UserError(f"loader: there is no device {given!r}; give cpu or cuda") from None
    num_gpus = torch.cuda.device_count()  # 0 where CUDA does not work
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= num_gpus
    ):
        remedy = "give cpu, or leave it out" if given else "give the one of this rank"
        raise UserError(f"loader: device {device}: torch has none here; {remedy}")
    return device


def _own_device() -> torch.device:
    """The GPU of this rank where there is one.

    torchrun says which; under other launchers it is the one that the process has chosen.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    chosen = env_local_rank() if env_has_local_rank() else torch.cuda.current_device()
    return torch.device("cuda", chosen)


def _too_small(name: str, num_samples: int, batch_size: int, world_size: int) -> str:
    if not num_samples:
        return f"loader: there is no image in {name}; name another split"
    most = num_samples // world_size
    remedy = f"give a batch_size of at most {most}" if most else "give fewer ranks"
    what = f"a batch of {batch_size} on {world_size} rank(s)"
    return f"loader: {what} is larger than {name} of {num_samples} samples; {remedy}"


def _order_name(config: RunConfig, order: Order) -> str:
    """What two orders of the same data and seed must have in common to be the same."""
    if not order.shuffle:
        return "sequential"
    if order.block_samples:
        return f"blocked {order.block_samples} x {order.window_blocks}"
    return config.data.order
