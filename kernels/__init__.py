"""Fused Triton kernels: torch and triton only, one file a kernel, each with its reference. None is written yet."""
