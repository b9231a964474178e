"""What changed from one snapshot to another: ids that came and went, and vectors that moved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from index.ids import Ids, Rows
from index.snapshot import Snapshot

_BLOCK_ROWS = 65_536
_NAMED = 10


@dataclass(frozen=True, slots=True)
class Difference:
    """From `before` to `after`: counts of ids, a few of them by name, and how far the vectors of the ids in both moved.

    `moved` counts vectors that are not bitwise equal, `largest` is the largest difference of one number; None where the vectors
    do not compare (another encoder or other dims). `parts` are opaque parts whose content differs, or that only one has.
    """

    before: str
    after: str
    same_encoder: bool
    added: int
    removed: int
    kept: int
    moved: int | None
    largest: float | None
    added_ids: list[str]
    removed_ids: list[str]
    parts: list[str]


def compare(before: Snapshot, after: Snapshot) -> Difference:
    """The difference between two snapshots of any stores is returned; both are read once, in blocks."""
    same_encoder = before.manifest.fingerprint == after.manifest.fingerprint
    comparable = same_encoder and before.manifest.dims == after.manifest.dims
    rows = _rows_of(after.ids, before.ids)
    here = np.flatnonzero(rows >= 0)
    left = np.ones(len(before.ids), bool)
    left[rows[here]] = False
    moved, largest = _moved(before, after, rows[here], here) if comparable else (None, None)
    removed, added = np.flatnonzero(left), np.flatnonzero(rows < 0)
    return Difference(
        before=before.name,
        after=after.name,
        same_encoder=same_encoder,
        added=len(added),
        removed=len(removed),
        kept=len(here),
        moved=moved,
        largest=largest,
        added_ids=after.ids.many(added[:_NAMED]),
        removed_ids=before.ids.many(removed[:_NAMED]),
        parts=_changed_parts(before, after),
    )


def _rows_of(asked: Ids, among: Ids) -> Rows:
    starts = range(0, len(asked), _BLOCK_ROWS)
    blocks = [among.rows(asked.many(np.arange(start, min(start + _BLOCK_ROWS, len(asked))))) for start in starts]
    return np.concatenate([np.zeros(0, np.int64), *blocks])


def _moved(before: Snapshot, after: Snapshot, old_rows: Rows, new_rows: Rows) -> tuple[int, float]:
    moved, largest = 0, 0.0
    for start in range(0, len(old_rows), _BLOCK_ROWS):
        some = slice(start, start + _BLOCK_ROWS)
        away = np.abs(before.vectors_at(old_rows[some]) - after.vectors_at(new_rows[some])).max(axis=1, initial=0.0)
        moved += int(np.count_nonzero(away))
        largest = max(largest, float(away.max(initial=0.0)))
    return moved, largest


def _changed_parts(before: Snapshot, after: Snapshot) -> list[str]:
    older, newer = before.manifest.files, after.manifest.files
    return sorted(name for name in {*before.parts, *after.parts} if older.get(name) != newer.get(name))
