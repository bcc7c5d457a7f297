"""How right a network is on a split, and how right it believes it is: Scores, typed.

Every sample counts once and with the same weight. What is fitted (the temperature, the measured
look-alikes) is fitted on another split, the validation, and never on the one that is reported.

Does not: run a network (answers.py), nor read runs (evaluation.py).

Shapes: N samples, K classes, T x R true and read ones; logits are of any network, or the logarithms
of probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional

from engine.train.vote import best_temperature as temperature_of
from tools.measure.merges import (
    MEASURED,
    confused_pairs,
    group_names,
    merged,
    named_merges,
)

NUM_BINS = 15
"""Of equal width, as in Guo, Pleiss, Sun and Weinberger, 2017 (arXiv:1706.04599), who made the
expected calibration error and temperature scaling common for networks."""
MOST_CONFUSIONS = 20


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Whether of the answers given with a confidence of p a share of p is right."""

    error_fraction: float
    """Expected calibration error: |share right - mean confidence|, mean over samples, by bins."""
    temperature: float | None
    """What the logits are to be divided by for the least loss on val; None without one."""
    scaled_error_fraction: float | None
    """The same errors and loss on the split at that temperature."""
    scaled_loss: float | None


@dataclass(frozen=True, kw_only=True)
class MergeScore:
    """Accuracy where the classes of a group count as one."""

    name: str
    why: str
    groups: list[list[str]]
    num_classes: int
    """That are left."""
    num_right: int
    accuracy_fraction: float


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """A class that the split has samples of."""

    name: str
    num_samples: int
    num_right: int
    accuracy_fraction: float
    mistaken_for: str | None
    """The most frequent wrong answer; None where none is wrong."""
    num_mistaken: int


@dataclass(frozen=True, kw_only=True)
class Confused:
    """Samples of one class that were read as another."""

    true: str
    read: str
    num_samples: int
    share_fraction: float
    """Of all samples of the true class."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How right a network, or a mean of several, is on a split."""

    num_samples: int
    num_right: int
    accuracy_fraction: float
    """Top-1."""
    top2_accuracy_fraction: float
    """The label is the first or the second answer."""
    loss: float
    """Mean cross-entropy in nats, without label smoothing."""
    calibration: Calibration
    merges: list[MergeScore]
    classes: list[ClassScore]
    confusions: list[Confused] = field(default_factory=list)
    """The most frequent ones first, MOST_CONFUSIONS at most; earlier versions did not count."""

    def __post_init__(self) -> None:
        if not 0 <= self.num_right <= self.num_samples or self.num_samples < 1:
            raise ValueError(f"{self.num_right} of {self.num_samples} samples cannot be right")


class Answers:
    """What a network answers to the samples of a split, at least one, and their labels."""

    def __init__(self, logits_NK: torch.Tensor, label_N: np.ndarray) -> None:
        self.logits_NK = logits_NK.double()
        self.label_N = torch.from_numpy(label_N.astype(np.int64))
        self.answer_N = self.logits_NK.argmax(1)

    @property
    def num_right(self) -> int:
        return int((self.answer_N == self.label_N).sum())

    def loss(self, temperature: float = 1.0) -> float:
        return float(functional.cross_entropy(self.logits_NK / temperature, self.label_N))

    def scaled(self, temperature: float) -> "Answers":
        return Answers(self.logits_NK / temperature, self.label_N.numpy())


def scores_of(
    answers: Answers, classes: Sequence[str], val: Answers | None, confused_share: float
) -> Scores:
    """Everything about a split's answers.

    Args:
        val: the same network's answers to the validation split; None where there is none.
        confused_share: see merges.confused_pairs.
    """
    num = len(answers.label_N)
    second_N2 = answers.logits_NK.topk(min(2, len(classes)), dim=1).indices
    in_two = (second_N2 == answers.label_N[:, None]).any(1) | (answers.answer_N == answers.label_N)
    groups = named_merges(classes)
    if val:
        pairs = confused_pairs(
            val.label_N.numpy(), val.answer_N.numpy(), len(classes), confused_share
        )
        why = f"pairs of which more than {100 * confused_share:g} % were swapped on val"
        groups[MEASURED] = merged(len(classes), pairs), why
    return Scores(
        num_samples=num,
        num_right=answers.num_right,
        accuracy_fraction=answers.num_right / num,
        top2_accuracy_fraction=int(in_two.sum()) / num,
        loss=answers.loss(),
        calibration=_calibration(answers, val),
        merges=[
            _merge_score(name, why, group_K, answers, classes)
            for name, (group_K, why) in groups.items()
        ],
        classes=class_scores(answers.label_N.numpy(), answers.answer_N.numpy(), classes),
        confusions=confusions(answers.label_N.numpy(), answers.answer_N.numpy(), classes),
    )


