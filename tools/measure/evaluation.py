"""Runs evaluated on a split: each alone, pooled, and as an ensemble; evaluation.json, typed.

The networks are run in fp32, whatever precision they were trained in. Each run is answered on the
split of its own records, so that runs on several draws of a split can be pooled, or all on other
records of the same classes; an ensemble is of runs on the same records.

Does not: train; choose anything by the split that is reported, unless that is val itself.

Shapes: M runs, N samples, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

import numpy as np
import torch

from engine.config import RunConfig
from engine.data.records import Records, open_records
from engine.errors import UserError
from engine.report import Environment, NetworkFacts
from engine.train.answers import all_logits
from engine.train.backends import set_fp32_precision
from engine.train.weights import load_network
from engine.typed import read_result_as
from tools.measure.scores import Answers, Scores, scores_of
from tools.measure.trained import (
    Trained,
    check_same_task,
    find_weights,
    known_facts,
    open_run_records,
    run_config,
)

FORMAT = 1
NAME = "evaluation.json"
VAL = "val"
LEAST_RUNS = 2
"""Of an ensemble, and of what is pooled."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of every run."""

    split: str = "test"
    shifts: bool = False
    """Average the logits over the image and its four one-pixel shifts."""
    confused_share: float = 0.1
    """Of the samples of two classes on val: where more were swapped, the two look alike."""


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """A run, and how right it is."""

    name: str
    network: str
    seed: int
    dataset_fingerprint: str
    """Of the records it was trained on."""
    scores: Scores
    evaluated_fingerprint: str = ""
    """Of those it was evaluated on; "": the same."""

    @property
    def is_elsewhere(self) -> bool:
        """Whether it was evaluated on other records than it was trained on."""
        return self.evaluated_fingerprint not in ("", self.dataset_fingerprint)


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """A figure over all samples of all runs, and how it differs between them."""

    name: str
    value: float
    """Each sample of each run counts once: right answers over samples."""
    low: float
    """The lowest and the highest of a run."""
    high: float
    deviation: float
    """Standard deviation over runs."""
    num_runs: int
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Runs whose probabilities are averaged."""

    runs: list[str]
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """evaluation.json."""

    format: int = FORMAT
    environment: Environment
    split: str
    shifts: bool
    confused_share_fraction: float
    runs: list[RunScores]
    pooled: list[Pooled]
    """Empty for a single run."""
    ensemble: Ensemble | None
    """Of all runs."""
    best_ensemble: Ensemble | None
    """Of those that were best together on val, added one by one."""
    notes: list[str]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this reader knows {FORMAT}")
        if not self.runs:
            raise ValueError("no run was evaluated")


def read_evaluation(folder: Path) -> Evaluation:
    """FOLDER/evaluation.json.

    Raises:
        UserError: it is missing, damaged or of another format.
    """
    remedy = "make it with tools/evaluate RUN --out"
    return read_result_as(Evaluation, folder / NAME, "evaluation", remedy)


@dataclass(frozen=True)
class Answered:
    """A run's answers to the split, and to val where there is one with images."""

    name: str
    config: RunConfig
    fingerprint: str
    """Of the records it was trained on."""
    evaluated_fingerprint: str
    classes: tuple[str, ...]
    on_split: Answers
    on_val: Answers | None


class Opened:
    """The records that runs are evaluated on, each read once."""

    def __init__(self, data: Path | None) -> None:
        """`data`: the records of all runs; None: each run's own."""
        self.data = data
        self._by_fingerprint: dict[str, Records] = {}

    def of(self, config: RunConfig, trained: Trained, facts: NetworkFacts) -> Records:
        """The records that a run is to be evaluated on.

        Raises:
            UserError: they are not there, or the network does not answer with their classes.
        """
        if self.data is None:
            key = trained.fingerprint
            if key not in self._by_fingerprint:
                opened = open_run_records(config, None, key)
                check_same_task(facts, opened)
                self._by_fingerprint = {key: opened}  # one at a time: they may be large
            return self._by_fingerprint[key]
        if not self._by_fingerprint:
            opened = open_records(self.data)
            self._by_fingerprint = {opened.fingerprint: opened}
        (records,) = self._by_fingerprint.values()
        check_same_task(facts, records)
        return records


def answer(
    run: Path, opened: Opened, question: Question, device: torch.device, model: str = ""
) -> Answered:
    """What the run's network answers.

    Args:
        model: FILE.py:NAME where it is of the user's own.
    Raises:
        UserError: the run, its weights or the records are not there or not whole; the records have
            other classes or images of another size; or the split is not there, or has no image.
    """
    set_fp32_precision("fp32")
    trained = find_weights(run)
    config = run_config(trained, model)
    facts = known_facts(trained, config, opened.data)
    records = opened.of(config, trained, facts)
    records.asked(question.split)
    network = load_network(config.model, facts, trained.file).to(device)

    def on(name: str) -> Answers:
        split = records.split(name)
        logits_NK = all_logits(network, split.image_NHW, device, shifts=question.shifts)
        if not logits_NK.isfinite().all():
            raise UserError(f"{run}: answers with numbers that are not finite; train it again")
        return Answers(logits_NK, split.label_N)

    on_split = on(question.split)
    on_val = None
    if len(records.splits.get(VAL, ())):
        on_val = on_split if question.split == VAL else on(VAL)
    name, folder = run.name, trained.file.parent
    if trained.run and folder != trained.run:
        name = f"{trained.run.name}/{folder.name}"
    return Answered(
        name=name,
        config=config,
        fingerprint=trained.fingerprint,
        evaluated_fingerprint=records.fingerprint,
        classes=records.classes,
        on_split=on_split,
        on_val=on_val,
    )


