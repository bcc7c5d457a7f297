"""The plan: what it predicts of numbers that are known, what it recommends, and its command."""

import json
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from threading import current_thread, main_thread

import pytest

from engine.config import RunConfig, override
from engine.errors import UserError
from engine.meters import GIB
from engine.report import RankBytes, environment, write_json
from tests.conftest import Command, assert_refused
from tools.measure import ledger, timings
from tools.measure.counted import Collective, Counted
from tools.measure.fit import given_link
from tools.measure.ledger import H100
from tools.measure.matrix import config_cell
from tools.measure.operations import STUDYS_SHAPE
from tools.measure.plan import Asked, Plan, make_plan, read_plan, usual_ranks
from tools.measure.predicted import Model, Prediction, Reached, recommend
from tools.measure.results import Repetition
from tools.measure.runner import Job, Run
from tools.measure.timings import MODEL, Here, Slowdown, StepTime, Timings
from tools.report.plan import to_markdown

REPETITION = Repetition(
    seed=0,
    environment=environment(num_threads=1, allocator="", gpu={}),
    effective={"precision": "fp32"},
    samples_per_s=1.0,
    step_ms=10.0,
)
WHOLE = RankBytes(parameters_bytes=4000, gradients_bytes=4000, optimizer_bytes=8000)
HALF = RankBytes(parameters_bytes=2000, gradients_bytes=2000, optimizer_bytes=4000)
GIVEN = ("--alpha-us", 10, "--beta-gbps", 1000)
GPU = ("--gpu", H100)


def step_time(batch: int, ms: float) -> StepTime:
    return StepTime(
        precision="fp32", batch=batch, step_ms=ms, low_ms=ms, high_ms=ms, n=3, peak_gib=ms / 10
    )


def counted(num_ranks: int, parallel: str = "ddp") -> Counted:
    """4,000 bytes of gradients."""
    reduce = Collective(kind="all-reduce", num_bytes=4000, times=2)
    return Counted(
        num_ranks=num_ranks,
        parallel=parallel,
        precision="fp32",
        collectives=[reduce] * (num_ranks > 1),
        kept=HALF if parallel == "fsdp" else WHOLE,
        kept_under_ddp=WHOLE,
        gathered_bytes=6000 if parallel == "fsdp" else 0,
    )


MACHINE = Model(
    global_batch=64,
    num_samples=6400,
    timings=Timings(
        basis="measured",
        device="a test",
        steps=[step_time(32, 10.0), step_time(64, 16.0)],
        slowdowns=[Slowdown(num_ranks=2, factor=1.25)],
    ),
    link=given_link(500.0, 8e-3, "gloo"),
    num_local=2,
    room_bytes=4 * GIB,
    shares_memory=True,
)
"""A byte takes a microsecond."""
RUN = Reached(
    accuracy_fraction=0.9, num_epochs=4, num_samples=6400, global_batch=64, critical_batch=None
)


def test_a_step_is_computing_among_others_and_then_collectives() -> None:
    found = MACHINE.predict(counted(2), 48)
    assert found.compute_ms == pytest.approx(13.0 * 1.25), "between the two batches"
    assert found.collectives_ms == pytest.approx(2 * (2 * 0.5 + 4.0))
    assert found.step_ms == pytest.approx(16.25 + 10.0)
    assert found.samples_per_s == pytest.approx(96 / 26.25e-3)
    assert found.efficiency_fraction == pytest.approx(13 / 26.25)
    assert (found.global_batch, found.sent_bytes, found.basis) == (96, 8000, MODEL)
    assert found.epoch_s == pytest.approx(66 * 26.25e-3), "6,400 samples are 66 whole batches"
    assert found.rank_gib == pytest.approx(1.3) and found.fits


def test_only_a_step_of_one_rank_that_was_timed_is_measured() -> None:
    alone = list(MACHINE.of(counted(1)))
    assert [(each.batch, each.basis) for each in alone] == [(32, "measured"), (64, "measured")]
    assert MACHINE.predict(counted(1), 48).basis == MODEL
    assert [each.batch for each in MACHINE.of(counted(2))] == [32, 64], "half of 64 is 32"
    assert [each.batch for each in MACHINE.of(counted(4))] == [32, 64], "and 16 was not timed"


