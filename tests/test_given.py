"""Several sources of one layout in one pack, splits that they give, and what their bytes say."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.layouts import layout_of
from engine.data.pack import PackOptions, check, pack
from engine.data.records import _fingerprint, open_records
from engine.durable import write_manifest
from engine.errors import UserError
from engine.host import ROOT
from tests.conftest import Command, assert_refused
from tests.glyph_files import Glyphs, content, glyphs


def test_bytes_say_the_layout_and_names_do_not(tmp_path: Path) -> None:
    from pyarrow import feather, parquet

    drawn = glyphs()
    feather.write_feather(drawn.table(), tmp_path / "arrow.csv")
    parquet.write_table(drawn.table(), tmp_path / "parquet.npz")
    found = {
        "csv": [drawn.csv(tmp_path / "csv.png")],
        "idx": [*drawn.idx(tmp_path), *drawn.idx(tmp_path, "packed", packed=True)],
        "npz": [drawn.npz(tmp_path / "npz.npz"), drawn.npz(tmp_path / "more.npz", packed=True)],
        "png": [drawn.png(tmp_path / "tree.csv")],
        "arrow": [tmp_path / "arrow.csv"],
        "parquet": [tmp_path / "parquet.npz"],
    }
    for layout, paths in found.items():
        assert layout_of(paths) == layout
    assert layout_of([tmp_path / "gone"]) == layout_of([Path("-")]) == "csv"
    (tmp_path / "a.gz").write_bytes(gzip.compress((tmp_path / "parquet.npz").read_bytes()))
    with pytest.raises(UserError, match="is a gzip of a Parquet file"):
        check(tmp_path / "a.gz")


def test_several_csvs_are_one_pack(tmp_path: Path) -> None:
    lines = glyphs().csv(tmp_path / "all.csv").read_text().splitlines(keepends=True)
    pack(tmp_path / "all.csv", tmp_path / "wanted")
    (tmp_path / "a.csv").write_text("".join(lines[:20]))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress("".join([lines[0], *lines[20:]]).encode()))
    parts: list[float] = []
    sources = [tmp_path / "a.csv", tmp_path / "b.csv.gz"]
    pack(sources, tmp_path / "out", progress=lambda rows, part: parts.append(part))
    assert content(tmp_path / "out") == content(tmp_path / "wanted")
    assert parts == sorted(parts) and parts[-1] == 1.0
    pack(sources[::-1], tmp_path / "other", PackOptions(workers=1))
    assert content(tmp_path / "other") != content(tmp_path / "wanted")


def test_a_fault_is_named_in_its_own_file(tmp_path: Path) -> None:
    head = "label,pixel0,pixel1,pixel2,pixel3\n"
    texts = {"a": head + "a,0,0,0,0\n", "b": head + "a,0,0,0,0\nb,0,0,0,256\n", "c": head}
    texts |= {"d": head.replace("pixel", "x"), "e": "label,pixel0\na,0\n", "f": "\x89PNG"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    for name, wanted in {
        "b": r"/b:3 \(row 2, column 5 'pixel3'\): got '256'",
        "c": "/c: has no data rows",
        "d": "/d:1: got the header",
        "e": "/e:1: has another header than .*/a; pack files of one header",
        "f": "/f: is a PNG picture",
        "gone": "/gone: cannot be read",
    }.items():
        with pytest.raises(UserError, match=wanted):
            pack([tmp_path / "a", tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    num_rows, faults, _ = check([tmp_path / "b", tmp_path / "b"])
    assert (
        num_rows == 4 and [fault.partition("/b:")[2][:9] for fault in faults] == ["3 (row 2,"] * 2
    )


def test_a_hundred_faults_of_all_files_are_listed(tmp_path: Path) -> None:
    head = "label,pixel0,pixel1,pixel2,pixel3\n"
    for num in (60, 100, 150):
        (tmp_path / f"{num}").write_text(head + "a,0,0,0,256\n" * num)
    for first, second in ((150, 150), (60, 60), (100, 60)):
        num_rows, faults, notes = check([tmp_path / str(first), tmp_path / str(second)])
        assert (num_rows, len(faults)) == (100, 100)
        assert notes == ["only the first 100 faults are listed"]


def test_a_label_that_looks_like_one_of_another_file_says_of_which(tmp_path: Path) -> None:
    for name, label in (("a", "\u00e9"), ("b", "e\u0301")):
        text = f"label,pixel0,pixel1,pixel2,pixel3\n{label},0,0,0,0\n"
        (tmp_path / name).write_text(text)
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(UserError, match=f"looks like the label of row 1 of {paths[0]} but has"):
        pack(paths, tmp_path / "out")


def test_the_command_takes_sources_then_out(tmp_path: Path, command: Command) -> None:
    a, b = (glyphs(seed=seed).csv(tmp_path / f"{seed}.csv") for seed in (1, 2))
    done = command("tools/pack_tmnist", a, b, tmp_path / "out", "--layout", "csv")
    assert done.returncode == 0, done.stderr
    said = "read as CSV, columns label and pixel0..pixel63, images of 8 x 8: "
    assert done.stdout.splitlines()[:3] == [f"{said}{a}", f"{said}{b}", "120 rows read"]
    checked = command("tools/pack_tmnist", "--check", a, b).stdout
    assert checked == f"{a}, {b}: 120 rows, 0 faults\n"


Sources = list[Path]


def in_layout(drawn: Glyphs, layout: str, folder: Path) -> Sources:
    """The same images in a layout, class by class."""
    folder.mkdir()
    drawn = drawn.by_class()
    if layout == "csv":
        return [drawn.csv(folder / "a.csv")]
    if layout == "idx":
        return list(drawn.idx(folder))
    if layout == "npz":
        return [drawn.npz(folder / "a.npz")]
    if layout == "png":
        return [drawn.png(folder / "tree")]
    from pyarrow import feather, parquet

    write = feather.write_feather if layout == "arrow" else parquet.write_table
    write(drawn.table(), folder / "a")
    return [folder / "a"]


@pytest.mark.parametrize("layout", ["csv", "idx", "npz", "png", "parquet", "arrow"])
def test_splits_that_are_given_stay_as_they_are(layout: str, tmp_path: Path) -> None:
    """Every row of test is in test, in its order; val comes out of train; of any layout alike."""
    train, test = glyphs(60), glyphs(30, seed=1)
    given = {
        "test": in_layout(test, layout, tmp_path / "test"),
        "train": in_layout(train, layout, tmp_path / "train"),
    }
    report = pack(given, tmp_path / "out")
    manifest = report.manifest
    assert report.warnings == []
    records = open_records(tmp_path / "out")
    assert records.given == ("train", "test") == tuple(manifest["given_splits"])
    assert np.array_equal(records.split("test").image_NHW, test.by_class().image_NHW)
    assert {name: len(split) for name, split in records.splits.items()} == {
        "train": 51, "val": 9, "test": 30
    }  # fmt: skip
    drawn = np.concatenate([records.split(name).image_NHW for name in ("train", "val")])
    assert sorted(map(bytes, drawn)) == sorted(map(bytes, train.image_NHW))
    csvs = {name: in_layout(drawn, "csv", tmp_path / f"{name} csv")
            for name, drawn in {"train": train, "test": test}.items()}  # fmt: skip
    pack(csvs, tmp_path / "wanted")
    assert content(tmp_path / "out") == content(tmp_path / "wanted")


def test_the_fingerprint_says_that_splits_were_given(tmp_path: Path) -> None:
    """The same rows in the same splits, once drawn and once given."""
    whole = glyphs(60).by_class()
    pack(whole.csv(tmp_path / "all.csv"), tmp_path / "drawn")
    drawn = open_records(tmp_path / "drawn")
    given = {}
    for name, split in drawn.splits.items():
        part = Glyphs(split.image_NHW, split.label_N)
        given[name] = [part.csv(tmp_path / f"{name}.csv")]
    pack(given, tmp_path / "given")
    records = open_records(tmp_path / "given")
    for name, split in drawn.splits.items():
        assert np.array_equal(records.split(name).image_NHW, split.image_NHW)
    assert records.given == ("train", "val", "test") and drawn.given == ()
    assert records.fingerprint != drawn.fingerprint
    for change in (["train"], ["test"], ["train", "other"], "train", None):
        forged = json.loads((tmp_path / "given" / "manifest.json").read_bytes())
        forged |= {"given_splits": change}
        write_manifest(tmp_path / "given", forged | {"fingerprint": _fingerprint(forged)})
        with pytest.raises(UserError, match="the given splits are"):
            open_records(tmp_path / "given")


def test_what_does_not_fit_the_training_split_is_refused(tmp_path: Path) -> None:
    train = glyphs(60)
    known, strange = train.csv(tmp_path / "a.csv"), tmp_path / "b.csv"
    Glyphs(train.image_NHW[:6], train.label_N[:6] + 1).csv(strange)
    small = glyphs(30, side=4).npz(tmp_path / "small.npz")
    header = tmp_path / "c.csv"
    header.write_text(known.read_text().replace("pixel", "x", 1))
    one = tmp_path / "one.csv"
    one.write_text("".join(known.read_text().splitlines(keepends=True)[:3]))
    for given, wanted in (
        ({"train": [known], "test": [strange]}, "b.csv:4: has the class '3', which no row of"),
        ({"train": [known], "val": [strange]}, "leave such rows out of val, or give train some"),
        ({"train": [train.npz(tmp_path / "a.npz")], "test": [small]}, "small.npz: holds images of "
            "4 x 4 pixels, but .*a.npz of 8 x 8"),
        ({"train": [known], "test": [header]}, "c.csv:1: "),
        ({"train": [known], "test": [small]}, "has the layout npz, but .*a.csv csv"),
        ({"train": [one], "test": [one]}, "has 1 rows, want at least 2 to split; use --split none"),
        ({"test": [known]}, "--train: is missing"),
        ({"train": [known]}, "--train: is given alone"),
        ({"train": train.idx(tmp_path)[:1], "test": train.idx(tmp_path)[:1]}, "give pairs"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=wanted):
            pack(given, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    num_rows, faults, _ = check({"train": [known], "test": [strange]})
    assert num_rows == 66 and len(faults) == 1 and "which no row of train has" in faults[0]


def test_options_say_how_val_is_drawn_and_leave_test_alone(tmp_path: Path) -> None:
    uneven = Glyphs(glyphs(60).image_NHW, np.repeat(np.arange(3, dtype=np.uint8), [40, 10, 10]))
    given = {"train": [uneven.csv(tmp_path / "a.csv")], "test": [uneven.csv(tmp_path / "b.csv")]}

    def counts(out: str, **options: Any) -> dict[str, list[int]]:
        report = pack(given, tmp_path / out, PackOptions(**options))
        assert report.warnings[-1] == "60 images of test are in train, too"
        manifest = report.manifest
        return {name: split["rows_per_class"] for name, split in manifest["splits"].items()}

    test = [40, 10, 10]
    assert counts("1") == {"train": [34, 8, 8], "val": [6, 2, 2], "test": test}
    assert counts("2", balance=True) == {"train": [8] * 3, "val": [2] * 3, "test": test}
    assert counts("3", split="none") == {"train": test, "test": test}
    seeds = [open_records(tmp_path / "1").split("val").image_NHW]
    counts("4", seed=1)
    seeds.append(open_records(tmp_path / "4").split("val").image_NHW)
    assert not np.array_equal(*seeds)


def test_the_command_takes_splits_that_are_given(tmp_path: Path, command: Command) -> None:
    a, b = glyphs(60).idx(tmp_path, "a"), glyphs(30, seed=1).idx(tmp_path, "b")
    words = ["--train", a[0], "--train", a[1], "--test", b[0], "--test", b[1]]
    done = command("tools/pack_tmnist", *words, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "\nsplits as given: train, test; val drawn from train\n" in done.stdout
    described = command("tools/pack_tmnist", "--describe", tmp_path / "out").stdout
    assert "\nsplits as given: train, test; val drawn from train\n" in described
    assert command("tools/pack_tmnist", "--check", *words).stdout.endswith(": 90 rows, 0 faults\n")
    for bad, wanted in (
        ([*words, a[0], tmp_path / "o"], "give OUT alone, not"),
        (words, "give OUT alone, not nothing"),
        (["--check", *words, a[0]], "give no SOURCE, not"),
        (["--verify", *words, tmp_path / "out"], "--verify: takes a record directory"),
        (["--test", b[0], tmp_path / "o"], "--train: is missing"),
        ([], "there is no source; name one"),
    ):
        assert_refused(command("tools/pack_tmnist", *bad), wanted)
    assert not (tmp_path / "o").exists()


PEAK = """
import re, sys
from pathlib import Path
from engine.data.pack import check
check([Path(path) for path in sys.argv[1:]])
print(re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parquet", "arrow"])
def test_what_pyarrow_reads_does_not_pile_up(layout: str, tmp_path: Path) -> None:
    from pyarrow import feather, parquet

    def peak_mib(num: int) -> float:
        drawn = glyphs(num, side=28)
        path = tmp_path / f"{num}"
        if layout == "parquet":
            parquet.write_table(drawn.table(), path, use_dictionary=["label"])
        else:
            feather.write_feather(drawn.table(), path, chunksize=1000)
        line = [sys.executable, "-c", PEAK, path]
        done = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True)
        return int(done.stdout) / 2**10

    few, many = 60_000, 200_000  # the first is enough to fill every buffer
    peak_mib(few)  # compiles the sums
    grown_mib = peak_mib(many) - peak_mib(few)
    assert grown_mib < 0.35 * (many - few) * 784 / 2**20
