"""The training engine: records, order, feeds, step, trainer. See README.md for the picture of
how data flows."""

__version__ = "0.1.0"
