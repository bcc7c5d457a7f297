"""The forms that a trained network is exported in: what they are called, need, and are run by.

Does not: import torch, so that --help answers at once; write or check a form (exported.py).
"""

from dataclasses import dataclass
from importlib.util import find_spec

from engine.errors import UserError

FACTS = "facts.json"
"""The metadata's name in the archive of torch.export."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A format of files."""

    file: str
    packages: tuple[str, ...] = ()
    """What it needs beside this project."""
    runs_by: str
    """Which library ran it in the check."""


FORMS = {
    "onnx": Form(
        file="model.onnx",
        packages=("onnx", "onnxruntime", "onnxscript"),
        runs_by="onnxruntime",
    ),
    "torch": Form(file="model.pt2", runs_by="torch.export"),
    "safetensors": Form(file="model.safetensors", runs_by="this project's network"),
}
"""By what --to calls them."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """How an exported file answered a split, beside the network that it was made from."""

    form: str
    file: str
    runs_by: str
    num_samples: int
    num_same: int
    """Images whose class is the network's."""
    largest_difference: float
    """Between two logits; `largest_logit` is what it is to be compared with."""
    largest_logit: float
    accuracy_fraction: float


def check_packages(forms: tuple[str, ...]) -> None:
    """UserError if a package that a form needs is not installed."""
    for name in forms:
        missing = [package for package in FORMS[name].packages if find_spec(package) is None]
        if missing:
            are = "is" if len(missing) == 1 else "are"
            remedy = f"pip install {' '.join(missing)}"
            raise UserError(f"--to {name}: {', '.join(missing)} {are} not installed; {remedy}")
