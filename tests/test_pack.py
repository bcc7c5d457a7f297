"""CSV -> records: right on good input, and nothing published on bad."""

import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.pack import PackOptions, pack
from engine.data.records import Records, open_records
from engine.durable import locked
from engine.errors import UserError
from engine.host import ROOT
from tests.conftest import CLASSES, NUM_FONTS, Command, assert_refused


def test_pixels_labels_and_fonts_arrive_unchanged(small_csv: Path, tmp_path: Path) -> None:
    pack(small_csv, tmp_path / "out", PackOptions(split="none"))
    records = open_records(tmp_path / "out")
    with open(small_csv, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    train = records.split("train")
    assert list(records.splits) == ["train"]
    assert [records.fonts[i] for i in train.font_N] == [row[0] for row in rows]
    assert [records.classes[i] for i in train.label_N] == [row[1] for row in rows]
    wanted = np.array([[float(v) for v in row[2:]] for row in rows]).reshape(-1, 28, 28)
    assert np.array_equal(train.image_NHW, wanted)
    assert records.pixel_mean == pytest.approx(
        wanted.mean()
    ) and records.pixel_std == pytest.approx(wanted.std())
    assert records.classes == tuple(sorted(CLASSES))


def test_every_container_and_spelling_gives_the_same_records(
    small_csv: Path, tmp_path: Path
) -> None:
    text = small_csv.read_bytes()
    variants = {
        "gz": gzip.compress(text),
        "int": text.replace(b".0,", b",").replace(b".0\n", b"\n"),
        "zeros": text.replace(b".0,", b".000,"),
        "crlf": text.replace(b"\n", b"\r\n"),
        "bom": b"\xef\xbb\xbf" + text,
        "no_end": text[:-1],
    }
    with zipfile.ZipFile(tmp_path / "kaggle.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("94_character_TMNIST.csv", text)
    variants["zip"] = (tmp_path / "kaggle.zip").read_bytes()
    fingerprints = {pack(small_csv, tmp_path / "plain").manifest["fingerprint"]}
    for name, data in variants.items():
        (tmp_path / name).write_bytes(data)
        fingerprints.add(pack(tmp_path / name, tmp_path / f"{name}_out").manifest["fingerprint"])
    assert len(fingerprints) == 1
    files = [
        {f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in ("plain", "zip_out")
    ]
    assert files[0] == files[1]


def test_an_existing_target_is_kept_unless_forced(small_csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = pack(small_csv, out, PackOptions(seed=1)).manifest["fingerprint"]
    with pytest.raises(UserError, match="give --force"):
        pack(small_csv, out, PackOptions(seed=2))
    assert open_records(out).fingerprint == before
    assert (
        pack(small_csv, out, PackOptions(seed=2, force=True)).manifest["fingerprint"]
        == open_records(out).fingerprint
        != before
    )
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="no record directory"):
        pack(small_csv, tmp_path / "precious", PackOptions(force=True))
    assert (tmp_path / "precious" / "thesis.txt").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "precious"}


@pytest.mark.parametrize("first", [0, 1])
def test_the_mnist_layout_packs_and_trains_unchanged(
    first: int, small_csv: Path, small: Records, tmp_path: Path, command: Command
) -> None:
    lines = small_csv.read_text().splitlines()
    header = ",".join(["label", *(f"pixel{number}" for number in range(first, first + 784))])
    rows = [
        ",".join(row.split(",")[-785:])
        for row in lines[1:]
        if not row.split(",")[1].startswith('"')
    ]
    (tmp_path / "mnist.csv").write_text("\n".join([header, *rows]))
    manifest = pack(tmp_path / "mnist.csv", tmp_path / "out").manifest
    assert (
        manifest["classes"] == sorted(c for c in CLASSES if c not in ',"')
        and manifest["height"] == 28
    )
    assert open_records(tmp_path / "out").fonts == ("",)
    with pytest.raises(UserError, match="1 typeface families, want at least 3; use --split random"):
        pack(tmp_path / "mnist.csv", tmp_path / "by_font", PackOptions(split="font"))
    if first:
        flags = (
            "--data",
            tmp_path / "out",
            "--epochs=1",
            "--batch-size=32",
            "--device=cpu",
            "--out",
            tmp_path / "run",
        )
        done = command("python", "-m", "engine.run", *flags)
        assert done.returncode == 0, done.stderr
        assert len(json.loads((tmp_path / "run" / "report.json").read_text())["config"]) > 3


def test_a_second_packer_is_refused_with_the_first_ones_pid(
    small_csv: Path, tmp_path: Path
) -> None:
    with (
        locked(tmp_path / "out"),
        pytest.raises(UserError, match=f"process {os.getpid()} is writing it; wait"),
    ):
        pack(small_csv, tmp_path / "out")
    pack(small_csv, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_too_little_space_is_refused_before_the_first_byte(
    small_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * NUM_FONTS * len(CLASSES) * 784
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, int(0.9 * needed))
    )
    with pytest.raises(UserError, match="bytes free, want 5"):
        pack(small_csv, tmp_path / "out")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, int(1.1 * needed))
    )
    pack(small_csv, tmp_path / "out")