def _merge_score(
    name: str, why: str, group_K: np.ndarray, answers: Answers, classes: Sequence[str]
) -> MergeScore:
    right_N = group_K[answers.answer_N.numpy()] == group_K[answers.label_N.numpy()]
    return MergeScore(
        name=name,
        why=why,
        groups=group_names(classes, group_K),
        num_classes=int(group_K.max()) + 1,
        num_right=int(right_N.sum()),
        accuracy_fraction=float(right_N.mean()),
    )


def _calibration(answers: Answers, val: Answers | None) -> Calibration:
    temperature = best_temperature(val) if val else None
    scaled = answers.scaled(temperature) if temperature else None
    return Calibration(
        error_fraction=calibration_error(answers),
        temperature=temperature,
        scaled_error_fraction=calibration_error(scaled) if scaled else None,
        scaled_loss=scaled.loss() if scaled else None,
    )


def calibration_error(answers: Answers) -> float:
    """The expected calibration error in NUM_BINS bins of confidence, each without its lower end."""
    confidence_N = answers.logits_NK.softmax(1).amax(1).numpy()
    right_N = (answers.answer_N == answers.label_N).numpy()
    bin_N = np.clip(np.ceil(confidence_N * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    gap_of_bin = np.bincount(bin_N, weights=right_N - confidence_N, minlength=NUM_BINS)
    return float(np.abs(gap_of_bin).sum() / len(right_N))


def best_temperature(answers: Answers) -> float:
    """The temperature of the least loss, within limits."""
    return temperature_of(answers.logits_NK, answers.label_N)


def class_scores(
    label_N: np.ndarray, answer_N: np.ndarray, classes: Sequence[str]
) -> list[ClassScore]:
    """A line a class that has samples, in the order of the classes."""
    count_TR = _counted(label_N, answer_N, len(classes))
    found = []
    for k in np.flatnonzero(count_TR.sum(1)).tolist():
        wrong_R = count_TR[k].copy()
        wrong_R[k] = 0
        most = int(wrong_R.argmax())
        found.append(
            ClassScore(
                name=classes[k],
                num_samples=int(count_TR[k].sum()),
                num_right=int(count_TR[k, k]),
                accuracy_fraction=float(count_TR[k, k] / count_TR[k].sum()),
                mistaken_for=classes[most] if wrong_R[most] else None,
                num_mistaken=int(wrong_R[most]),
            )
        )
    return found


def confusions(label_N: np.ndarray, answer_N: np.ndarray, classes: Sequence[str]) -> list[Confused]:
    """What is read as what most often; of equal counts the classes' order decides."""
    count_TR = _counted(label_N, answer_N, len(classes))
    num_T = count_TR.sum(1)
    np.fill_diagonal(count_TR, 0)
    order = np.argsort(-count_TR, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = np.stack(np.unravel_index(order, count_TR.shape), axis=1).tolist()
    return [
        Confused(
            true=classes[t],
            read=classes[r],
            num_samples=int(count_TR[t, r]),
            share_fraction=float(count_TR[t, r] / num_T[t]),
        )
        for t, r in pairs
        if count_TR[t, r]
    ]


def _counted(label_N: np.ndarray, answer_N: np.ndarray, num_classes: int) -> np.ndarray:
    """count_TR: samples of true class T that are read as class R."""
    count_TR = np.zeros((num_classes, num_classes), int)
    np.add.at(count_TR, (label_N, answer_N), 1)
    return count_TR
