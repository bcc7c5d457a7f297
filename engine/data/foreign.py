"""What a file is that is no CSV, by its bytes and never by its name, and what to do with it.

No format is read here: the sentence spares its reader the search for a fault in a table.
"""

import json
import os
import re
import shlex
import struct
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

HEAD_BYTES = 512
"""Of a file's beginning, what is looked at: as far as the magic of tar."""
LAYOUT = "a CSV of label,pixel0,pixel1,... or names,labels,1,2,..."
CONVERT = f"write it as {LAYOUT}"
PICTURE = f"one picture is no data set; write all of them as {LAYOUT}"
CLASS_FOLDERS = f"write grey PNGs into a folder per class, named for it, or {LAYOUT}"
UNPACK = "unpack it and name the CSV inside"
UNPACKED = "name the file itself, not a pipe or an archive of it: it is read as it is"
POINTER = b"version https://git-lfs"
_SHOWN = 3
_SCANNED = 2000
"""Entries of a folder that are looked at."""
_LOOKED_INTO = 30
"""Of them, those in which class folders are looked for."""

_MAGIC = (  # (first bytes, what it is, what to do; {name} is the file's, quoted for a shell)
    (b"\x1f\x8b", "a gzip inside another", UNPACK),
    (b"\xfd7zXZ\0", "xz-compressed", "unpack it (xz -d {name}) and name the CSV"),
    (b"BZh", "bzip2-compressed", "unpack it (bzip2 -d {name}) and name the CSV"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it (zstd -d {name}) and name the CSV"),
    (b"\x04\x22\x4d\x18", "lz4-compressed", "unpack it (lz4 -d {name}) and name the CSV"),
    (b"\x1f\x9d", "compressed by compress", "unpack it (gzip -d {name}) and name the CSV"),
    (b"LZIP", "lzip-compressed", "unpack it (lzip -d {name}) and name the CSV"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it (7z x {name}) and name the CSV"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it (unrar x {name}) and name the CSV"),
    (b"PK\x07\x08", "one part of a split zip", "join the parts (zip -s 0), then unpack it"),
    (b"PK", "a zip archive", UNPACK),
    (b"\x93NUMPY", "a NumPy array (.npy)", "save it and its labels as one .npz (np.savez)"),
    (b"PAR1", "a Parquet file", UNPACKED),
    (b"ARROW1", "an Arrow file (Feather)", UNPACKED),
    (b"FEA1", "a Feather file of version 1", CONVERT),
    (b"\xff\xff\xff\xff", "an Arrow stream", UNPACKED),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", CONVERT),
    (b"CDF", "a NetCDF file", CONVERT),
    (b"Obj\x01", "an Avro file", CONVERT),
    (b"ORC", "an ORC file", CONVERT),
    (b"MATLAB 5.0 MAT-file", "a MATLAB file (.mat)", CONVERT),
    (b"MATLAB 7.3 MAT-file", "a MATLAB file (.mat, HDF5)", CONVERT),
    (b"SQLite format 3\0", "an SQLite database", f"export its table as {LAYOUT}"),
    (b"RDX", "an R data file", CONVERT),
    (b"\x89PNG", "a PNG picture", PICTURE),
    (b"\xff\xd8\xff", "a JPEG picture", PICTURE),
    (b"GIF8", "a GIF picture", PICTURE),
    (b"II*\0", "a TIFF picture", PICTURE),
    (b"MM\0*", "a TIFF picture", PICTURE),
    (b"%PDF", "a PDF document", f"export its data as {LAYOUT}"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook (.xls)", "save it as CSV (UTF-8)"),
    (b"{\\rtf", "an RTF document", "save it as plain text, UTF-8"),
    (b"\x7fELF", "a program", "name the CSV"),
    (b"\0\x05\x16\x07", "a macOS side file (._NAME)", "name the CSV without ._"),
    (POINTER, "a pointer of git-lfs", "run git lfs pull"),
    (b"/annex/objects/", "a pointer of git-annex", "run git annex get"),
    (b"../.git/annex/objects/", "a pointer of git-annex", "run git annex get"),
    (b"%!PS", "a PostScript document", "name the CSV"),
    (b"@relation", "an ARFF file", CONVERT),
    (b"@RELATION", "an ARFF file", CONVERT),
    (b"\0\0\xfe\xff", "UTF-32 text", "save it as UTF-8"),
    (b"\xff\xfe", "UTF-16 or UTF-32 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
)  # fmt: skip
_TEXT = (  # what follows a byte order mark and white space, too; in lower case
    (b"<?xml", "an XML file", CONVERT),
    (b"<", "an HTML page", "log in and download again"),
    (b"{", "a JSON file", CONVERT),
    (b"[", "a JSON file", CONVERT),
)
IDX_TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
_PICKLES = re.compile(
    rb"\x80[\x02-\x05]"  # protocols 2 to 5 say so; 0 and 1 begin with a value
    rb"|\((?:[ld]p[0-9]+\n|I[0-9]+\n|K|V|X..\0\0|[\]}])"
    rb"|[\]}](?:q|r|\.|\()"
    rb"|X..\0\0|V[^\n]*\np[0-9]+\n"
    rb"|c[a-z_0-9.]+\n[A-Za-z_0-9]+\n(?:p[0-9]+\n|q|\()",
    re.DOTALL,
)
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_TABLES = (".csv", ".csv.gz", ".zip")


def foreign(head: bytes, name: str, size: int | None = None) -> str:
    """What a file that begins with `head` is, and what to do; "" if it may be a CSV.

    As "a PNG picture; ...". `size`: of the file, if known. No CSV of ours begins like one of these.
    """
    what, remedy = _kind(head[:HEAD_BYTES], size)
    return f"{what}; {remedy.replace('{name}', shlex.quote(name))}" if what else ""


def is_picture(head: bytes) -> bool:
    """Whether a file that begins so is a picture of any format."""
    return _kind(head[:HEAD_BYTES], None)[1] == PICTURE


def _kind(head: bytes, size: int | None) -> tuple[str, str]:
    """(what it is, what to do), or two empty texts."""
    if idx := idx_contents(head):
        return idx, UNPACKED
    if head[257:262] == b"ustar" and b"\0" in head[:257]:
        return "a tar archive", "unpack it (tar xf {name}) and name the CSV"
    if _is_safetensors(head):
        return "a safetensors file", CONVERT
    if _is_tfrecord(head, size):
        return "a TFRecord file", CONVERT
    if picture := _picture(head):
        return picture, PICTURE
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for data, table in ((head, _MAGIC), (text, _TEXT)):
        for start, what, remedy in table:
            if data.startswith(start):
                return what, remedy
    if _PICKLES.match(head):
        return "a Python pickle, which could run code", CONVERT
    if head.startswith(b"\0"):
        return "NUL bytes", "copy or download it again"
    return "", ""


def _picture(head: bytes) -> str:
    """A picture that its first bytes alone do not tell."""
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "a WebP picture"
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return "a BMP picture"
    return "a PGM or PPM picture" if re.match(rb"P[1-6]\s+[0-9#]", head) else ""


def is_idx(head: bytes) -> bool:
    """Whether a file that begins so is IDX: no CSV begins with two zero bytes."""
    return len(head) >= 4 and head[:2] == b"\0\0" and head[2] in IDX_TYPES and 0 < head[3] <= 4


def idx_contents(head: bytes) -> str:
    """What an IDX file holds: two zeros, type, number of axes, and their lengths (uint32)."""
    if not is_idx(head) or len(head) < 4 + 4 * head[3]:
        return ""
    length, *shape = struct.unpack_from(f">{head[3]}I", head, 4)
    if not shape:
        return f"an IDX file, MNIST's binary format ({length:,} labels)"
    axes = "x".join(map(str, shape))
    noun = "images" if len(shape) > 1 else "vectors"
    return f"an IDX file, MNIST's binary format ({length:,} {noun} of {axes})"


def _is_safetensors(head: bytes) -> bool:
    return head[8:10] == b'{"' and head[4:8] == bytes(4)


def _is_tfrecord(head: bytes, size: int | None) -> bool:
    """Records begin with their 64-bit length and its checksum, an Example with a tag."""
    if len(head) < 13 or head[4:8] != bytes(4):
        return False
    length = int.from_bytes(head[:8], "little")
    return length > 0 and (head[12:13] == b"\n" or (size is not None and length + 16 == size))


def is_litter(member: str) -> bool:
    """What systems add to an archive or a folder: folders' properties, side files of macOS."""
    parts = PurePosixPath(member).parts
    names = (".ds_store", "thumbs.db", "desktop.ini")
    return (
        "__MACOSX" in parts or not parts or parts[-1].startswith("._") or parts[-1].lower() in names
    )


def zip_contents(archive: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo]) -> str:
    """What a zip without a CSV holds, and what to do, as "holds ..."."""
    names = [info.filename for info in members]
    if not names:
        return "is a zip that holds no file; download it again"
    office = {
        "xl/": "is an Excel workbook (.xlsx); save it as CSV (UTF-8)",
        "word/": "is a Word document; export its data as a CSV",
        "ppt/": "is a PowerPoint document; export its data as a CSV",
    }
    for folder, what in office.items():
        if any(name.startswith(folder) for name in names):
            return what
    if "mimetype" in names and archive.read("mimetype")[:99].startswith(b"application/vnd.oasis"):
        return "is an OpenDocument file (.ods, .odt); save it as CSV (UTF-8)"
    if all(name.endswith(".npy") for name in names):
        return (
            f"holds NumPy arrays (.npz: {listed(names)}); pack it without --layout csv, or write "
            f"it again with np.savez where something lies beside them"
        )
    if any(name.endswith("data.pkl") for name in names):
        return f"is a file of torch.save; {CONVERT}"
    if len(names) == 1:
        with archive.open(members[0]) as opened:
            what = foreign(opened.read(HEAD_BYTES), names[0], members[0].file_size)
        if what:
            return f"holds 0 CSV files, only {names[0]}, which is {what}"
    return f"holds 0 CSV files, but {listed(names)}; unpack it and name the CSV"


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def has_class_folders(folder: Path) -> bool:
    """Whether folders in it hold PNGs, and nothing in it says that it is something else."""
    with os.scandir(folder) as entries:
        found = [entry for entry, _ in zip(entries, range(_SCANNED), strict=False)]
    names = {entry.name.lower() for entry in found}
    if names & {"manifest.json", "checkpoints", "report.json"}:
        return False
    if any(name.endswith(_TABLES) for name in names):
        return False
    below = (name for entry in found if _is_dir(entry) for name in _first_names(entry.path))
    return any(name.lower().endswith(".png") for name in below)


def folder_contents(folder: Path) -> str:
    """What a folder given as a CSV is, and what to do, as "is ..."."""
    with os.scandir(folder) as entries:
        found = [entry for entry, _ in zip(entries, range(_SCANNED), strict=False)]
    names = sorted(entry.name for entry in found if not is_litter(entry.name))
    if "manifest.json" in names and _format_of(folder) == "glyph-records":
        return f"is a record directory, packed already; give it to training (--data {folder})"
    if "checkpoints" in names or "report.json" in names:
        return "is a run's folder; name the CSV"
    if tables := [name for name in names if name.lower().endswith(_TABLES)]:
        return f"is a folder that holds {listed(tables)}; name one of them"
    below = [name for entry in found if _is_dir(entry) for name in _first_names(entry.path)]
    endings = Counter(Path(name.lower()).suffix for name in (*names, *below))
    if pictures := [ending for ending in _PICTURES if endings[ending]]:
        return f"is a folder of pictures ({', '.join(pictures)}); {CLASS_FOLDERS}"
    if not names:
        return "is an empty folder; name the CSV"
    if parents := sorted(entry.name for entry in found[:_LOOKED_INTO] if _holds_classes(entry)):
        return (
            f"is a folder that holds {listed(parents)}; name the folder that holds the "
            f"class folders, such as {folder / parents[0]}"
        )
    return f"is a folder that holds no CSV, but {listed(names)}; name the CSV"


def _holds_classes(entry: os.DirEntry[str]) -> bool:
    try:
        return _is_dir(entry) and has_class_folders(Path(entry.path))
    except OSError:
        return False


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _first_names(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry, _ in zip(entries, range(9), strict=False)]
    except OSError:
        return []


def _format_of(folder: Path) -> object:
    try:
        if (folder / "manifest.json").is_file():
            content = json.loads((folder / "manifest.json").read_bytes()[: 2**20])
            return content.get("format") if isinstance(content, dict) else None
    except (OSError, ValueError, RecursionError):
        pass
    return None