def test_leftovers_of_killed_runs_go_and_others_stay(small_csv: Path, tmp_path: Path) -> None:
    for name in (
        ".out.tmp-abcd1234",
        ".out.tmp-x.tmp-abcd1234",
        ".outer.tmp-abcd1234",
        ".out.tmp-abcd12345",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.lock").write_text("99999")
    pack(small_csv, tmp_path / "out")
    assert set(os.listdir(tmp_path)) == {
        "out",
        ".out.tmp-x.tmp-abcd1234",
        ".outer.tmp-abcd1234",
        ".out.tmp-abcd12345",
    }


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_packer_cleans_up(
    number: int, code: int, small_csv: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tools.pack_tmnist", "-", tmp_path / "out"]

    def heed() -> None:  # a shell's background job ignores SIGINT, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed
    ) as child:
        assert child.stdin and child.stderr
        child.stdin.write(small_csv.read_bytes())
        child.stdin.flush()
        while not (tmp_path / ".out.lock").exists():
            assert child.poll() is None
        child.send_signal(number)
        assert child.wait(20) == code
        assert b"Traceback" not in child.stderr.read()
    assert not os.listdir(tmp_path)


def test_the_command_by_path_and_as_a_module(
    small_csv: Path, tmp_path: Path, command: Command
) -> None:
    by_path = command("tools/pack_tmnist", small_csv, tmp_path / "a")
    assert by_path.returncode == 0, by_path.stderr
    assert (
        f"{NUM_FONTS * len(CLASSES)} rows read" in by_path.stdout
        and "fingerprint" in by_path.stdout
    )
    assert "note:" not in by_path.stdout
    module = command(
        "python", "-m", "tools.pack_tmnist", small_csv, tmp_path / "b", "--split=none", "--balance"
    )
    assert module.returncode == 0 and "train" in module.stdout and "val" not in module.stdout
    assert_refused(
        command("tools/pack_tmnist", "nowhere.csv", tmp_path / "c"), "nowhere.csv", "cannot be read"
    )
    assert_refused(command("tools/pack_tmnist", "/dev/zero", tmp_path / "c"), "not a regular file")
    assert_refused(command("tools/pack_tmnist", small_csv, tmp_path / "a"), "--force")


def test_verify_and_describe(
    small_dir: Path, small: Records, tmp_path: Path, command: Command
) -> None:
    whole = command(
        "tools/pack_tmnist", "--verify", small_dir, "--fingerprint", small.fingerprint[:8].upper()
    )
    assert whole.returncode == 0 and small.fingerprint in whole.stdout
    assert_refused(
        command("tools/pack_tmnist", "--verify", small_dir, "--fingerprint=00"),
        "these are other records",
    )
    copy = tmp_path / "copy.v2"
    shutil.copytree(small_dir, copy)
    described = command("tools/pack_tmnist", "--describe", copy)
    assert described.returncode == 0, described.stderr
    for text in (
        f"{NUM_FONTS * len(CLASSES)} images of 28 x 28 pixels, {len(CLASSES)} classes",
        f"fingerprint {small.fingerprint}",
        "40 of 1 families",
        "images that occur more than once: 0",
        "class     train      val     test\n",
        "all         224       48       48\n",
    ):
        assert text in described.stdout
    with Image.open(tmp_path / "copy.v2.png") as sheet:
        assert sheet.size == (16 * 60, 12 * 78) and len(sheet.getcolors(10**6)) > 100
    data = (copy / "val-00000.arrow").read_bytes()
    (copy / "val-00000.arrow").write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    for action in ("--verify", "--describe"):
        assert_refused(
            command("tools/pack_tmnist", action, copy),
            "val-00000.arrow: the block at byte 0 has CRC32",
        )
    assert_refused(
        command("tools/pack_tmnist", "--verify", copy, tmp_path / "x"), "--verify takes one path"
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--fingerprint=7b",), "--fingerprint: goes with --verify only"),
        (("--sheet=x.png", "--verify"), "--sheet: goes with --describe only"),
        (("--check", "--fingerprint=7b"), "--fingerprint: goes with --verify only"),
        (("--check", "--verify"), "--check: does not go with --verify; give one of them"),
        (("--verify", "--seed=3"), "--seed: is of packing, and --verify packs nothing"),
        (("--describe", "--no-header"), "--no-header: is of packing, and --describe packs nothing"),
    ],
)
def test_options_without_a_use_are_refused(
    words: tuple[str, ...], text: str, small_dir: Path, command: Command, tmp_path: Path
) -> None:
    assert_refused(command("tools/pack_tmnist", *words, small_dir, tmp_path / "out"), text)
    assert not (tmp_path / "out").exists()