def test_memory_is_the_measured_one_less_what_others_keep() -> None:
    found = MACHINE.predict(counted(2, "fsdp"), 64)
    assert found.rank_gib == pytest.approx(1.6 + (8000 + 6000 - 16000) / GIB)
    small = replace(MACHINE, room_bytes=3 * GIB)
    assert small.predict(counted(1), 64).fits and not small.predict(counted(2), 64).fits
    steps = [replace(each, peak_gib=None, activation_bytes=100.0) for each in MACHINE.timings.steps]
    of_gpu = replace(MACHINE, timings=Timings(basis=MODEL, device="a GPU", steps=steps))
    assert of_gpu.predict(counted(1), 64).rank_gib == pytest.approx((16000 + 6400) / GIB)


def test_a_global_batch_beyond_the_split_has_no_epoch() -> None:
    assert MACHINE.predict(counted(128), 64).epoch_s is None


def test_epochs_to_an_accuracy_go_by_the_critical_batch() -> None:
    run = replace(RUN, critical_batch=192.0)
    assert run.epochs_at(64) == 4 and run.epochs_at(320) == pytest.approx(4 * 512 / 256)
    assert RUN.epochs_at(64) == 4 and RUN.epochs_at(320) is None
    found = replace(MACHINE, reached=run).predict(counted(2), 64)
    assert found.epoch_s and found.accuracy_s == pytest.approx(5 * found.epoch_s)


def way(num_ranks: int, batch: int, step_ms: float, parallel: str = "ddp") -> Prediction:
    found = MACHINE.predict(counted(num_ranks, parallel), batch)
    return replace(found, step_ms=step_ms, samples_per_s=num_ranks * batch / step_ms * 1000)


def test_the_soonest_of_the_same_batch_is_recommended_and_says_why() -> None:
    ways = [way(1, 64, 16.0), way(2, 32, 10.0), way(2, 32, 9.9, "fsdp"), way(2, 64, 16.5)]
    best, why = recommend(ways, 64, None)
    assert best is ways[1], "fsdp is sooner, by too little"
    assert why.startswith("soonest with the configuration's global batch of 64; 1.60 times as soon")
    assert "of its step are collectives, computing side by side takes 1.25 of the time" in why
    assert "; fsdp takes 0.99 of its time and saves" in why
    best, why = recommend([*ways[:2], replace(ways[2], fits=False)], 64, None, num_threads=1)
    assert "; 1.60 times as soon as the best of one rank of one thread; " in why
    assert why.endswith("; fsdp takes 0.99 of its time and does not fit into the memory")
    best, why = recommend([ways[0], way(2, 32, 15.9)], 64, None)
    assert best.num_ranks == 1 and "the best of several, 2 ranks, takes 0.99 of its time" in why


def test_a_known_accuracy_goes_before_the_batch_and_memory_before_all() -> None:
    ways = [replace(way(1, 64, 16.0), accuracy_s=9.0), replace(way(2, 64, 16.5), accuracy_s=5.0)]
    best, why = recommend(ways, 64, RUN)
    assert best is ways[1] and why.startswith("soonest to 90.00% on val; 1.80 times as soon")
    full = [replace(each, fits=False) for each in ways]
    assert recommend([ways[0], full[1]], 64, RUN)[0] is ways[0]
    with pytest.raises(UserError, match=r"nothing of this fits into memory; give smaller"):
        recommend(full, 64, RUN)
    best, why = recommend(ways, 96, None)
    assert best is ways[1] and why.startswith("most samples/s; nothing is known of its accuracy")


def test_the_recommended_way_is_shown_and_what_does_not_fit_is_last() -> None:
    """Larger batches have more samples/s; the largest is too large."""
    large = [way(2, 32 * n, 10.0 + n) for n in range(2, 6)]
    ways = [*large[:-1], replace(large[-1], fits=False), way(2, 32, 10.0), way(2, 32, 12.0, "fsdp")]
    best, reason = recommend(ways, 64, None)
    plan = Plan(
        command="",
        network="baseline",
        model=MACHINE,
        counted=[counted(2)],
        predictions=ways,
        recommended=best,
        reason=reason,
    )
    rows = [line.split(" | ")[1] for line in to_markdown(plan).splitlines() if " fp32 " in line]
    assert best is ways[4] and rows[:5] == ["128", "96", "64", "32", "32"]
    fewer = replace(plan, predictions=[ways[3], ways[4]])
    assert "| 2 | 160 |" in to_markdown(fewer).split("| 2 | 32 |")[1]


