"""The compiled lexer and its plain twin are one language; of accepted files, Python's csv, too."""

import csv
import io
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.data.given import find_lexer
from engine.data.lexer import (
    SLACK_BYTES,
    Fault,
    Layout,
    Lexer,
    check_text,
    lex_plainly,
    read_header,
    read_row,
)
from engine.data.lexer_jit import lex
from engine.host import ROOT
from tests.reliability.mutants import mutated, row

TMNIST = read_header(b"names,labels,1,2,3,4,5,6,7,8,9\n")
MNIST = read_header(b"label,pixel0,pixel1,pixel2,pixel3\n")
Found = list[tuple[str, str, bytes]]


def lexed(lexer: Lexer, layout: Layout, data: bytes, start: int = 0) -> tuple[Found, int]:
    """(font, label, pixels) of each row, and the offset of the fault, from one block."""
    block = np.frombuffer(data + bytes(SLACK_BYTES), np.uint8)
    rows = lexer(layout, block, start, len(data), layout.images(len(data)))
    assert rows.sum_R.tolist() == rows.image_RP.sum(1, dtype=np.int64).tolist()
    assert rows.squares_R.tolist() == (rows.image_RP.astype(np.int64) ** 2).sum(1).tolist()
    parts = zip(rows.font_R, rows.label_R, rows.image_RP, strict=True)
    return [
        (rows.fonts[f], rows.labels[b], image_P.tobytes()) for f, b, image_P in parts
    ], rows.fault


def by_csv(layout: Layout, data: bytes) -> Found:
    """What Python's own reader makes of an accepted block."""
    rows = csv.reader(io.StringIO(data.decode(), newline=""), strict=True)
    return [
        (
            fields[0] if layout.has_fonts else "",
            fields[layout.num_text - 1],
            bytes(int(float(v)) for v in fields[layout.num_text :]),
        )
        for fields in rows
    ]


def lines(rng: random.Random, layout: Layout) -> bytes:
    """A few rows, mutated."""
    num = rng.randrange(1, 5)
    rows = [row(rng, layout.num_text, layout.num_pixels) for _ in range(num)]
    end = rng.choice(["\n", "\n", "\r\n"])
    data = mutated(rng, "".join(line + end for line in rows).encode())
    return data if data.endswith(b"\n") else data + b"\n"


@pytest.mark.parametrize("spelling", ["{}", "{}.0"])
def test_runs_of_zeros_end_anywhere(spelling: str) -> None:
    """At any pixel, by any number of digits, or by a zero that is spelled otherwise."""
    layout = read_header(",".join(["names", "labels", *map(str, range(1, 50))]).encode())
    rows = []
    for place in range(49):
        for pixel in (spelling.format(7), spelling.format(10), spelling.format(255), "0", "0.00"):
            pixels = [spelling.format(0)] * 49
            pixels[place] = pixel
            rows.append(",".join(["font", "label", *pixels]))
    data = "".join(line + "\n" for line in rows).encode()
    found, fault = lexed(lex, layout, data)
    assert fault == -1
    assert found == by_csv(layout, data)


def fuzz(count: int, seed: int) -> dict[str, int]:
    """Both lexers must agree on verdict, position and pixels; how many inputs were accepted."""
    rng = random.Random(seed)
    # The wide one takes the 32-byte steps.
    wide = read_header(",".join(["names", "labels", *map(str, range(1, 26))]).encode())
    layouts = (wide, MNIST, read_header(b"names,labels,1\n"))
    verdicts = {"accepted": 0, "refused": 0}
    for _ in range(count):
        layout = rng.choice(layouts)
        data = lines(rng, layout)
        found, fault = lexed(lex, layout, data)
        assert (found, fault) == lexed(lex_plainly, layout, data), data
        verdicts["accepted" if fault < 0 else "refused"] += 1
        if fault < 0:
            assert found == by_csv(layout, data), data
        else:
            with pytest.raises(Fault):
                read_row(data[fault : data.index(b"\n", fault) + 1], layout)
    return verdicts


