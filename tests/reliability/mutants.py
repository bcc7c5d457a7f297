"""Small CSVs with a few faults or unusual spellings, to try the lexers and the packer with."""

import random

TOKENS = (
    b'"', b'""', b",", b"\n", b"\r\n", b"\r", b"\n\n", b".0", b".000", b".", b"0", b"00", b"007",
    b"255", b"255.0", b"256", b"1000", b"-1", b"-0.0", b"1e2", b"nan", b"12.5", b"1.00", b" ",
    b"\t", b"\0", b"\x1b[31m", b"\x7f", b"\xff", b"\xc3", b"\xc3\xa9", b"e\xcc\x81",
    b"\xe2\x80\xae", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc2\x85",
    b"\xf0\x9f\x98\x80", "１２".encode(), "١".encode(), b"names,labels,1,2,3,4\n",
    b"names,labels", b"label", b"A,b,0,1,2,3\n", b'"7"', b'"x\ny"', b'"a,b"', b";", b"#", b"+5",
    b"0x1", b"1_0", b"NA", b"0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,",
)  # fmt: skip
TEXTS = (
    '","', '""""', "a", "b", "0", "NA", "é", "#", "'", " b ", '"x""y"', "names", "labels", "label",
)  # fmt: skip
SPELLINGS = ("{}", "{}", "{}.0", "{}.0", "{}.000", '"{}"')


def row(rng: random.Random, num_text: int, num_pixels: int) -> str:
    """A row that is in order."""
    texts = [rng.choice(TEXTS) for _ in range(num_text)]
    spelling = rng.choice(SPELLINGS)
    few = (0,) * 19 + (255,)
    values = rng.choice((few, (0, 0, 0, 255), (0, 9, 10, 99, 128, 255), range(256)))
    return ",".join([*texts, *(spelling.format(rng.choice(values)) for _ in range(num_pixels))])


def mutated(rng: random.Random, table: bytes) -> bytes:
    """The table with up to three faults, or merely unusual spellings."""
    data = bytearray(table)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        place = rng.randrange(len(data) + 1) if rng.random() < 0.9 else 0
        kind = rng.random()
        if kind < 0.15 and place < len(data):
            data[place] = rng.randrange(256)
        elif kind < 0.3:
            del data[place : place + rng.choice((1, 1, 2, 5, 20))]
        elif kind < 0.4:
            del data[place:]
        elif kind < 0.5:
            data[place:place] = data[max(place - rng.randrange(40), 0) : place]
        else:
            data[place : place + rng.randrange(3)] = rng.choice(TOKENS)
    return bytes(data)