def test_ranks_are_doubled_up_to_all_that_a_machine_has() -> None:
    assert usual_ranks(6) == (1, 2, 4, 6) and usual_ranks(8) == (1, 2, 4, 8)


def test_a_modelled_step_is_the_ledgers() -> None:
    config = override(RunConfig(), {"model.name": "baseline"}, "a test")
    (step,) = timings.modelled_timings(config, ("bf16",), (16,), H100, STUDYS_SHAPE).steps
    settings = {"model.name": "baseline", "step.precision": "bf16", "step.cuda_graphs": True}
    cell = config_cell("a test", settings, 16)
    of_ledger = ledger.counted(cell, ledger.machine_of(H100))
    assert step.step_ms == pytest.approx(of_ledger.step_us / 1000, abs=1e-6)


def test_a_slowdown_is_the_slowest_of_several_at_once_over_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """10 ms alone; of two at once one takes 15."""
    together_ms = cycle([12.0, 15.0])

    def fake(job: Job) -> Repetition:
        is_alone = current_thread() is main_thread()
        return replace(REPETITION, step_ms=10.0 if is_alone else next(together_ms))

    monkeypatch.setattr(timings, "in_child", fake)
    cell = config_cell("a test", {}, 16)
    job = Run(title="", cells=[cell], out=Path()).job(cell, 0)
    assert timings.slowdown_of(job, 2, 3).factor == 1.5


@pytest.mark.parametrize(("used_gib", "peak_gib"), [(3.5, 3.5), (None, 3.0)])
def test_memory_of_a_gpu_is_with_what_cuda_takes_where_it_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, used_gib: float | None, peak_gib: float
) -> None:
    found = replace(REPETITION, torch_peak_gib=3.0, device_used_gib=used_gib, host_peak_rss_gib=9.0)
    monkeypatch.setattr(timings, "in_child", lambda job: replace(found, digest=job.digest))
    here = Here(out=tmp_path, device="cuda", num_gpus=1, num_steps=1, repetitions=1)
    steps = timings.measured_timings(RunConfig(), ("fp32",), (16,), set(), here).steps
    assert [each.peak_gib for each in steps] == [peak_gib]


