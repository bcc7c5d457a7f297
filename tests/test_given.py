"""Several sources of one layout in one pack, and the layout that their bytes say."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from engine.data.layouts import layout_of
from engine.data.pack import PackOptions, check, pack
from engine.errors import UserError
from engine.host import ROOT
from tests.conftest import Command
from tests.glyph_files import content, glyphs


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
