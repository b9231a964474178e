"""What one factor changes: a cell of an experiment minus the default, query by query, over the seeds that both have."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from retrieval.evidence.compare import read_run
from retrieval.evidence.intervals import NORMAL_95, Values, standard_error

JUDGED = "judged"
Difference = tuple[float, float]
"""The mean, and half of its 95 % interval."""


def minus_default(out: Path, pairs: Sequence[tuple[str, str]], metric: str) -> Difference | None:
    """The mean over seeds of one metric's differences, for pairs of digests (a cell's, the default's) with one seed each.

    The interval holds the members' variance (of their means over seeds) and that between seeds. None where nothing was judged.
    """
    found = [
        _values(out / JUDGED / ours, metric) - _values(out / JUDGED / theirs, metric)
        for ours, theirs in pairs
        if (out / JUDGED / ours).is_dir() and (out / JUDGED / theirs).is_dir()
    ]
    if not found:
        return None
    each = np.array(found)
    variance = standard_error(each.mean(0)) ** 2 + (each.mean(1).var(ddof=1) / len(each) if len(each) > 1 else 0.0)
    return float(each.mean()), float(NORMAL_95 * np.sqrt(variance))


@cache
def _values(folder: Path, metric: str) -> Values:
    """Float64 [Q] of a judged cell, queries in order of their member. A cell's folder never changes once it is whole."""
    return read_run(folder).values[metric]
