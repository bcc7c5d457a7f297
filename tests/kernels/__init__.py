"""Proofs of kernels/ without a GPU, by make proofs.

`interpreted` runs them in Triton's interpreter (TRITON_INTERPRET=1), `compiled` ahead of time.
"""
