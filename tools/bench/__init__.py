"""Parts of the commands profile and gpu, and of the benchmarks in tests/bench."""
