"""Proofs of kernels/ without a GPU, by make proofs: `interpreted` (TRITON_INTERPRET=1), `compiled` (ahead of time)."""