@pytest.mark.slow
def test_both_lexers_agree_on_mutated_inputs() -> None:
    verdicts = fuzz(50_000, seed=0)
    assert min(verdicts.values()) > 10_000


def test_a_lexer_goes_on_behind_a_fault_and_keeps_its_texts() -> None:
    """As --check does; the texts of refused rows must not come back as accepted ones."""
    up = b",1,2,3,4,5,6,7,8,9\n"
    data = b"F,a" + up + b"G\x07,b" + up + b"G\x07,c" + up + b"F,d,9,8,7,6,5,4,3,2,1\n"
    for lexer in (lex, lex_plainly):
        found, fault = lexed(lexer, TMNIST, data)
        assert [label for _, label, _ in found] == ["a"] and fault == data.index(b"G")
        found, again = lexed(lexer, TMNIST, data, data.rindex(b"G"))
        assert not found and again == data.rindex(b"G")
        found, fault = lexed(lexer, TMNIST, data, data.rindex(b"F"))
        assert found == [("F", "d", bytes(range(9, 0, -1)))] and fault == -1


def test_a_block_may_hold_many_texts() -> None:
    rows = [f"Font {'x' * (i % 300)}{i},{i},1,2,3,4,5,6,7,8,9\n" for i in range(20_000)]
    for start in range(0, len(rows), 7000):
        part = rows[start : start + 7000]
        found, fault = lexed(lex, TMNIST, "".join(part).encode())
        assert fault == -1 and [f"{font},{label}" for font, label, _ in found] == [
            r[:-19] for r in part
        ]
    found, fault = lexed(lex, TMNIST, "".join(rows).encode())
    assert fault == -1 and [font for font, _, _ in found] == [r.split(",")[0] for r in rows]


def test_equal_pixels_have_equal_hashes_and_others_not() -> None:
    layout = read_header(("names,labels," + ",".join(map(str, range(1, 785)))).encode())
    rng = np.random.default_rng(0)
    image_RP = rng.integers(0, 256, (300, 784))
    image_RP[100:200] = image_RP[:100]
    image_RP[200:, :] = image_RP[0]
    image_RP[200:, 684:][np.diag_indices(100)] ^= 1  # one bit at each of the last places
    data = "".join(f"F,a,{','.join(map(str, row))}\n" for row in image_RP).encode()
    for lexer in (lex, lex_plainly):
        block = np.frombuffer(data + bytes(SLACK_BYTES), np.uint8)
        rows = lexer(layout, block, 0, len(data), layout.images(len(data)))
        assert np.array_equal(rows.image_RP, image_RP)
        assert np.array_equal(rows.hash_R[:100], rows.hash_R[100:200])
        assert len(set(rows.hash_R.tolist())) == 200


def test_headers() -> None:
    assert (TMNIST.num_pixels, TMNIST.side, TMNIST.has_fonts) == (9, 3, True)
    assert (MNIST.num_pixels, MNIST.side, MNIST.has_fonts) == (4, 2, False)
    assert read_header(b"label,pixel1,pixel2,pixel3,pixel4\r\n").num_pixels == 4
    for line in (
        b"label,pixel2,pixel3,pixel4,pixel5",
        b"label,pixel0,pixel1",
        b"labels,pixel0",
        b"names,label,1",
        b"label",
    ):
        with pytest.raises(Fault, match="got the header"):
            read_header(line)


def test_unseen_characters_are_refused_and_a_tab_is_not() -> None:
    assert check_text("\ta b\u00ad", 1)
    for character in ("\n", "\0", "\x1f", "\x7f", "\x85", "\u200f", "\u2028", "\u202e", "\u2066"):
        with pytest.raises(Fault, match="control character U"):
            check_text(f"a{character}", 1)


def test_without_numba_the_plain_lexer_packs_the_same(
    small_csv: Path, small_dir: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, pathlib; sys.modules['numba'] = None; from engine.data.pack import pack;"
        "pack(*map(pathlib.Path, sys.argv[1:])); print(sys.modules['numba'])"
    )
    command = [sys.executable, "-c", code, small_csv, tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "None\n" and "numba cannot be imported" in done.stderr
    assert find_lexer() is lex
    for file in small_dir.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
