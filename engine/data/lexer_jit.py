"""lexer.py's language, compiled by numba: blocks of lines -> Rows, 1.8 GB/s per core (EPYC).

Safe on any bytes: a block ends with a line feed, which ends every field, and SLACK_BYTES lie
readable behind it; so no loop passes the block's end and no wide comparison passes the slack. Text
(names, labels) is looked up as bytes here; Python looks at each block's different ones. A line that
is not in the language is only found here; lexer.py says what is wrong with it.

Shapes: R rows of a block, P pixels of a row, E different texts in A bytes.
"""

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from engine.data.compiled import SEED, U, jit, load8, mix
from engine.data.lexer import (
    FIELD_LIMIT_BYTES,
    LINE_LIMIT_BYTES,
    SLACK_BYTES,
    Fault,
    Layout,
    Rows,
    check_text,
)

assert SLACK_BYTES >= 40, "a wide comparison reads 40 bytes from the start of a field"
QUOTE, COMMA, DOT, ZERO, NINE, LF, CR = (np.uint8(ord(c)) for c in '",.09\n\r')
TWO_ZEROS, FOUR_ZEROS = (U(int.from_bytes(t, "little")) for t in (b"0.0,0.0,", b"0,0,0,0,"))
DOT_ZERO_COMMA = U(int.from_bytes(b".0,", "little"))


class Texts(NamedTuple):
    """The different texts of a column: text e is arena_A[end_E[e] : end_E[e + 1]]."""

    seed: Any
    arena_A: np.ndarray
    end_E: np.ndarray
    slots: np.ndarray
    """A hash table of their numbers; -1 is free."""
    num: np.ndarray
    """How many there are, as an array of one."""


class Room(NamedTuple):
    """Where rows are left."""

    image_RP: np.ndarray
    text_2R: np.ndarray
    """Numbers of the fonts, then of the labels."""
    number_R3: np.ndarray
    """Each row's offset, sum, and sum of squares."""
    hash_R: np.ndarray


@jit
def _text(buffer, i, texts):  # type: ignore[no-untyped-def]
    """Look up the field at `i`, unquoted, and keep it if it is new.

    Returns (offset behind its comma, its number), or (-1, 0).
    """
    seed, arena_A, end_E, slots, num = texts
    tail = end_E[num[0]]
    length = 0
    code = seed
    quoted = buffer[i] == QUOTE
    i += int(quoted)
    while buffer[i] != LF and length < FIELD_LIMIT_BYTES + 1:
        byte = buffer[i]
        if quoted and byte == QUOTE and buffer[i + 1] != QUOTE:
            i += 1
            break
        if not quoted and byte == COMMA:
            break
        if byte == QUOTE:
            if not quoted:
                return -1, np.int32(0)
            i += 1  # the first of two
        arena_A[tail + length] = byte
        code = mix(code, U(byte))
        length += 1
        i += 1
    if buffer[i] != COMMA or length == 0 or length > FIELD_LIMIT_BYTES:
        return -1, np.int32(0)
    slot = np.int64(code & U(len(slots) - 1))
    while slots[slot] >= 0:
        entry = slots[slot]
        start = end_E[entry]
        if end_E[entry + 1] - start == length:
            k = 0
            while k < length and arena_A[start + k] == arena_A[tail + k]:
                k += 1
            if k == length:
                return i + 1, entry
        slot = (slot + 1) & (len(slots) - 1)
    entry = np.int32(num[0])
    slots[slot] = entry
    end_E[entry + 1] = tail + length
    num[0] += 1
    return i + 1, entry


@jit
def _any_pixel(buffer, i, last):  # type: ignore[no-untyped-def]
    """Any accepted pixel at `i`. Returns (offset behind its separator, value), or (-1, 0)."""
    quoted = buffer[i] == QUOTE
    i += int(quoted)
    start = i
    value = 0
    while i < start + 3 and ZERO <= buffer[i] <= NINE:
        value = 10 * value + int(buffer[i]) - int(ZERO)
        i += 1
    if i == start or value > 255 or (buffer[start] == ZERO and i > start + 1):
        return -1, 0
    if buffer[i] == DOT:
        i += 1
        zeros = i
        while buffer[i] == ZERO:
            i += 1
        if i == zeros or i - start > FIELD_LIMIT_BYTES:
            return -1, 0
    if quoted:
        if buffer[i] != QUOTE:
            return -1, 0
        i += 1
    if last and buffer[i] == CR:
        i += 1
    if buffer[i] != (LF if last else COMMA):
        return -1, 0
    return i + 1, value


