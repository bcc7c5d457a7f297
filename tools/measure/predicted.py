"""What a way of training would do: step, samples/s, efficiency, memory, time; and which to take.

    step = a rank's step alone x what ranks of one machine take from each other + its collectives

The first two are timings.py's, what is sent is counted.py's, and fit.py's link times it. Epochs to
an accuracy are an earlier run's. At another global batch B they go by its noise scale, the critical
batch C: samples to an accuracy are in proportion to B + C (McCandlish et al., "An Empirical Model
of Large-Batch Training", arXiv 1812.06162, section 2), with a learning rate that fits B. Without a
noise scale nothing is said of other batches. Precision and wrapper are taken to leave it as it is.

Nothing is taken to overlap: what a GPU hides behind the backward makes a step shorter than this
says. The wrapper's own work is not in it, nor what ranks share beside cores: disks, loaders.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import UserError
from engine.meters import GIB
from tools.measure.counted import Counted
from tools.measure.fit import Link
from tools.measure.timings import MODEL, Basis, Timings

AS_GOOD = 0.03
"""Part of the least time by which more ranks, or fsdp, must be sooner to be worth it."""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What a finished run reached, and how."""

    accuracy_fraction: float
    """On val."""
    num_epochs: int
    num_samples: int
    """Of its training split."""
    global_batch: int
    critical_batch: float | None
    """Samples, by its noise scale at the end; None: not measured."""

    def epochs_at(self, global_batch: int) -> float | None:
        """Epochs to the same accuracy at another batch; None: not known."""
        if global_batch == self.global_batch:
            return float(self.num_epochs)
        if self.critical_batch is None:
            return None
        samples = global_batch + self.critical_batch
        return self.num_epochs * samples / (self.global_batch + self.critical_batch)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A way of training."""

    num_ranks: int
    batch: int
    """Of a rank."""
    global_batch: int
    precision: str
    parallel: str
    basis: Basis
    alone_ms: float
    """A step of one rank alone, at the same batch a rank."""
    compute_ms: float
    """The same beside those of its machine."""
    collectives_ms: float
    sent_bytes: int
    """The whole tensors of a step's collectives."""
    step_ms: float
    samples_per_s: float
    efficiency_fraction: float
    """Of as many times one rank's samples/s at the same batch a rank."""
    rank_gib: float
    """Memory of a rank; of a GPU's model, and where NVML is silent, without what CUDA and its
    libraries take."""
    fits: bool
    """Into the memory that there is, where that is known."""
    epoch_s: float | None
    """None: the global batch is larger than the training split."""
    accuracy_s: float | None
    """To the accuracy of the run that was named; None: not known."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is known of a configuration, a machine and a link."""

    global_batch: int
    """The configuration's."""
    num_samples: int
    """Of the training split."""
    timings: Timings
    link: Link | None
    """None: one rank."""
    num_local: int
    """Ranks of a machine, at most."""
    room_bytes: float | None = None
    """Memory of a machine, or of a GPU; None: not known."""
    shares_memory: bool = False
    """Whether a machine's ranks have it together."""
    reached: Reached | None = None

    def of(self, counted: Counted) -> Iterator[Prediction]:
        """Each batch that was timed, and the configuration's by the ranks, where it is between."""
        batches = set(self.timings.batches)
        share, rest = divmod(self.global_batch, counted.num_ranks)
        if not rest and min(batches) <= share <= max(batches):
            batches.add(share)
        for batch in sorted(batches):
            yield self.predict(counted, batch)

    def predict(self, counted: Counted, batch: int) -> Prediction:
        """A rank's batch, with what was counted of its number of ranks, precision and wrapper."""
        num_ranks, precision = counted.num_ranks, counted.precision
        alone_ms = self.timings.step_ms(precision, batch)
        num_local = min(num_ranks, self.num_local)
        compute_ms = self.timings.step_ms(precision, batch, num_local)
        collectives_ms = self.collectives_ms(counted)
        step_ms = compute_ms + collectives_ms
        is_measured = num_ranks == 1 and batch in self.timings.batches
        rank_gib = self._rank_gib(counted, batch)
        used_bytes = rank_gib * GIB * (num_local if self.shares_memory else 1)
        epoch_s = self._epoch_s(num_ranks * batch, step_ms)
        epochs = self.reached.epochs_at(num_ranks * batch) if self.reached else None
        return Prediction(
            num_ranks=num_ranks,
            batch=batch,
            global_batch=num_ranks * batch,
            precision=precision,
            parallel=counted.parallel,
            basis=self.timings.basis if is_measured else MODEL,
            alone_ms=alone_ms,
            compute_ms=compute_ms,
            collectives_ms=collectives_ms,
            sent_bytes=counted.sent_bytes,
            step_ms=step_ms,
            samples_per_s=num_ranks * batch / step_ms * 1000,
            efficiency_fraction=alone_ms / step_ms,
            rank_gib=rank_gib,
            fits=self.room_bytes is None or used_bytes <= self.room_bytes,
            epoch_s=epoch_s,
            accuracy_s=None if epoch_s is None or epochs is None else epochs * epoch_s,
        )

    def collectives_ms(self, counted: Counted) -> float:
        """All collectives of a step, one after the other."""
        if self.link is None:
            return 0.0
        ranks = counted.num_ranks
        return sum(
            each.times * self.link.us(each.kind, each.num_bytes, ranks) / 1000
            for each in counted.collectives
        )

    def _rank_gib(self, counted: Counted, batch: int) -> float:
        """What was measured of one rank, less what others keep; or what was counted."""
        beside_bytes = counted.kept.total_bytes + counted.gathered_bytes
        measured_gib = self.timings.peak_gib(counted.precision, batch)
        if measured_gib is None:
            kept_bytes = batch * self.timings.activation_bytes(counted.precision)
            return (beside_bytes + kept_bytes) / GIB
        return measured_gib + (beside_bytes - counted.kept_under_ddp.total_bytes) / GIB

    def _epoch_s(self, global_batch: int, step_ms: float) -> float | None:
        num_steps = self.num_samples // global_batch
        return num_steps * step_ms / 1000 if num_steps else None


