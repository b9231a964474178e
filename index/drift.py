"""Drift: how much of what yesterday's index answered tonight's answers too, for the same queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from index.check import GateResult
from index.hits import Vectors
from index.shards import as_built
from index.snapshot import Snapshot

DRIFT_K = 2_000


@dataclass(frozen=True, slots=True)
class Drift:
    """Of the best `k` items of yesterday, the share that is among tonight's: mean and 5th percentile over `queries` queries."""

    k: int
    mean: float
    p5: float
    queries: int


def drift(before: Snapshot | None, after: Snapshot, queries: Vectors | None, k: int = DRIFT_K) -> Drift | None:
    """The drift from one snapshot to the next is returned for queries [Q, D] of the encoder that made both.

    None without a snapshot before or without queries, and when another encoder made it: its vectors answer other queries.
    """
    if before is None or queries is None or not len(queries) or not before.manifest.count:
        return None
    ours, theirs = after.manifest, before.manifest
    if (ours.fingerprint, ours.dims) != (theirs.fingerprint, theirs.dims):
        return None
    depth = min(k, ours.count, theirs.count)
    then, now = (as_built(one).search(queries, depth) for one in (before, after))
    met = np.unique(then.rows[then.rows >= 0])
    places = after.ids.rows(before.ids.many(met))
    shares = [
        np.isin(places[np.searchsorted(met, rows[:count])], found[found >= 0]).mean()
        for rows, count, found in zip(then.rows, then.counts, now.rows)
    ]
    return Drift(depth, round(float(np.mean(shares)), 6), round(float(np.quantile(shares, 0.05)), 6), len(shares))


def drift_gate(seen: Drift | None, least: float) -> list[GateResult]:
    """The gate is returned that stops a night whose mean overlap is below `least`; none where nothing can be compared."""
    if seen is None or least == 0:
        return []
    told = f"{seen.mean} of yesterday's best {seen.k}, over {seen.queries} queries"
    return [GateResult("overlap", seen.mean >= least, told, f"at least {least}")]
