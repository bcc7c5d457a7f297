"""--parallel ddp and fsdp on 2 gloo ranks of one thread each, in turn: samples/s, and bytes a rank.

The study's network at a global batch of 512, and a vision transformer of 25 M parameters at a small
one, where each step moves 100 MB by DDP and half as much again by FSDP, and a rank keeps 400 MB or
half of it. Both ranks are on one machine: gloo carries the bytes through its memory.
"""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click

from engine.report import RankBytes
from tests.bench import OUT
from tests.bench.child import measured
from tools.measure.results import Repetition, Settings
from tools.report.rows import Row, claim, row, write_result

NUM_RANKS = 2
KINDS = ("ddp", "fsdp")
NETWORKS: dict[str, tuple[int, int, Settings]] = {
    "baseline": (512, 1, {"model.name": "baseline"}),
    "vit base": (8, 8, {"model.name": "vit", "model.vit_size": "base"}),
}
"""Global batch, how many times fewer steps are timed, and what is set."""
LEAST_PERCENT = 85
"""Of DDP's samples/s, for the first of them."""


@dataclass
class Side:
    """A network, and what was measured of it by DDP and by FSDP."""

    title: str
    global_batch: int
    num_steps: int
    settings: Settings
    found: dict[str, list[Repetition]] = field(default_factory=lambda: {k: [] for k in KINDS})

    def measure(self, kind: str) -> None:
        """Once more."""
        found = measured(
            "rung_bf16",
            batch_size=self.global_batch // NUM_RANKS,
            num_steps=self.num_steps,
            num_ranks=NUM_RANKS,
            num_threads=1,
            changed=self.settings | {"step.precision": "fp32", "step.parallel": kind},
        )
        assert found.effective["parallel"] == kind, found.notes
        self.found[kind].append(found)

    def percents(self) -> list[float]:
        """FSDP's samples/s of DDP's, round by round."""
        pairs = zip(*(self.found[kind] for kind in KINDS), strict=True)
        return [100 * fsdp.rate / ddp.rate for ddp, fsdp in pairs]

    def rows(self) -> list[Row]:
        """Samples/s, and what a rank keeps between two steps."""
        name = f"{self.title}, global batch {self.global_batch}"
        rows = [
            row(f"{name}: {kind}", [one.rate for one in self.found[kind]], "samples/s")
            for kind in KINDS
        ]
        rows.append(row(f"{name}: fsdp of ddp, round by round", self.percents(), "%"))
        for kind in KINDS:
            kept = [one.kept for one in self.found[kind] if one.kept]
            rows += [row(f"{name}: {kind}, {what}", mb, "MB") for what, mb in megabytes(kept)]
        return rows


def megabytes(kept: list[RankBytes]) -> list[tuple[str, list[float]]]:
    """What rank 0 keeps, and of what."""
    return [
        ("parameters a rank", [each.parameters_bytes / 1e6 for each in kept]),
        ("gradients a rank", [each.gradients_bytes / 1e6 for each in kept]),
        ("optimiser a rank", [each.optimizer_bytes / 1e6 for each in kept]),
    ]


def bench(out: Path, rounds: int, num_steps: int) -> None:
    """Measure and write OUT/cpu_fsdp.json."""
    sides = [
        Side(title, batch, max(num_steps // fewer, 2), settings)
        for title, (batch, fewer, settings) in NETWORKS.items()
    ]
    for number in range(rounds):
        for side in sides:
            for kind in KINDS[:: -1 if number % 2 else 1]:
                side.measure(kind)
    first = sides[0]
    percent = median(first.percents())
    write_result(
        out / "cpu_fsdp.json",
        title=f"FSDP beside DDP, {NUM_RANKS} gloo ranks of one thread, fp32 channels-last",
        environment=first.found["fsdp"][-1].facts,
        rows=[each for side in sides for each in side.rows()],
        claims=[claim(f"fsdp of ddp's samples/s, {first.title} (%)", percent, LEAST_PERCENT)],
    )


@click.command()
@OUT
@click.option("--rounds", default=3, show_default=True)
@click.option("--steps", default=24, show_default=True)
def main(out: Path, rounds: int, steps: int) -> None:
    """Benchmark sharding."""
    bench(out, rounds, steps)


if __name__ == "__main__":
    main()
