"""The packaged sample: 128 typefaces, packed once into the user's cache folder."""

import hashlib
from pathlib import Path

from engine.data.pack import pack
from engine.data.record_file import FORMAT, VERSION
from engine.durable import MANIFEST, locked, writing
from engine.host import user_cache

CSV = Path(__file__).with_name("typefaces_sample.csv.gz")


def sample_path() -> Path:
    """Where the sample's records are, or will be: in the user's cache, named by its content."""
    name = hashlib.sha256(CSV.read_bytes()).hexdigest()[:12]
    return user_cache() / f"sample-{name}-{FORMAT}-{VERSION}"


def ensure_sample() -> Path:
    """The sample's record directory, packed first if it is missing, by one process per machine."""
    path = sample_path()
    if (path / MANIFEST).exists():  # perhaps in a cache that this user may only read
        return path
    with writing(path), locked(path.with_suffix(".first")):
        if not (path / MANIFEST).exists():
            print(f"packing the sample of 128 typefaces into {path}, once", flush=True)
            pack(CSV, path)
    return path
