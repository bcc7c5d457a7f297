"""What `tools/profile plan` predicts against what is then measured: steps and all-reduces.

The study's network in fp32, on ranks of one thread: one and two on this machine, and two on two
nodes (network namespaces of this machine) whose only link is shaped. A round measures what the plan
would: steps of one rank at two batches, two at once, collectives over their bytes. From it steps at
a batch between those and all-reduces of other bytes are predicted, and they are measured, too. Of
fsdp the same is shown, without a claim: its own work is not in the prediction.

The study's efficiencies on several GPUs stand beside those predicted from its times on one, with
rates of links that are assumed: they say what a link alone would have cost.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import click

from engine.config import RunConfig, override
from engine.data.sample import ensure_sample
from engine.report import Environment, write_json
from engine.typed import read_as
from tests.bench import OUT
from tests.bench.child import job_of, measured
from tests.reliability.nodes import Nodes, NoNodes
from tools.measure.counted import Counted, count
from tools.measure.fit import Link, Point, fitted_link, given_link, read_link
from tools.measure.link import SIZES_BYTES, link_here
from tools.measure.operations import STUDYS_SHAPE
from tools.measure.predicted import Model
from tools.measure.results import Repetition, Settings
from tools.measure.runner import Job
from tools.measure.timings import MODEL, StepTime, Timings, slowdown_of, step_ms_of
from tools.report.rows import Claim, Row, claim, row, write_result

BATCHES = (256, 512)
BETWEEN = 384
"""The batch that is predicted, of a rank."""
OTHER_BYTES = (160_000, 1_729_912, 3_000_000)
"""Of the all-reduces that are predicted; the second is a step's."""
NUM_LOCAL = 2
"""Ranks of this machine: both nodes are on it."""
RATES = {"1gbit": "128kb", "100mbit": "32kb"}
"""Of the link, and what it lets through at once: too little of it, and a timer that is late costs
rate."""
ENDS_S = 240.0
MOST_STEP_PERCENT = 10.0
MOST_REDUCE_PERCENT = 15.0
SETTINGS: Settings = {"model.name": "baseline", "step.precision": "fp32"}
STUDY_SAMPLES = 94 * 2848 * 7 // 10
"""Of its training split: 2,848 a class, 70 %."""
STUDY_P100_S = 45.43
"""12 epochs on four, 3.7 times as fast as on one."""
STUDY = {
    "P100": (64, 12 * STUDY_SAMPLES / (STUDY_P100_S * 3.7), 4, 3.7),
    "H100": (2048, 63_000.0, 4, 3.38),
}
"""Batch a rank, samples/s of one, and its speed-up on so many; bench_configs/study_ddp.toml and
study_amp.toml have the source."""
ASSUMED_ALPHA_US = 10.0
ASSUMED_GBPS = {"P100": 126.0, "H100": 3600.0}
"""PCI Express 3.0 x16 and NVLink 4, each way, by their specifications: what was between the study's
GPUs is not known."""


@dataclass
class Pair:
    """What was predicted of a thing and what it took, round by round."""

    unit: str
    most_percent: float | None
    """By which the median prediction may be off; None: nothing is claimed."""
    predicted: list[float]
    measured: list[float]

    def percents(self) -> list[float]:
        """How far predictions are off."""
        pairs = zip(self.predicted, self.measured, strict=True)
        return [100 * (predicted / measured - 1) for predicted, measured in pairs]

    def rows(self, name: str) -> list[Row]:
        return [
            row(name, self.measured, self.unit),
            row(f"{name}: predicted ({MODEL})", self.predicted, self.unit),
            row(f"{name}: prediction off", self.percents(), "%"),
        ]

    def claims(self, name: str) -> list[Claim]:
        if self.most_percent is None:
            return []
        off = abs(median(self.percents()))
        return [claim(f"{name}: prediction off (%)", off, self.most_percent, at_most=True)]


@dataclass
class Found:
    """What was measured in a round, before anything is predicted."""

    timings: Timings
    peak_gib: float
    """Of one rank at the batch between."""
    links: dict[str, list[Point]] = field(default_factory=dict)
    """By where the ranks are: all points, those to be predicted among them."""
    steps_ms: dict[tuple[str, int, str], float] = field(default_factory=dict)
    """By where, ranks and wrapper; at the batch between."""


