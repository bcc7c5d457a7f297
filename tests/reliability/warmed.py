"""Imported by the process that rows are forked from: each begins with all that is imported here."""

from tests.reliability import common, rows, training

__all__ = ["rows"]

common.warm()
training.warm()
