"""What the networks of several runs answer together: the mean of their probabilities.

Plain, or calibrated: each network's logits divided by its own temperature first, which is that of
the least loss on val, and never fitted on what is reported. Networks are run in fp32, whatever
precision they were trained in, one after the other.

Does not: choose among the networks (tools/measure/evaluation.py).

Shapes: N samples, B of them in a batch, K classes.
"""

from pathlib import Path

import numpy as np
import torch

from engine.config import RunConfig
from engine.data.records import Records, Split
from engine.data.split import HELD_OUT
from engine.train.answers import all_logits
from engine.train.backends import set_fp32_precision
from engine.train.folder import WEIGHTS
from engine.train.sweep import Vote
from engine.train.weights import load_network, network_facts

TEMPERATURES = (0.05, 20.0)
"""The search ends there: the answers of a network that is never wrong want a temperature of 0."""
NUM_HALVINGS = 40
"""Of log(400), the range above: what is left is far below what a float holds."""


class Ballot:
    """The sums of probabilities of the networks so far, on val and test, plain and calibrated."""

    def __init__(self, records: Records, device: torch.device) -> None:
        self._records = records
        self._device = device
        self._splits = [name for name in HELD_OUT if len(records.splits.get(name, ()))]
        self._num = 0
        self._sum_NK: dict[tuple[str, bool], torch.Tensor] = {}
        """By split, and whether calibrated."""

    def add(self, config: RunConfig, run: Path) -> float | None:
        """Count a finished run's network in; its temperature, None where there is no val split.

        Raises:
            UserError: its weights are not there, damaged, or another network's.
        """
        set_fp32_precision("fp32")
        records = self._records
        facts = network_facts(config.model, records)
        model = load_network(config.model, facts, run / WEIGHTS).to(self._device)
        splits = {name: records.split(name) for name in self._splits}
        logits_NK = {
            name: all_logits(model, split.image_NHW, self._device).double()
            for name, split in splits.items()
        }
        temperature = None
        if "val" in logits_NK:
            temperature = best_temperature(logits_NK["val"], _labels(records.split("val")))
        for name, each_NK in logits_NK.items():
            self._add(name, False, each_NK)
            if temperature:
                self._add(name, True, each_NK / temperature)
        self._num += 1
        return temperature

    def votes(self) -> list[Vote]:
        """Of at least two networks; else none."""
        kinds = sorted({is_calibrated for _, is_calibrated in self._sum_NK})
        if self._num < 2:
            return []
        return [
            Vote(
                num_members=self._num,
                is_calibrated=is_calibrated,
                val_accuracy_fraction=self._accuracy("val", is_calibrated),
                test_accuracy_fraction=self._accuracy("test", is_calibrated),
            )
            for is_calibrated in kinds
        ]

    def _add(self, split: str, is_calibrated: bool, logits_NK: torch.Tensor) -> None:
        probability_NK = logits_NK.softmax(1)
        key = (split, is_calibrated)
        self._sum_NK[key] = self._sum_NK.get(key, 0.0) + probability_NK

    def _accuracy(self, split: str, is_calibrated: bool) -> float | None:
        sum_NK = self._sum_NK.get((split, is_calibrated))
        if sum_NK is None:
            return None
        right_N = sum_NK.argmax(1) == _labels(self._records.split(split))
        return float(right_N.double().mean())


def _labels(split: Split) -> torch.Tensor:
    return torch.from_numpy(split.label_N.astype(np.int64))


def best_temperature(logits_NK: torch.Tensor, label_N: torch.Tensor) -> float:
    """The temperature of the least loss, within TEMPERATURES.

    The loss is convex in 1 / temperature; its slope there, mean logit under the softmax less that
    of the label, is halved in on. Temperature scaling: Guo, Pleiss, Sun and Weinberger, 2017
    (arXiv:1706.04599).
    """
    low, high = (float(np.log(end)) for end in TEMPERATURES)
    label_logit_N = logits_NK.gather(1, label_N[:, None])[:, 0]
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        probability_NK = (logits_NK / np.exp(middle)).softmax(1)
        expected_N = (probability_NK * logits_NK).sum(1)
        if float((expected_N - label_logit_N).mean()) > 0:  # less sure, so hotter, is better
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))