def a_round(num_steps: int) -> tuple[Found, Environment]:
    """Measure once."""

    def step(batch: int, num_ranks: int = 1, parallel: str = "ddp") -> Repetition:
        return measured(
            "rung_bf16",
            batch_size=batch,
            num_steps=num_steps,
            num_ranks=num_ranks,
            num_threads=1,
            changed=SETTINGS | {"step.parallel": parallel},
        )

    alone = {batch: step(batch) for batch in (*BATCHES, BETWEEN)}
    job = job_between(num_steps, num_ranks=1)
    ends = ((batch, alone[batch]) for batch in BATCHES)
    timings = Timings(
        basis="measured",
        device="CPU",
        steps=[_step_time(batch, step_ms_of(it), _peak_gib(it)) for batch, it in ends],
        slowdowns=[slowdown_of(job, 2, 1)],
    )
    found = Found(timings, _peak_gib(alone[BETWEEN]))
    here = "this machine"
    found.steps_ms[here, 1, "ddp"] = step_ms_of(alone[BETWEEN])
    for parallel in ("ddp", "fsdp"):
        found.steps_ms[here, 2, parallel] = step_ms_of(step(BETWEEN, 2, parallel))
    found.links[here] = link_here([2], "cpu", (*SIZES_BYTES, *OTHER_BYTES)).points
    for rate, burst in RATES.items():
        with two_nodes(rate, burst) as nodes:
            if nodes:
                where = f"two nodes, {rate}"
                found.links[where] = _link_of(nodes).points
                found.steps_ms[where, 2, "ddp"] = step_ms_of(_step_of(nodes, num_steps))
    return found, alone[BETWEEN].facts


def job_between(num_steps: int, num_ranks: int) -> Job:
    """Of the batch that is predicted, under ddp."""
    return job_of(
        "rung_bf16",
        batch_size=BETWEEN,
        num_steps=num_steps,
        num_ranks=num_ranks,
        num_threads=1,
        changed=SETTINGS,
    )


def _step_time(batch: int, ms: float, peak_gib: float) -> StepTime:
    return StepTime(
        precision="fp32", batch=batch, step_ms=ms, low_ms=ms, high_ms=ms, n=1, peak_gib=peak_gib
    )


def _peak_gib(found: Repetition) -> float:
    assert found.host_peak_rss_gib is not None
    return found.host_peak_rss_gib


@contextmanager
def two_nodes(rate: str, burst: str) -> Iterator[Nodes | None]:
    """Two namespaces with a link of this rate; None, said so, where there can be none."""
    with tempfile.TemporaryDirectory() as folder:
        nodes = Nodes(Path(folder), ("rate", rate, "burst", burst, "latency", "50ms"))
        try:
            nodes.make()
        except NoNodes as error:
            click.echo(f"two nodes, {rate}: skipped: {error}; run it as root")
            nodes.remove()
            yield None
            return
        try:
            nodes.empty()
            yield nodes
        finally:
            nodes.remove()


def _link_of(nodes: Nodes) -> Link:
    out = nodes.folders[0] / "link.json"
    sizes = (f"--bytes={size}" for size in (*SIZES_BYTES, *OTHER_BYTES))
    _run(nodes, "tools.measure.link", str(out), "--device=cpu", *sizes)
    return read_link(out)


def _step_of(nodes: Nodes, num_steps: int) -> Repetition:
    job = job_between(num_steps, num_ranks=2)
    file, result = nodes.folders[0] / "job.json", nodes.folders[0] / "repetition.json"
    write_json(replace(job, first=False, data=str(ensure_sample())), file)
    _run(nodes, "tools.measure.cell", str(file), str(result))
    return read_as(Repetition, result)


def _run(nodes: Nodes, module: str, *words: str) -> None:
    """Start a module on both nodes, a rank each, and wait.

    Raises:
        RuntimeError: it failed.
    """
    done = [run.wait(ENDS_S) for run in nodes.start(*words, module=module)]
    if [each.code for each in done] != [0, 0]:
        raise RuntimeError("; ".join(map(str, done)))


def model_of(timings: Timings, link: Link, num_local: int) -> Model:
    """What predicts a step; epochs and memory are not asked for."""
    return Model(
        global_batch=1,
        num_samples=0,
        timings=timings,
        link=link,
        num_local=num_local,
    )


def fit_of(points: list[Point], where: str) -> tuple[Link, list[Point]]:
    """The link by the sizes that a plan measures, and the all-reduces that it must predict."""
    kept = [point for point in points if point.num_bytes in SIZES_BYTES]
    others = [point for point in points if point.num_bytes not in SIZES_BYTES]
    reduces = [point for point in others if point.kind == "all-reduce"]
    return fitted_link(kept, where, "gloo"), reduces


def reduce_name(where: str, point: Point) -> str:
    return f"{where}: all-reduce of {point.num_bytes:,} bytes"


