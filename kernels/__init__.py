"""Fused Triton kernels for small grey images: torch and Triton only, nothing of engine.

A kernel's file holds, in this order: reference (PyTorch, what CPU tensors get), jit, launcher, autograd. This package's
own module needs no Triton, so that what is missing can be said; the files themselves do.
"""

from importlib.util import find_spec

NAMES = ("gather_warp", "conv_pool_relu", "bias_pool_relu", "softmax_cross_entropy")
"""In the order a sample meets them."""


def missing() -> str:
    """Why no kernel can be had here; empty where Triton is installed."""
    return "" if find_spec("triton") else "Triton is not installed; pip install 'triton>=3.6'"