def test_a_gpu_that_is_not_here_and_1024_ranks(
    command: Command, small_dir: Path, tmp_path: Path
) -> None:
    words = ("--ranks", "1,2,1024", "--batches", 64, "--precisions", "bf16", "--data", small_dir)
    done = command("tools/profile", "plan", *GPU, *GIVEN, *words, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    plan = read_plan(tmp_path / "plan.json")
    assert {each.basis for each in plan.predictions} == {MODEL}
    assert {(each.num_ranks, each.parallel) for each in plan.predictions} == {
        (1, "ddp"), (2, "ddp"), (2, "fsdp"), (1024, "ddp"), (1024, "fsdp"),
    }  # fmt: skip
    assert plan.recommended in plan.predictions and plan.model.timings.device == H100
    assert plan.model.link and plan.model.link.alpha_us == 10
    assert plan.model.link.beta_gbps == 1000
    text = (tmp_path / "plan.md").read_text()
    assert to_markdown(plan) == text and text in done.stdout
    assert f"### Ways of training ({MODEL})" in text
    write_json(plan, tmp_path / "again.json")
    assert read_plan(tmp_path / "again.json") == plan


def test_time_to_the_accuracy_of_a_run(command: Command, small_dir: Path, tmp_path: Path) -> None:
    """Its config, too; another batch has a time where the noise scale was known."""
    run = ("--epochs", 2, "--batch-size", 32, "--noise-scale", "--model", "baseline")
    done = command("python", "-m", "engine.run", *run, "--data", small_dir, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    words = ("--batches", "16,32", "--ranks", "1,2", "--precisions", "bf16")
    line = (*GPU, *GIVEN, *words, "--run", tmp_path / "r", "--out", tmp_path / "p")
    done = command("tools/profile", "plan", *line)
    assert done.returncode == 0, done.stderr
    plan = read_plan(tmp_path / "p" / "plan.json")
    reached = plan.model.reached
    assert reached and (reached.num_epochs, reached.global_batch) == (2, 32)
    assert plan.network == "baseline" and plan.model.num_samples == reached.num_samples
    for each in plan.predictions:
        is_known = reached.critical_batch is not None or each.global_batch == 32
        assert (each.accuracy_s is not None) == is_known
        if each.global_batch == 32 and each.epoch_s:
            assert each.accuracy_s == pytest.approx(2 * each.epoch_s)
    assert plan.reason.startswith(f"soonest to {reached.accuracy_fraction:.2%} on val")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (GPU, "--gpu: how fast its ranks talk is not known; give --fit LINK"),
        (("--ranks", "1024"), "--ranks 1024: this machine has"),
        (("--gpu", "GeForce 256", *GIVEN), "--gpu GeForce 256: there is no model of it"),
        ((*GPU, *GIVEN, "--ranks", "0,2"), "--ranks 0,2: give whole numbers from 1 to 1024"),
        ((*GPU, *GIVEN, "--ranks", "1025"), "--ranks 1025: give whole numbers from 1 to 1024"),
        ((*GPU, *GIVEN, "--batches", "x"), "--batches x: give whole numbers"),
        ((*GPU, *GIVEN, "--precisions", "int4"), "--precisions: is 'int4'; choose from all, fp32"),
        ((*GPU, *GIVEN, "--parallel", "tensor"), "--parallel: is 'tensor'; choose from all, ddp"),
        ((*GPU, *GIVEN, "--fit", "x.json"), "--fit: has an alpha and a beta"),
        ((*GPU, "--alpha-us", 1), "--alpha-us and --beta-gbps: one says nothing alone"),
        ((*GPU, "--fit", "there/is/none.json"), "there/is/none.json: cannot be read"),
        ((*GPU, *GIVEN, "--run", "no/run"), "no/run"),
        (("--batches", "100000", "--ranks", "1"), "--batches 100000: larger than the train split"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_line(
    command: Command, small_dir: Path, tmp_path: Path, words: tuple[object, ...], text: str
) -> None:
    line = ("--data", small_dir, "--device", "cpu", "--out", tmp_path / "out")
    assert_refused(command("tools/profile", "plan", *words, *line), text)


@pytest.mark.parametrize(("name", "value"), [("accumulate", 2), ("canonical", 4)])
def test_steps_of_several_parts_are_refused(tmp_path: Path, name: str, value: int) -> None:
    config = override(RunConfig(), {f"step.{name}": value}, "a test")
    here = Here(out=tmp_path, device="cpu", num_gpus=0, num_steps=1, repetitions=1)
    with pytest.raises(UserError, match=f"leave step.{name} "):
        make_plan(config, Asked(gpu="none"), here)


def test_a_damaged_fit_is_one_line(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "link.json"
    link = {"source": "", "backend": "gloo", "alpha_us": 1.0, "beta_gbps": -1.0}
    for text, why in (("{", "is no fit of a link"), (json.dumps(link), "beta_gbps not above it")):
        file.write_text(text)
        done = command("tools/profile", "plan", *GPU, "--fit", file, "--out", tmp_path / "out")
        assert_refused(done, str(file), why, "make it by torchrun ... -m tools.measure.link")


@pytest.mark.slow
@pytest.mark.long
def test_this_machine_is_measured(command: Command, small_dir: Path, tmp_path: Path) -> None:
    words = ("--batches", "32", "--precisions", "fp32", "--ranks", "1,2", "--device", "cpu")
    fewer = ("--steps", 2, "--repetitions", 1, "--data", small_dir, "--out", tmp_path)
    done = command("tools/profile", "plan", *words, *fewer)
    assert done.returncode == 0, done.stderr
    plan: Plan = read_plan(tmp_path / "plan.json")
    link = plan.model.link
    assert link and link.source == "measured, up to 2 ranks on one machine"
    assert plan.model.timings.batches == [32] and plan.model.timings.num_threads == 1
    assert [each.num_ranks for each in plan.model.timings.slowdowns] == [2]
    bases = {each.num_ranks: each.basis for each in plan.predictions}
    assert bases == {1: "measured", 2: MODEL}
    assert {point.kind for point in link.points} == {
        "all-reduce", "all-gather", "reduce-scatter",
    }  # fmt: skip
    assert len(link.missed()) == len(link.points) > 3
    assert "| all-reduce | 2 | 4,096 |" in done.stdout and "2 at once" in done.stdout
