"""For test suites of engines and backends: the reference, byte comparison, poison, and the shared matrix of cases.

The fixtures are in :mod:`latentkv.testing.plugin`.
"""

from __future__ import annotations

from ..providers import reference
from .compare import POISON, assert_same_bytes, first_difference, poisoned
from .matrix import Case, Problem, check, for_layout, matrix

__all__ = [
    "POISON",
    "Case",
    "Problem",
    "assert_same_bytes",
    "check",
    "first_difference",
    "for_layout",
    "matrix",
    "poisoned",
    "reference",
]
