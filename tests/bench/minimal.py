"""What the engine adds to PyTorch's own operations: its step and a bare loop of them, in turn.

python -m tests.bench.minimal BATCH ROUNDS STEPS prints two lists of milliseconds: the median step
of each round of STEPS steps. Both sides train the same network by the same optimiser in one
process, since how fast a step is depends on the weights (other learning rates changed it by 5 %)
and on where the heap's blocks lie (as much from process to process).

The operations are those of `rung_bf16`: gather by id from uint8 images, scale to 0..1,
channels-last, bf16 autocast, cross entropy with smoothing, fused AdamW. The engine adds the order's
ids, the table of rates, right answers, the check of the gradients, the log.
"""

import json
import sys
import time
from collections.abc import Iterator
from statistics import median

import torch
from torch.nn import functional

from engine.config import RunConfig, override
from engine.config_text import load_toml
from engine.data.records import Records, open_records
from engine.data.sample import ensure_sample
from engine.host import ROOT
from engine.train.session import Session, open_session
from engine.world import start_world
from tools.measure.steps import endless


def bare(session: Session, records: Records, batch_size: int) -> Iterator[object]:
    """The same on the same network, typed out."""
    model, optimizer, train = session.step.model, session.step.optimizer, records.split("train")
    image_NHW, label_N = torch.from_numpy(train.image_NHW), torch.from_numpy(train.label_N)
    while True:
        for id_B in torch.randperm(len(train)).split(batch_size)[: len(train) // batch_size]:
            image_BHW = image_NHW.index_select(0, id_B)
            # the engine's check of the gradients is not part of it
            optimizer.found_inf = None  # type: ignore[attr-defined]
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits_BC = model(image_BHW)  # casts, scales and lays out, as a user would
            label_B = label_N.index_select(0, id_B).long()
            functional.cross_entropy(logits_BC.float(), label_B, label_smoothing=0.05).backward()
            optimizer.step()
            yield None


def step_ms(steps: Iterator[object], num_steps: int) -> float:
    """The median of so many steps."""
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - start)
    return 1000 * median(times)


def main(batch_size: int, rounds: int, num_steps: int) -> dict[str, list[float]]:
    """Milliseconds of each round, after one that does not count."""
    config = load_toml(RunConfig(), ROOT / "bench_configs" / "rung_bf16.toml")
    with start_world("cpu") as world:
        records = open_records(ensure_sample())
        session = open_session(
            override(config, {"global_batch": batch_size}, "minimal"), records, world
        )
        sides = {"engine": endless(session), "bare": bare(session, records, batch_size)}
        found: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name in sorted(sides, reverse=bool(number % 2)):
                found[name].append(step_ms(sides[name], num_steps))
        session.close()
    return {name: times[1:] for name, times in found.items()}


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:4]))))