def paired(found: Found, counts: dict[tuple[int, str], Counted]) -> dict[str, Pair]:
    """Predicted and measured of a round, by name."""
    pairs = {}
    for where, points in found.links.items():
        link, reduces = fit_of(points, where)
        model = model_of(found.timings, link, NUM_LOCAL)
        for point in reduces:
            us = link.us("all-reduce", point.num_bytes, point.num_ranks)
            pair = Pair("us", MOST_REDUCE_PERCENT, [us], [point.us])
            pairs[reduce_name(where, point)] = pair
        for (place, num_ranks, parallel), ms in found.steps_ms.items():
            if place != where:
                continue
            predicted = model.predict(counts[num_ranks, parallel], BETWEEN)
            what = f"{where}: step, {num_ranks} x {BETWEEN}"
            most_percent = MOST_STEP_PERCENT if parallel == "ddp" else None
            pairs[f"{what}, {parallel}"] = Pair("ms", most_percent, [predicted.step_ms], [ms])
            if num_ranks == 1:
                memory = Pair("GiB", None, [predicted.rank_gib], [found.peak_gib])
                pairs[f"{what}, memory"] = memory
    return pairs


def fit_rows(all_found: Sequence[Found]) -> list[Row]:
    """Alpha, beta, and how far they are off by themselves, where a plan has nothing else."""
    rows = []
    for where in all_found[-1].links:
        fits = [fit_of(found.links[where], where) for found in all_found]
        rows.append(row(f"{where}: alpha", [link.alpha_us for link, _ in fits], "us"))
        rows.append(row(f"{where}: beta", [link.beta_gbps for link, _ in fits], "Gbit/s"))
        for number, point in enumerate(fits[-1][1]):
            off = [
                100 * (link.fitted_us(point.kind, point.num_bytes, 2) / reduces[number].us - 1)
                for link, reduces in fits
            ]
            rows.append(row(f"{reduce_name(where, point)}: alpha and beta alone off", off, "%"))
    return rows


def bench(out: Path, rounds: int, num_steps: int) -> None:
    """Measure and write OUT/cpu_plan.json."""
    all_found, environments = zip(*(a_round(num_steps) for _ in range(rounds)), strict=True)
    ways = ((1, "ddp"), (2, "ddp"), (2, "fsdp"))
    counts = {way: counted(*way) for way in ways}  # torch at work: after what forks processes
    pairs: dict[str, Pair] = {}
    for found in all_found:
        for name, pair in paired(found, counts).items():
            known = pairs.setdefault(name, replace(pair, predicted=[], measured=[]))
            known.predicted += pair.predicted
            known.measured += pair.measured
    factors = [found.timings.slowdown(2) for found in all_found]
    rows = [row("two steps at once over one alone", factors, "x")]
    rows += [each for name, pair in pairs.items() for each in pair.rows(name)]
    write_result(
        out / "cpu_plan.json",
        title="The plan: predicted against measured, ranks of one thread, fp32",
        environment=environments[-1],
        rows=[*rows, *fit_rows(all_found), *many_ranks(), *study_rows()],
        claims=[each for name, pair in pairs.items() for each in pair.claims(name)],
    )


def counted(num_ranks: int, parallel: str) -> Counted:
    """Of the study's network."""
    changed = SETTINGS | {"step.parallel": parallel}
    return count(override(RunConfig(), changed, "the benchmark"), num_ranks, STUDYS_SHAPE)


def many_ranks() -> list[Row]:
    """What a step of 1,024 ranks sends, and a rank keeps: counted."""
    rows = []
    for parallel in ("ddp", "fsdp"):
        found = counted(1024, parallel)
        name = f"1,024 ranks, {parallel}, counted"
        rows.append(row(f"{name}: a step's collectives", [found.sent_bytes / 1e6], "MB"))
        rows.append(row(f"{name}: kept a rank", [found.kept.total_bytes / 1e6], "MB"))
    return rows


def study_rows() -> list[Row]:
    """The study's efficiencies on several GPUs, beside those that its links alone would leave."""
    rows = []
    for gpu, (batch, one_per_s, num_ranks, speedup) in STUDY.items():
        ms = batch / one_per_s * 1000
        alone = _step_time(batch, ms, peak_gib=0.0)  # memory is not asked for
        timings = Timings(basis=MODEL, device=gpu, steps=[alone])
        model = model_of(timings, given_link(ASSUMED_ALPHA_US, ASSUMED_GBPS[gpu], "nccl"), 1)
        found = model.predict(counted(num_ranks, "ddp"), batch)
        link = f"{ASSUMED_ALPHA_US:g} us and {ASSUMED_GBPS[gpu]:,.0f} Gbit/s assumed"
        name = f"the study, {num_ranks} {gpu}, batch {batch} a rank"
        predicted = 100 * found.efficiency_fraction
        rows.append(row(f"{name}: efficiency, {link} ({MODEL})", [predicted], "%"))
        rows.append(row(f"{name}: efficiency, as published", [100 * speedup / num_ranks], "%"))
    return rows


@click.command()
@OUT
@click.option("--rounds", default=3, show_default=True)
@click.option("--steps", default=24, show_default=True)
def main(out: Path, rounds: int, steps: int) -> None:
    """Benchmark the plan's predictions."""
    bench(out, rounds, steps)


if __name__ == "__main__":
    main()
