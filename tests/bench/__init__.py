"""Benchmarks: python -m tests.bench.all, or one of step, ranks, fullsize. Both sides of a comparison in one run."""
