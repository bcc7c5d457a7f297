"""Fused kernels for small grey images: torch, Triton and numba only, nothing of engine.

A kernel's file holds, in this order: reference (PyTorch), jit, launcher, autograd; cpu.py holds
what CPU tensors get. README.md here says what each does. This module needs no Triton, so that what
is missing can be said; the files themselves do.
"""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

NAMES = (
    "gather_warp",
    "conv_pool_relu",
    "bias_pool_relu",
    "conv2_pool_relu",
    "softmax_cross_entropy",
    "linear_cross_entropy",
    "adamw",
)
"""In the order a sample meets them."""

ALL = tuple(name for name in NAMES if name not in ("conv2_pool_relu", "linear_cross_entropy"))
"""What `all` means: the rest wait for a result file that shows what they are worth."""

ON_CPU = ("conv_pool_relu", "bias_pool_relu")
"""Of these, what is compiled for a CPU, too, where numba can be imported: cpu.py. The warp is, as
well, but whatever is named: feeds and gather_warp alike call it."""


def missing() -> str:
    """Why no kernel is supported here; empty where Triton has what it needs to build one."""
    if find_spec("triton") is None:
        return "Triton is not installed; pip install 'triton>=3.6'"
    if not ("CC" in os.environ or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler; install gcc or set CC"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Triton needs Python's header files; install python3-dev"
    return ""
