"""Proofs of kernels/ without a GPU, by make proofs.

`interpreted_*` run them in Triton's interpreter (TRITON_INTERPRET=1), `compiled` ahead of time.
"""
