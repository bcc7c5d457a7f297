"""The reliability of packing, record files and runs: real kills, damage and file systems.

`python -m tests.reliability` runs them at the counts of a commit, `--full` at those of a release.
"""
