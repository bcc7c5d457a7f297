"""tools/evaluate: figures of answers made by hand, and of a real run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import DataConfig, RunConfig
from engine.data.pack import PackOptions, pack
from engine.data.records import open_records
from engine.errors import UserError
from engine.host import ROOT
from engine.report import read_report
from engine.train.answers import all_logits, shifted
from engine.train.trainer import fit
from engine.world import World
from tests.conftest import Command, assert_refused
from tests.profiles import make_profile
from tools.measure.evaluation import averaged, best_members, pool, read_evaluation
from tools.measure.merges import ALL, MEASURED, confused_pairs, group_names, merged, named_merges
from tools.measure.scores import (
    Answers,
    best_temperature,
    calibration_error,
    class_scores,
    scores_of,
)


def certain(probability_NK: list[list[float]], label_N: list[int]) -> Answers:
    """Answers of these probabilities."""
    return Answers(torch.tensor(probability_NK).log(), np.array(label_N))


def test_a_known_distribution_has_its_calibration_error() -> None:
    """Confidence 0.8 right 6 of 10, 0.6 right 9 of 10: gaps of 0.2 and 0.3 over ten samples each.

    The gaps are of opposite signs: over all samples confidence and accuracy differ by 0.05.
    """
    sure = certain([[0.8, 0.2]] * 10 + [[0.6, 0.4]] * 10, [0] * 6 + [1] * 4 + [0] * 9 + [1])
    assert calibration_error(sure) == pytest.approx(0.25)
    calibrated = certain([[0.8, 0.2]] * 10, [0] * 8 + [1] * 2)
    assert calibration_error(calibrated) == pytest.approx(0, abs=1e-6)


def test_the_temperature_brings_logits_back() -> None:
    """Of two classes right 4 times of 5 the best logit is log 4, so one of 3 is to be cooled down:
    3 / T = log 4. Answers that are never wrong want the lowest temperature there is."""
    right = Answers(torch.tensor([[3.0, 0.0]] * 5), np.array([0, 0, 0, 0, 1]))
    assert best_temperature(right) == pytest.approx(3 / np.log(4))
    assert calibration_error(right.scaled(3 / np.log(4))) == pytest.approx(0, abs=1e-9)
    never_wrong = Answers(torch.tensor([[3.0, 0.0]] * 5), np.zeros(5, int))
    assert best_temperature(never_wrong) == pytest.approx(0.05)


def test_merges_join_classes_and_what_they_share() -> None:
    assert merged(5, [(0, 1), (3, 1)]).tolist() in ([0, 0, 1, 0, 2], [1, 1, 0, 1, 2])
    found = named_merges(["0", "1", "C", "I", "O", "c", "i", "l", "o", "x"])
    names = {name: group_names("01CIOcilox", group_K) for name, (group_K, _) in found.items()}
    assert names["EMNIST ByMerge"] == [["C", "c"], ["I", "i"], ["O", "o"]]
    assert names["case pairs of print"] == [["C", "c"], ["O", "o"]]
    assert names["one"] == [["1", "I", "l"]] and names["zero"] == [["0", "O", "o"]]
    assert sorted(map(sorted, names[ALL])) == [["0", "O", "o"], ["1", "I", "i", "l"], ["C", "c"]]
    assert "bars" not in names and named_merges(["7", "é"]) == {}
    letters = [chr(code) for code in (*range(48, 58), *range(65, 91), *range(97, 123))]
    assert named_merges(letters)["EMNIST ByMerge"][0].max() + 1 == 47, "as EMNIST's paper says"


def test_a_merge_counts_what_stays_within_its_groups() -> None:
    """Of C c 7: one C read as c, one as 7; on val c is read as 7 in one of four of both."""
    classes = ("7", "C", "c")
    answers = certain(np.eye(3)[[0, 1, 2, 0]].tolist(), [0, 1, 1, 1])
    val = certain(np.eye(3)[[0, 0, 0, 0, 1]].tolist(), [0, 0, 0, 2, 1])
    scores = scores_of(answers, classes, val, 0.2)
    right = {merge.name: merge.num_right for merge in scores.merges}
    assert scores.num_right == 2 and right["EMNIST ByMerge"] == 3 and right[MEASURED] == 2
    measured = next(merge for merge in scores.merges if merge.name == MEASURED)
    assert measured.groups == [["7", "c"]] and measured.num_classes == 2
    assert confused_pairs(val.label_N.numpy(), val.answer_N.numpy(), 3, 0.25) == [], "not more"
    without = scores_of(answers, classes, None, 0.2)
    assert MEASURED not in {merge.name for merge in without.merges}
    assert without.calibration.temperature is None and without.calibration.scaled_loss is None


def test_top_two_loss_and_classes() -> None:
    answers = certain([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.7, 0.2]],
                      [0, 1, 2, 0])  # fmt: skip
    scores = scores_of(answers, ("a", "b", "d"), None, 0.1)
    assert scores.accuracy_fraction == 0.25 and scores.top2_accuracy_fraction == 0.5
    wanted = -np.log([0.5, 0.3, 0.2, 0.1]).mean()
    assert scores.loss == pytest.approx(wanted, rel=1e-6)
    found = [(each.true, each.read, each.num_samples) for each in scores.confusions]
    assert found == [("a", "b", 1), ("b", "a", 1), ("d", "a", 1)]
    assert [each.share_fraction for each in scores.confusions] == [0.5, 1.0, 1.0]
    table = {each.name: each for each in scores.classes}
    assert (table["a"].num_samples, table["a"].num_right) == (2, 1)
    assert (table["a"].mistaken_for, table["a"].num_mistaken) == ("b", 1)
    alone = class_scores(np.array([1]), np.array([1]), ("a", "b"))
    assert [(each.name, each.mistaken_for) for each in alone] == [("b", None)]


def test_an_ensemble_averages_probabilities_and_the_best_is_chosen() -> None:
    """Two of three are wrong at one sample each and together at none; the third helps nobody."""
    first = certain([[0.9, 0.1], [0.6, 0.4]], [0, 1])
    second = certain([[0.4, 0.6], [0.1, 0.9]], [0, 1])
    bad = certain([[0.01, 0.99], [0.99, 0.01]], [0, 1])
    both = averaged([first, second])
    assert both.logits_NK.exp().flatten().tolist() == pytest.approx([0.65, 0.35, 0.35, 0.65])
    assert both.num_right == 2 and averaged([first, second, bad]).num_right == 0
    assert sorted(best_members([bad, first, second])) == [1, 2]
    assert best_members([second, second]) == [0], "the same again adds nothing"


def test_pooled_is_right_answers_over_samples() -> None:
    small = scores_of(certain([[0.9, 0.1]] * 2, [0, 0]), ("a", "b"), None, 0.1)
    large = scores_of(certain([[0.9, 0.1]] * 6, [0] * 3 + [1] * 3), ("a", "b"), None, 0.1)
    top1 = next(each for each in pool([small, large]) if each.name == "top-1")
    assert top1.value == 5 / 8 and (top1.low, top1.high) == (0.5, 1)
    assert top1.deviation == pytest.approx(0.5**0.5 / 2) and top1.num_samples == 8
    assert pool([small]) == []


def test_shifts_move_by_a_pixel_and_are_averaged() -> None:
    image_BHW = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 3, 3)
    assert shifted(image_BHW, 1, 0)[0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert shifted(image_BHW, -1, 0)[0].tolist() == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]
    assert shifted(image_BHW, 0, -1)[0].tolist() == [[2, 3, 0], [5, 6, 0], [8, 9, 0]]
    first = all_logits(
        lambda image: image[:, :1, 0].float(), image_BHW.numpy(), torch.device("cpu"), shifts=True
    )
    assert first.tolist() == [[pytest.approx((1 + 4 + 0 + 2 + 0) / 5)]]


@pytest.fixture(scope="module")
def runs(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of other seeds on the small records."""
    folder = tmp_path_factory.mktemp("evaluate")
    world = World(rank=0, size=1, device=torch.device("cpu"), stream=None)
    found = []
    for seed in (0, 1):
        data = DataConfig(path=str(small_dir))
        config = RunConfig(global_batch=16, epochs=2, data=data, seed=seed)
        out = folder / f"run{seed}"
        out.mkdir()
        fit(config, open_records(small_dir), world, out, resume=False, say=lambda line: None)
        found.append(out)
    return found