def evaluate(
    answered: Sequence[Answered], question: Question, environment: Environment, *, ensemble: bool
) -> Evaluation:
    """What the answers of at least one run are worth.

    Raises:
        UserError: the runs can be no ensemble, and one was asked for.
    """
    if ensemble:
        check_ensemble(answered)
    runs = [
        RunScores(
            name=each.name,
            network=each.config.model.name,
            seed=each.config.seed,
            dataset_fingerprint=each.fingerprint,
            scores=_scores(each, question),
            evaluated_fingerprint=each.evaluated_fingerprint,
        )
        for each in answered
    ]
    return Evaluation(
        environment=environment,
        split=question.split,
        shifts=question.shifts,
        confused_share_fraction=question.confused_share,
        runs=runs,
        pooled=pool([run.scores for run in runs]),
        ensemble=_ensemble(answered, question) if ensemble else None,
        best_ensemble=_best_ensemble(answered, question) if ensemble else None,
        notes=_notes(answered, question),
    )


def _scores(answered: Answered, question: Question) -> Scores:
    classes, share = answered.classes, question.confused_share
    return scores_of(answered.on_split, classes, answered.on_val, share)


def _notes(answered: Sequence[Answered], question: Question) -> list[str]:
    notes = []
    if any(each.evaluated_fingerprint != each.fingerprint for each in answered):
        notes.append(
            f"these are other records than those trained on: nothing shows that training did not "
            f"see images of this {question.split} split"
        )
    if any(each.on_val is None for each in answered):
        notes.append("without a val split there is no temperature and no measured look-alike")
    elif question.split == VAL:
        notes.append("temperature and measured look-alikes are fitted on val, and reported there")
    return notes


FIGURES: dict[str, Callable[[Scores], float]] = {
    "top-1": lambda scores: scores.accuracy_fraction,
    "top-2": lambda scores: scores.top2_accuracy_fraction,
    "loss": lambda scores: scores.loss,
}


def figures(scores: Scores) -> dict[str, float]:
    """The figures that can be pooled, means over samples: FIGURES, and top-1 with each merge."""
    merges = {f"top-1, {merge.name}": merge.accuracy_fraction for merge in scores.merges}
    return {name: figure(scores) for name, figure in FIGURES.items()} | merges


def pool(runs: Sequence[Scores]) -> list[Pooled]:
    """Each figure that all runs have; nothing of a single run."""
    if len(runs) < LEAST_RUNS:
        return []
    each = [figures(scores) for scores in runs]
    weight_M = [scores.num_samples for scores in runs]
    found = []
    for name in each[0]:
        if all(name in run for run in each):
            value_M = [run[name] for run in each]
            found.append(
                Pooled(
                    name=name,
                    value=float(np.average(value_M, weights=weight_M)),
                    low=min(value_M),
                    high=max(value_M),
                    deviation=stdev(value_M),
                    num_runs=len(runs),
                    num_samples=sum(weight_M),
                )
            )
    return found


def check_ensemble(answered: Sequence[Answered]) -> None:
    """UserError unless there are several runs, all evaluated on the same records."""
    if len(answered) < LEAST_RUNS:
        raise UserError("--ensemble: is of several runs; name another one, or leave it out")
    first = answered[0]
    for other in answered[1:]:
        if other.evaluated_fingerprint != first.evaluated_fingerprint:
            raise UserError(
                f"{other.name}: was trained on other records than {first.name} (fingerprint "
                f"{other.fingerprint[:16]}, not {first.fingerprint[:16]}), and an ensemble answers "
                "to one split; leave out --ensemble to pool the runs"
            )


def averaged(members: Sequence[Answers]) -> Answers:
    """The mean of the members' probabilities, as logarithms."""
    log_MNK = torch.stack([each.logits_NK.log_softmax(1) for each in members])
    mean_NK = log_MNK.logsumexp(0) - float(np.log(len(members)))
    return Answers(mean_NK, members[0].label_N.numpy())


def _ensemble(answered: Sequence[Answered], question: Question) -> Ensemble:
    on_val = [each.on_val for each in answered if each.on_val]
    scores = scores_of(
        averaged([each.on_split for each in answered]),
        answered[0].classes,
        averaged(on_val) if on_val else None,
        question.confused_share,
    )
    return Ensemble(runs=[each.name for each in answered], scores=scores)


def _best_ensemble(answered: Sequence[Answered], question: Question) -> Ensemble | None:
    on_val = [each.on_val for each in answered if each.on_val]
    if not on_val:
        return None
    return _ensemble([answered[number] for number in best_members(on_val)], question)


def best_members(on_val: Sequence[Answers]) -> list[int]:
    """Which members are best together: the best one, then whichever helps most, while one does.

    By right answers, then loss. Forward selection, as in Caruana, Niculescu-Mizil, Crew and
    Ksikes, 2004, each member at most once; not every set is tried.
    """
    chosen: list[int] = []
    best = (-1, 0.0)
    while rest := [number for number in range(len(on_val)) if number not in chosen]:
        tried = {}
        for number in rest:
            vote = averaged([on_val[member] for member in (*chosen, number)])
            tried[number] = (vote.num_right, -vote.loss())
        winner = max(rest, key=lambda number: tried[number])
        if tried[winner] <= best:
            break
        best = tried[winner]
        chosen.append(winner)
    return chosen
