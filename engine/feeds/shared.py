"""One feed for several sessions of a process that train the same samples in the same order.

They are driven in turn, a launch each (train/members.py). Whoever is first at a step lets the feed
make its batch; the others get the same one. Who is at another place of the order than the others,
as a member that goes on from another checkpoint, gets a feed of its own.

A batch is valid until its session asks for the next: all of them must have used it by then, so
device work of all must be on one stream. A launch of several steps takes their batches in one turn,
so sessions that launch so have a feed each. Launches that gather by themselves are not served here,
but by `GatheredOnce`, inside a graph of several branches.

Shapes: K steps of a launch, B samples in a step.
"""

from collections.abc import Callable, Hashable, Iterator
from functools import partial

import torch

from engine.config import RunConfig
from engine.data.records import Split
from engine.feeds.batch import Batch, Feed, Source
from engine.feeds.build import make_feed
from engine.order import Order


class SharedFeeds:
    """Makes the feeds of a process's sessions, one for all that want the same batches."""

    def __init__(self) -> None:
        self._commons: dict[Hashable, Common] = {}

    def make(
        self, config: RunConfig, split: Split, order: Order, num_classes: int, device: torch.device
    ) -> Feed:
        """As `make_feed`; closing it closes the common one with its last user.

        Raises:
            UserError: as `make_feed`.
        """
        if config.step.steps_per_launch > 1:
            return make_feed(config, split, order, num_classes, device)
        key = (config.data, config.augment, config.kernels, order, id(split))
        if key not in self._commons:
            make = partial(make_feed, config, split, order, num_classes, device)
            self._commons[key] = Common(make, partial(self._commons.pop, key))
        return SharedFeed(self._commons[key])


class Common:
    """A feed, and the place in its order that its users have come to."""

    def __init__(self, make: Callable[[], Feed], forget: Callable[[], object]) -> None:
        """`forget`: called when the last user has left."""
        self.make = make
        self.feed = make()
        self.batch: Batch | None = None
        """Of the place; None: the feed has ended before it."""
        self._forget = forget
        self._num_users = 0
        self._batches: Iterator[Batch] = iter(())
        self._place: tuple[int, int] | None = None
        """Epoch and step; None between epochs."""
        self._error: Exception | None = None

    def join(self) -> None:
        self._num_users += 1

    def leave(self) -> None:
        self._num_users -= 1
        if not self._num_users:
            self._forget()
            self.feed.close()

    def comes_to(self, epoch: int, step: int) -> bool:
        """Be at this step, or go on to it; false where others are on the way elsewhere.

        Raises:
            Exception: what broke the feed, whoever was first to see it.
        """
        if self._error:
            raise self._error
        if self._place == (epoch, step):
            return True
        if self._place not in (None, (epoch, step - 1)):
            return False
        if self._place is None:
            self._batches = self.feed.batches(epoch, step)
        self.batch = self._next()
        self._place = (epoch, step)
        return True

    def ends(self, epoch: int, num_steps: int) -> Batch | None:
        """Let the epoch end, once; a batch that should not be there, where there is one."""
        if self._place != (epoch, num_steps - 1):
            return None
        self._place = None
        return self._next()

    def _next(self) -> Batch | None:
        try:
            return next(self._batches, None)
        except Exception as error:
            self._error = error
            raise


class SharedFeed:
    """What one of several users has of a common feed."""

    def __init__(self, common: Common) -> None:
        common.join()
        self._common = common
        self.name = common.feed.name
        self.order = common.feed.order
        self._own: Feed | None = None

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        num_steps = self.order.steps_per_epoch
        for step in range(first_step, num_steps):
            if not self._common.comes_to(epoch, step):
                yield from self._alone().batches(epoch, step)
                return
            if self._common.batch is None:
                return
            yield self._common.batch
        if (surplus := self._common.ends(epoch, num_steps)) is not None:
            yield surplus

    def _alone(self) -> Feed:
        if self._own is None:
            self._own = self._common.make()
        return self._own

    def close(self) -> None:
        if self._own:
            self._own.close()
        self._common.leave()


class GatheredOnce:
    """What the first of several branches gathers for all of them; the others wait for it.

    Device work only, so that it may be captured: of one launch, which each branch calls once.
    """

    def __init__(self, source: Source, batch: Batch) -> None:
        """`batch`: where it is gathered to, and what all branches train on."""
        self.batch = batch
        self._source = source
        self._is_done = False
        self._done = torch.cuda.Event() if batch.id_B.is_cuda else None

    def gather(self, step_K: torch.Tensor, out: Batch) -> None:
        """Fill `out`, which is `batch`, or wait until it is filled."""
        assert out is self.batch, "branches that share a batch train on the same one"
        if self._is_done:
            if self._done:
                self._done.wait()
            return
        self._source.gather(step_K, out)
        self._is_done = True
        if self._done:
            self._done.record()