@jit
def _are_four(buffer, i, word):  # type: ignore[no-untyped-def]
    """Whether this word stands at `i` four times."""
    return (
        (load8(buffer, i) ^ word)
        | (load8(buffer, i + 8) ^ word)
        | (load8(buffer, i + 16) ^ word)
        | (load8(buffer, i + 24) ^ word)
    ) == U(0)


@jit
def _digits(word, end):  # type: ignore[no-untyped-def]
    """One to three digits at the start of `word` that `end` follows, without a branch: nothing
    predicts a pixel's digits. Returns (how many, value, whether that is a pixel's)."""
    two = U((word >> U(8)) & U(255) != U(end))
    three = two & U((word >> U(16)) & U(255) != U(end))
    num_digits = U(1) + two + three
    digits = word << (U(32) - U(8) * num_digits)  # the last digit in bits 24 to 31
    ones = ((digits >> U(24)) & U(255)) - U(ZERO)  # what is below "0" wraps to a huge number
    tens = (((digits >> U(16)) & U(255)) - U(ZERO)) * two
    hundreds = (((digits >> U(8)) & U(255)) - U(ZERO)) * three
    value = ones + U(10) * tens + U(100) * hundreds
    good = (
        (ones < U(10))
        & (tens < U(10))
        & (hundreds < U(10))
        & (value < U(256))
        & ((two == U(0)) | (word & U(255) != U(ZERO)))
    )
    return num_digits, value, good


@jit
def _decimals(buffer, i, image_P):  # type: ignore[no-untyped-def]
    """A row's pixels from `i` on, fast where they have ".0". Returns the next line's offset, or -1.

    This and `_integers` take arrays once a row: passing one costs more than looking at a pixel.
    """
    num = len(image_P)
    p = 0
    while p < num:
        word = load8(buffer, i)
        if word == TWO_ZEROS and p + 2 < num:  # most of a glyph is background
            for k in range(2):
                image_P[p + k] = 0
            p += 2
            i += 8
            while p + 8 < num and _are_four(buffer, i, TWO_ZEROS):
                for k in range(8):
                    image_P[p + k] = 0
                p += 8
                i += 32
            continue
        num_digits, value, good = _digits(word, DOT)
        if good & ((word >> (U(8) * num_digits)) & U(0xFFFFFF) == DOT_ZERO_COMMA) and p + 1 < num:
            image_P[p] = value
            i += np.int64(num_digits) + 3
        else:
            i, any_value = _any_pixel(buffer, i, p + 1 == num)
            if i < 0:
                return -1
            image_P[p] = any_value
        p += 1
    return i


@jit
def _integers(buffer, i, image_P):  # type: ignore[no-untyped-def]
    """As `_decimals`, fast where pixels are nothing but digits."""
    num = len(image_P)
    p = 0
    while p < num:
        word = load8(buffer, i)
        if word == FOUR_ZEROS and p + 4 < num:
            for k in range(4):
                image_P[p + k] = 0
            p += 4
            i += 8
            while p + 16 < num and _are_four(buffer, i, FOUR_ZEROS):
                for k in range(16):
                    image_P[p + k] = 0
                p += 16
                i += 32
            continue
        num_digits, value, good = _digits(word, COMMA)
        if good & ((word >> (U(8) * num_digits)) & U(255) == U(COMMA)) and p + 1 < num:
            image_P[p] = value
            i += np.int64(num_digits) + 1
        else:
            i, any_value = _any_pixel(buffer, i, p + 1 == num)
            if i < 0:
                return -1
            image_P[p] = any_value
        p += 1
    return i


@jit
def _pixels(buffer, i, image_P):  # type: ignore[no-untyped-def]
    """A row's pixels from `i` on, as its first is written. Returns the next line's offset, or -1.

    Others of the row may be written in another way: it only takes longer.
    """
    end = i
    while end < i + 3 and ZERO <= buffer[end] <= NINE:
        end += 1
    if buffer[end] == COMMA:
        return _integers(buffer, i, image_P)
    return _decimals(buffer, i, image_P)


