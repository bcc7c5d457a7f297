"""Folders of PNGs become the records that a CSV of the same rows becomes, or are refused."""

import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.data import images, pictures, processes
from engine.data.pack import PackOptions, check, pack
from engine.data.pictures import SIGNATURE
from engine.data.records import open_records
from engine.errors import UserError
from engine.host import ROOT
from tests.conftest import Command, assert_refused
from tests.glyph_files import content, glyphs

IMAGE_HW = glyphs().image_NHW[0]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(raw: bytes, side: int = 8, more: bytes = b"", header: tuple[int, ...] = ()) -> bytes:
    """A PNG of the scanlines `raw`, with `more` chunks before them."""
    fields = struct.pack(">IIBBBBB", side, side, *(header or (8, 0, 0, 0, 0)))
    packed = zlib.compress(raw)
    parts = (chunk(b"IDAT", packed[:5]), chunk(b"IDAT", packed[5:]), chunk(b"IEND", b""))
    return SIGNATURE + chunk(b"IHDR", fields) + more + b"".join(parts)


def filtered(image_HW: np.ndarray, kinds: list[int]) -> bytes:
    """Scanlines by the standard's own formulas, each with its filter."""
    raw = bytearray()
    side = len(image_HW)
    padded = np.zeros((side + 1, side + 1), int)
    padded[1:, 1:] = image_HW
    for y, kind in enumerate(kinds, start=1):
        raw.append(kind)
        for x in range(1, side + 1):
            a, b, c = padded[y, x - 1], padded[y - 1, x], padded[y - 1, x - 1]
            paeth = min((a, b, c), key=lambda value: abs(a + b - c - value))
            taken = (0, a, b, (a + b) // 2, paeth)[kind]
            raw.append((padded[y, x] - taken) % 256)
    return bytes(raw)


def saved(picture: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", **options)
    return out.getvalue()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("many", [1, 100], ids=["by processes", "by threads"])
def test_a_tree_gives_the_records_of_its_csv(
    workers: int, many: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "BLOCK_BYTES", 7 * 64)
    monkeypatch.setattr(pictures, "MANY", many)
    drawn = glyphs()
    pack(drawn.by_class().csv(tmp_path / "a.csv"), tmp_path / "wanted")
    tree = drawn.png(tmp_path / "tree")
    (tree / ".DS_Store").touch()
    (tree / "1" / "._00001.png").touch()
    report = pack(tree, tmp_path / "out", PackOptions(workers=workers))
    assert content(tmp_path / "out") == content(tmp_path / "wanted")
    assert report.found == [f"PNG, 60 images of 8 x 8 in the 3 class folders of {tree}"]


def packed(tmp_path: Path, *files: bytes) -> np.ndarray:
    """The images of a class folder that holds these files."""
    (tmp_path / "tree" / "a").mkdir(parents=True)
    for number, data in enumerate(files):
        (tmp_path / "tree" / "a" / f"{number:03}.png").write_bytes(data)
    pack(tmp_path / "tree", tmp_path / "out", PackOptions(split="none"))
    return open_records(tmp_path / "out").split("train").image_NHW


def test_every_filter_is_undone(tmp_path: Path) -> None:
    """On random scanlines, and each filter on all lines; Pillow reads the same."""
    rng = np.random.default_rng(0)
    kinds = [[kind] * 8 for kind in range(5)] + rng.integers(0, 5, (40, 8)).tolist()
    files = [png(filtered(IMAGE_HW, each)) for each in kinds]
    found = packed(tmp_path, *files)
    assert np.array_equal(found, np.broadcast_to(IMAGE_HW, found.shape))
    for data in files:
        with Image.open(io.BytesIO(data)) as picture:
            assert np.array_equal(np.asarray(picture), IMAGE_HW)


def test_fewer_bits_and_interlaced_pictures_are_read(tmp_path: Path) -> None:
    two = IMAGE_HW // 128 * 255
    rows = np.packbits(two > 0, axis=1)
    one_bit = png(b"".join(b"\0" + row.tobytes() for row in rows), header=(1, 0, 0, 0, 0))
    pairs = IMAGE_HW // 17
    nibbles = (pairs[:, ::2] << 4 | pairs[:, 1::2]).astype(np.uint8)
    four_bits = png(b"".join(b"\0" + row.tobytes() for row in nibbles), header=(4, 0, 0, 0, 0))
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
    lines = b""
    for y, x, by_y, by_x in [*passes, (1, 0, 2, 1)]:  # Adam7
        lines += b"".join(b"\0" + row.tobytes() for row in IMAGE_HW[y::by_y, x::by_x])
    interlaced = png(lines, header=(8, 0, 0, 0, 1))
    quarters = IMAGE_HW // 85
    fours = sum(quarters[:, place::4] << (6 - 2 * place) for place in range(4))
    two_bits = png(b"".join(b"\0" + row.tobytes() for row in fours), header=(2, 0, 0, 0, 0))
    found = packed(tmp_path, one_bit, two_bits, four_bits, interlaced)
    assert np.array_equal(found, [two, quarters * 85, pairs * 17, IMAGE_HW])


def test_pillow_sees_nothing_but_the_picture(tmp_path: Path) -> None:
    """A chunk on which Pillow fails, behind the pixels, is passed over as any other."""
    odd = ONE_BIT[:-12] + chunk(b"iCCP", b"n\0") + ONE_BIT[-12:]
    assert packed(tmp_path, ONE_BIT, odd).max() == 0


def test_names_of_files_need_not_be_utf8_and_order_is_that_of_bytes(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "tree" / "é")
    os.makedirs(folder)
    for number, name in enumerate([b"\xff.png", b"b.PNG", b"a.png"]):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(saved(Image.new("L", (4, 4), number)))
    pack(tmp_path / "tree", tmp_path / "out", PackOptions(split="none"))
    records = open_records(tmp_path / "out")
    assert records.split("train").image_NHW[:, 0, 0].tolist() == [2, 1, 0]
    assert records.classes == ("é",)


ONE_BIT = png(bytes(16), header=(1, 0, 0, 0, 0))


def with_second_header(side: int) -> bytes:
    """A picture of 8 x 8 that then says that it has another size."""
    fields = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return png(bytes(16), more=chunk(b"IHDR", fields), header=(1, 0, 0, 0, 0))


RAW = filtered(IMAGE_HW, [0] * 8)
GOOD = png(RAW)
HEAD, END = GOOD[:33], GOOD[-12:]
PLAIN = HEAD + chunk(b"IDAT", zlib.compress(RAW)) + END
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "x.png: is no PNG"),
    "a table": (b"label,pixel0\n", "x.png: is no PNG, want a PNG"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(20), "is a JPEG picture, want a PNG"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
    "RGB": (saved(Image.new("RGB", (8, 8))), "is RGB, want grey; convert it to 8-bit grey (mog"),
    "RGBA": (saved(Image.new("RGBA", (8, 8))), "is RGB with transparency, want grey"),
    "LA": (saved(Image.new("LA", (8, 8))), "is grey with transparency, want grey"),
    "palette": (saved(Image.new("P", (8, 8))), "is of a palette, want grey"),
    "16 bits": (saved(Image.new("I;16", (8, 8))), "has 16 bits per pixel, want 8"),
    "transparent": (saved(Image.new("L", (8, 8)), transparency=0), "has a transparent grey value"),
    "animated": (png(RAW, more=chunk(b"acTL", bytes(8))), "is animated, want one picture"),
    "size": (saved(Image.new("L", (9, 8))), "has 8 x 9 pixels, but"),
    "cut": (GOOD[:-20], "ends too early; copy or write it again"),
    "no end": (GOOD[:-12], "ends too early"),
    "bare": (SIGNATURE, "ends too early"),
    "checksum": (GOOD[:-20] + bytes([GOOD[-20] ^ 1]) + GOOD[-19:], "is damaged (a wrong checksum"),
    "unknown chunk": (png(RAW, more=chunk(b"EVIL", b"")), "a chunk b'EVIL' that PNG does not hav"),
    "a huge header": (with_second_header(20_000), "is damaged (a chunk b'IHDR' that PNG does not"),
    "a larger header": (with_second_header(16), "is damaged (a chunk b'IHDR' that PNG does not"),
    "a smaller header": (with_second_header(1), "is damaged (a chunk b'IHDR' that PNG does not"),
    "no header": (SIGNATURE + chunk(b"IEND", b""), "is damaged (it begins without a header)"),
    "odd depth": (png(RAW, header=(3, 0, 0, 0, 0)), "a header that PNG does not have"),
    "odd filter": (png(b"\x05" + RAW[1:]), "a filter that PNG does not have"),
    "few rows": (png(RAW[:-1]), "it does not hold 8 rows of 8"),
    "many rows": (png(RAW + bytes(10**6)), "it does not hold 8 rows of 8"),
    "no rows": (HEAD + END, "is damaged"),
    "no zlib": (HEAD + chunk(b"IDAT", b"xxxx") + END, "is damaged"),
    "few bits, cut": (png(b"\0", header=(1, 0, 0, 0, 0)), "is damaged"),
    "huge": (GOOD + bytes(16 * 2**20), "want at most 16,777,216; write it without"),
}  # fmt: skip


@pytest.mark.parametrize("many", [1, 100], ids=["by processes", "by threads"])
@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_refused_is_named(
    case: str, many: int, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, text = FILES[case]
    monkeypatch.setattr(pictures, "MANY", many)
    tree = glyphs().png(tmp_path / "tree")
    (tree / "2" / "x.png").write_bytes(data)
    done = command("tools/pack_tmnist", tree, tmp_path / "out")
    assert_refused(done, f"{tree}/2/x.png: ", text)
    assert os.listdir(tmp_path) == ["tree"]


def empty_class(tree: Path) -> None:
    (tree / "3").mkdir()


def rename_class(tree: Path, name: bytes) -> None:
    os.rename(os.fsencode(tree / "2"), os.path.join(os.fsencode(tree), name))


def many_classes(tree: Path) -> None:
    for number in range(3, 258):
        (tree / str(number)).mkdir()
        (tree / str(number) / "a.png").write_bytes(GOOD)


TREES: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty class": (empty_class, "tree/3: is a class folder that holds no .png"),
    "a file beside": (lambda tree: (tree / "readme.txt").touch(), "readme.txt: lies beside the cl"),
    "a picture beside": (lambda tree: (tree / "a.png").write_bytes(GOOD), "a.png: lies beside"),
    "another file": (lambda tree: (tree / "1" / "a.txt").touch(), "1/a.txt: is no .png; move it"),
    "a folder below": (lambda tree: (tree / "1" / "a").mkdir(), "1/a: is a folder in a class fold"),
    "a folder as a picture": (lambda tree: (tree / "1" / "a.png").mkdir(), "not a regular file"),
    "a pipe": (lambda tree: os.mkfifo(tree / "1" / "a.png"), "a.png: is not a regular file"),
    "a dead link": (lambda tree: (tree / "1" / "a.png").symlink_to("x"), "a.png: is a link to x"),
    "not UTF-8": (lambda tree: rename_class(tree, b"\xff"), "name of this class is not UTF-8"),
    "a control": (lambda tree: rename_class(tree, b"a\x07"), "holds the control character"),
    "alike": (
        lambda tree: [(tree / n).mkdir() or (tree / n / "a.png").write_bytes(GOOD)
                      for n in ("é", "e\u0301")],
        "looks like the label of image",
    ),
    "257 classes": (many_classes, "holds 258 folders, want at most 256 classes"),
    "oblong": (
        lambda tree: (tree / "0" / "0.png").write_bytes(saved(Image.new("L", (8, 9)))),
        "0/0.png: holds images of 9 x 8 pixels, want square ones",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TREES)
def test_a_tree_that_is_refused_says_where(case: str, tmp_path: Path) -> None:
    change, text = TREES[case]
    tree = glyphs().png(tmp_path / "tree")
    change(tree)
    with pytest.raises(UserError) as refused:
        pack(tree, tmp_path / "out")
    assert text in str(refused.value) and "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == ["tree"]


@settings(max_examples=150, deadline=None)
@given(
    good=st.sampled_from([GOOD, PLAIN]),
    place=st.integers(8, len(GOOD) - 1),
    noise=st.binary(min_size=1, max_size=6),
)
def test_changed_bytes_are_refused_or_change_nothing(
    good: bytes, place: int, noise: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tree = tmp_path_factory.mktemp("changed") / "tree"
    (tree / "a").mkdir(parents=True)
    (tree / "a" / "a.png").write_bytes(good)
    data = good[:place] + noise + good[place + len(noise) :]
    (tree / "a" / "b.png").write_bytes(data)
    _, faults, notes = check(tree)
    assert faults or any(note.startswith("1 rows repeat") for note in notes)


def test_a_plain_picture_is_read_in_one_piece_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever byte of it is changed, it is as good or bad as by the long way."""
    changed = [PLAIN[:n] + bytes([PLAIN[n] ^ 1]) + PLAIN[n + 1 :] for n in range(len(PLAIN))]
    files = [PLAIN, GOOD, HEAD + END, PLAIN[:-1], PLAIN + b"x", *changed]
    found = [answer(data) for data in files]
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_picture", None)
        assert pictures.scanlines(PLAIN, 8, "") == RAW
    monkeypatch.setattr(pictures, "_packed_plainly", lambda data, side: b"")
    assert found == [answer(data) for data in files]
    assert sum(isinstance(each, bytes) for each in found) == 3


def answer(data: bytes) -> bytes | str:
    try:
        return pictures.scanlines(data, 8, "the first has")
    except pictures.PngFault as fault:
        return str(fault)


def test_several_folders_are_read_by_the_same_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    start = processes.processes

    def counted(num: int, name: str) -> AbstractContextManager[Executor]:
        started.append(num)
        return start(num, name)

    trees = [glyphs(seed=seed).png(tmp_path / f"tree{seed}") for seed in range(3)]
    monkeypatch.setattr(pictures, "MANY", 1)
    monkeypatch.setattr(processes, "processes", counted)
    report = pack(trees, tmp_path / "out", PackOptions(workers=3))
    assert started == [3] and len(report.found) == 3


def test_a_process_that_is_killed_is_a_sentence() -> None:
    refused = pytest.raises(UserError, match="tree: a process that read it was ended")
    with refused, processes.processes(2, "tree") as pool:
        pool.submit(signal.raise_signal, signal.SIGKILL).result()


def test_processes_end_with_a_parent_that_is_killed() -> None:
    code = (
        "import os, signal; from engine.data.processes import processes\n"
        "with processes(2, 'tree') as pool:\n"
        "    print(*pool._processes, flush=True)\n"
        "    signal.raise_signal(signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    children = done.stdout.split()
    assert len(children) == 2
    deadline_s = time.monotonic() + 20
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_an_interruption_is_one_line_whoever_reads(tmp_path: Path) -> None:
    """Ctrl-C reaches the processes that read, too."""
    code = """
import os, signal, time
from engine.data import pictures
from tools.pack_tmnist import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
parent = os.getpid()
def interrupted(*_):
    if os.getpid() == parent:
        os._exit(1)
    os.killpg(0, signal.SIGINT)
    time.sleep(1)
pictures.MANY, pictures._files_decoded = 1, interrupted
main()
"""
    tree = glyphs().png(tmp_path / "tree")
    done = subprocess.run(
        [sys.executable, "-c", code, tree, tmp_path / "out"],
        cwd=ROOT, capture_output=True, text=True, start_new_session=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")
    assert os.listdir(tmp_path) == ["tree"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_processes_start_waits_until_they_have(name: str) -> None:
    """Between two forks, in a hook whose exceptions Python drops: nobody is left behind."""
    code = f"""
import os, signal, sys
from engine.data.processes import processes
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.{name}))
try:
    with processes(8, "tree"):
        print("never")
except KeyboardInterrupt:
    sys.exit(130)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    wanted = 130 if name == "SIGINT" else 143
    assert (done.returncode, done.stdout, done.stderr) == (wanted, "", "")


def is_running(process: str) -> bool:
    """Neither gone nor waiting for a parent that asks how it ended."""
    try:
        state = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_daemon_reads_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of multiprocessing.Pool is, which may not have children."""
    monkeypatch.setattr(pictures, "MANY", 1)
    tree = glyphs().png(tmp_path / "tree")
    pack(tree, tmp_path / "wanted")
    with get_context("fork").Pool(1) as pool:
        pool.apply(pack, (tree, tmp_path / "out"))
    assert content(tmp_path / "out") == content(tmp_path / "wanted")