def recommend(
    predictions: list[Prediction],
    global_batch: int,
    reached: Reached | None,
    num_threads: int = 0,
) -> tuple[Prediction, str]:
    """The one to take, and why.

    The soonest to the accuracy, where that is known; else the soonest with the configuration's
    global batch, whose accuracy that of others need not be; else most samples/s. Of those that are
    as good, the one of the fewest ranks, and ddp before fsdp.

    Args:
        num_threads: of a rank, one alone, too; 0: as many as torch takes.
    Raises:
        UserError: none fits into memory.
    """
    fitting = [each for each in predictions if each.fits]
    if not fitting:
        raise UserError("nothing of this fits into memory; give smaller --batches, or --parallel")
    to_accuracy = [(each.accuracy_s, each) for each in fitting if each.accuracy_s is not None]
    same = [each for each in fitting if each.global_batch == global_batch]
    if reached and to_accuracy:
        aim = f"soonest to {reached.accuracy_fraction:.2%} on val"
        costs = to_accuracy
    elif same:
        aim = f"soonest with the configuration's global batch of {global_batch}"
        costs = [(each.step_ms, each) for each in same]
    else:
        aim = "most samples/s; nothing is known of its accuracy"
        costs = [(1 / each.samples_per_s, each) for each in fitting]
    best, reasons = _least(costs, "one rank of one thread" if num_threads == 1 else "one rank")
    twins = (each for each in predictions if _place(each) == _place(best))
    beside = [_beside(each, best) for each in twins if each.parallel != best.parallel]
    return best, "; ".join([aim, *reasons, *beside])


def _least(costs: list[tuple[float, Prediction]], one_rank: str) -> tuple[Prediction, list[str]]:
    """The one that costs least, or as good as that, beside those of other numbers of ranks."""
    most = (1 + AS_GOOD) * min(cost for cost, _ in costs)
    as_good = [(cost, each) for cost, each in costs if cost <= most]
    cost, best = min(as_good, key=lambda it: (it[1].num_ranks, it[1].parallel, it[0]))
    reasons = []
    if best.num_ranks > 1:
        if alone := [other for other, each in costs if each.num_ranks == 1]:
            reasons.append(f"{min(alone) / cost:.2f} times as soon as the best of {one_rank}")
        reasons.append(_parts(best))
    elif several := [(other, each) for other, each in costs if each.num_ranks > 1]:
        other, each = min(several, key=lambda it: it[0])
        what = f"the best of several, {each.num_ranks} ranks, takes {other / cost:.2f} of its time"
        reasons.append(f"{what}: {_parts(each)}")
    return best, reasons


def _parts(it: Prediction) -> str:
    """What a step of several ranks has beside that of one alone."""
    text = f"{it.collectives_ms / it.step_ms:.0%} of its step are collectives"
    beside = it.compute_ms / it.alone_ms
    return text if beside == 1 else f"{text}, computing side by side takes {beside:.2f} of the time"


def _beside(twin: Prediction, best: Prediction) -> str:
    """The other wrapper."""
    saved_mb = (best.rank_gib - twin.rank_gib) * GIB / 1e6
    saves = f"saves {saved_mb:,.1f} MB a rank" if saved_mb > 0 else "saves no memory"
    if not twin.fits:
        saves = "does not fit into the memory"
    return f"{twin.parallel} takes {twin.step_ms / best.step_ms:.2f} of its time and {saves}"


def _place(it: Prediction) -> tuple[int, int, str]:
    return it.num_ranks, it.batch, it.precision