@jit
def _lex(buffer, start, stop, has_fonts, fonts_labels, room):  # type: ignore[no-untyped-def]
    """Rows of buffer[start:stop] up to the first line that is none.

    Returns (number of rows, that line's offset or -1).
    """
    image_RP, text_2R, number_R3, hash_R = room
    num_pixels = image_RP.shape[1]
    seed = fonts_labels[0].seed
    row = 0
    while start < stop:
        i = start
        for k in range(0 if has_fonts else 1, 2):
            i, text_2R[k, row] = _text(buffer, i, fonts_labels[k])
            if i < 0:
                return row, start
        image_P = image_RP[row]
        i = _pixels(buffer, i, image_P)
        if i < 0 or i - start > LINE_LIMIT_BYTES:
            return row, start
        total = np.int64(0)
        squares = np.int64(0)
        code = seed
        for p in range(num_pixels):
            value = np.int64(image_P[p])
            total += value
            squares += value * value
        for p in range(0, num_pixels - 7, 8):
            code = mix(code, load8(image_P, p))
        for p in range(num_pixels - num_pixels % 8, num_pixels):
            code = mix(code, U(image_P[p]))
        number_R3[row, 0] = start
        number_R3[row, 1] = total
        number_R3[row, 2] = squares
        hash_R[row] = code
        row += 1
        start = i
    return row, -1


def lex(layout: Layout, block: np.ndarray, start: int, stop: int, image_RP: np.ndarray) -> Rows:
    """lexer.lex_plainly, compiled."""
    num_bytes = stop - start
    most = layout.most_rows(num_bytes)
    assert start == stop or block[stop - 1] == LF
    assert len(block) >= stop + SLACK_BYTES
    assert len(image_RP) >= most and image_RP.shape[1] == layout.num_pixels
    fonts_labels = _texts(num_bytes, most), _texts(num_bytes, most)
    text_2R = np.zeros((2, most), np.int32)
    number_R3 = np.empty((most, 3), np.int64)
    hash_R = np.empty(most, U)
    room = Room(image_RP, text_2R, number_R3, hash_R)
    rows, fault = _lex(block, start, stop, layout.has_fonts, fonts_labels, room)
    font_R, label_R = text_2R[:, :rows]
    labels, seen = _read(fonts_labels[1], label_R, layout.num_text)
    fonts = [""]
    if layout.has_fonts:
        fonts, good = _read(fonts_labels[0], font_R, 1)
        seen = min(seen, good)
    header_R = np.array([label == layout.columns[layout.num_text - 1] for label in labels], bool)[
        label_R[:seen]
    ]
    if layout.has_fonts:
        header_R &= np.array([font == layout.columns[0] for font in fonts], bool)[font_R[:seen]]
    seen = int(header_R.argmax()) if header_R.any() else seen
    # What is kept until the last block is copied: the arrays have room for twice the rows and more.
    return Rows(
        image_RP=image_RP[:seen],
        labels=labels,
        label_R=label_R[:seen],
        fonts=fonts,
        font_R=font_R[:seen],
        sum_R=number_R3[:seen, 1].copy(),
        squares_R=number_R3[:seen, 2].copy(),
        hash_R=hash_R[:seen].copy(),
        fault=int(number_R3[seen, 0]) if seen < rows else fault,
    )


def _texts(num_bytes: int, most: int) -> Texts:
    """Room for the texts of so many bytes and rows."""
    slots = np.full(1 << (2 * most).bit_length(), -1, np.int32)
    arena_A = np.empty(num_bytes, np.uint8)
    return Texts(SEED, arena_A, np.zeros(most + 1, np.int64), slots, np.zeros(1, np.int64))


def _read(found: Texts, index_R: np.ndarray, column: int) -> tuple[list[str], int]:
    """The texts of a block's rows, and how many rows come before the first bad one."""
    ends = found.end_E[: index_R.max(initial=-1) + 2].tolist()
    data = found.arena_A[: ends[-1]].tobytes()
    texts = list[str]()
    for start, stop in pairwise(ends):
        try:
            texts.append(_checked(data[start:stop], column))
        except (UnicodeDecodeError, Fault):
            return texts, int((index_R == len(texts)).argmax())
    return texts, len(index_R)


@lru_cache(2**10)
def _checked(data: bytes, column: int) -> str:
    return check_text(data.decode(), column)