def test_runs_are_evaluated_pooled_and_together(
    runs: list[Path], command: Command, tmp_path: Path
) -> None:
    done = command("tools/evaluate", *runs, "--ensemble", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = read_evaluation(tmp_path / "out")
    assert [run.name for run in found.runs] == ["run0", "run1"]
    for run, folder in zip(found.runs, runs, strict=True):
        assert run.scores.accuracy_fraction == read_report(folder).test_accuracy_fraction
        assert run.scores.loss == pytest.approx(read_report(folder).test_loss, rel=1e-4)
        assert sum(each.num_samples for each in run.scores.classes) == run.scores.num_samples
    assert found.ensemble and found.ensemble.runs == ["run0", "run1"] and found.best_ensemble
    assert {"top-1", "loss"} <= {each.name for each in found.pooled}
    for text in ("ensemble", "pooled", "deviation", "temperature, by val", "most read as"):
        assert text in done.stdout
    assert (tmp_path / "out" / "evaluation.txt").read_text(encoding="utf-8") in done.stdout
    shifted_too = command("tools/evaluate", runs[0], "--shifts", "--split", "val")
    assert (
        "its four one-pixel shifts" in shifted_too.stdout and "fitted on val" in shifted_too.stdout
    )


def test_a_profiles_report_shows_the_distance_to_the_best_ensemble(
    runs: list[Path], small_dir: Path, command: Command, tmp_path: Path
) -> None:
    profile = make_profile(num=4)
    cell = profile["cells"][1]
    for repetition in cell["repetitions"]:
        repetition["test_accuracy_fraction"] = 0.25
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    facts = ("--data-facts", "--data", small_dir, "--max-train", 20)
    for arguments in ((*runs, "--ensemble"), facts):
        done = command("tools/evaluate", *arguments, "--out", tmp_path)
        assert done.returncode == 0, done.stderr
    assert command("tools/profile", "report", tmp_path).returncode == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    section = text.partition("## The ceiling")[2].partition("\n## ")[0]
    ensemble = read_evaluation(tmp_path).ensemble
    assert ensemble and ensemble.scores.accuracy_fraction == 1.0
    assert f"| {cell['name']} | 25.00 % | 75 |" in section
    assert "| ensemble, 2 runs | 100.00 % | 0 |" in section
    assert "| the nearest training image | " in section
    assert "can be right on more than 100.00%" in section
    facts_file = tmp_path / "data_facts.json"
    other = json.loads(facts_file.read_text()) | {"dataset_fingerprint": "0" * 64}
    facts_file.write_text(json.dumps(other))
    assert_refused(command("tools/profile", "report", tmp_path), "of other records")


def test_what_cannot_be_evaluated_is_refused(
    runs: list[Path], small_csv: Path, command: Command, tmp_path: Path
) -> None:
    assert_refused(command("tools/evaluate"), "no run is named")
    assert_refused(command("tools/evaluate", runs[0], "--data-facts"), "name them with --data")
    assert_refused(command("tools/evaluate", runs[0], "--max-train", 5), "--data-facts only")
    of_runs = "--shifts: is of runs, and --data-facts is about images alone"
    assert_refused(command("tools/evaluate", "--data-facts", "--shifts"), of_runs)
    twice = (runs[0], runs[0].parent / "." / runs[0].name)
    assert_refused(command("tools/evaluate", *twice), "is named twice; name each run once")
    assert_refused(command("tools/evaluate", runs[0], "--ensemble"), "name another one")
    other = tmp_path / "other"
    pack(small_csv, other, PackOptions(split="none"))
    assert_refused(command("tools/evaluate", runs[0], "--data", other), "has no split test, but tr")
    for text in ("{}", "[", json.dumps({"format": 2})):
        (tmp_path / "evaluation.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"is no evaluation .* make it with"):
            read_evaluation(tmp_path)


def test_an_ensemble_is_of_the_same_records(
    runs: list[Path], small_csv: Path, world: World, command: Command, tmp_path: Path
) -> None:
    """Runs on another draw of the split are pooled, and refused as an ensemble."""
    records = tmp_path / "other"
    pack(small_csv, records, PackOptions(seed=1))
    config = RunConfig(global_batch=16, epochs=1, data=DataConfig(path=str(records)))
    (tmp_path / "run2").mkdir()
    fit(replace(config, seed=2), open_records(records), world, tmp_path / "run2", resume=False,
        say=lambda line: None)  # fmt: skip
    both = (runs[0], tmp_path / "run2")
    assert_refused(command("tools/evaluate", *both, "--ensemble"), "leave out --ensemble to pool")
    done = command("tools/evaluate", *both)
    assert done.returncode == 0 and "pooled" in done.stdout
    done = command("tools/evaluate", *both, "--ensemble", "--data", records)
    assert done.returncode == 0 and "best ensemble found" in done.stdout
    assert "other records than those trained on" in done.stdout


def test_help_and_wrong_options_do_not_wait_for_torch() -> None:
    code = "import sys; from tools import evaluate, export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
