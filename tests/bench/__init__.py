"""Benchmarks: python -m tests.bench.all, or pack, step, ranks, fullsize. Both sides of a comparison in one run."""
