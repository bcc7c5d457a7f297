"""The training engine: records, order, feeds, step, trainer. README.md here has the map."""

__version__ = "0.1.0"
