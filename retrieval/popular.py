"""What everybody engages with just now, as a part of a snapshot: the items of the last month in the order of the last week.

  `popular.arrow`  row (of the snapshot), n_7d and n_30d (engagements in the 7 and 30 whole days before the night), best first

The numbers are the as-of numbers of the night, the same that the items' prompts carry. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from index.snapshot import Snapshot
from retrieval.parts import CatalogError, map_part, part_bytes, part_facts

POPULAR_PART = "popular.arrow"
COLUMNS = {"row": pa.int64(), "n_7d": pa.float64(), "n_30d": pa.float64()}
LISTED = 1_000_000
"""Longer lists are cut: far more than one member can have seen. A filter that permits a few of many more items can leave nothing
of the list; then the other lists answer alone."""

Rows = npt.NDArray[np.int64]
Numbers = Mapping[str, npt.NDArray[np.float64]]


class Popular:
    """The items of the last 30 days, most engaged with in the last 7 first, then by the 30, then by row."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    @classmethod
    def of_numbers(cls, numbers: Numbers) -> Popular:
        """The list that a night with these as-of numbers (name -> float64 [N]) writes, in memory."""
        return cls(_ranked(numbers))

    @classmethod
    def open(cls, snapshot: Snapshot) -> Popular:
        """The part of a snapshot, mapped. Raises SnapshotNotFound without one, CatalogError if it does not fit the vectors."""
        batch = map_part(snapshot.part(POPULAR_PART))
        part_facts(batch, POPULAR_PART, COLUMNS)
        rows = batch.column("row").to_numpy()
        if len(rows) and not 0 <= rows.min() <= rows.max() < snapshot.manifest.count:
            raise CatalogError(
                f"{POPULAR_PART} of snapshot {snapshot.name} names rows {rows.min()}..{rows.max()} of "
                f"{snapshot.manifest.count:,}; publish a new night or roll back"
            )
        return cls(rows)

    def find(self, k: int, excluded: Rows) -> Rows:
        """The first `k` rows (fewer if fewer were engaged with), none of them excluded."""
        head = self._rows[: k + len(excluded)]
        return head[~np.isin(head, excluded)][:k]


def write_popular(numbers: Numbers) -> bytes:
    """The bytes of `popular.arrow` for as-of numbers in the rows' order; the same numbers give the same bytes."""
    rows = _ranked(numbers)
    columns = {"row": pa.array(rows, pa.int64())}
    columns |= {name: pa.array(numbers[name][rows], pa.float64()) for name in ("n_7d", "n_30d")}
    return part_bytes(pa.record_batch(columns), POPULAR_PART, {})


def _ranked(numbers: Numbers) -> Rows:
    week, month = numbers["n_7d"], numbers["n_30d"]
    rows = np.flatnonzero(month > 0)
    best: Rows = rows[np.lexsort((rows, -month[rows], -week[rows]))][:LISTED]
    return best
