"""The items of a folder as the servers of a store know them now: those put in by day are in, those withdrawn are out.

Whoever continues a folder's log moves its cut, and a night believes the folder about everything before that. So the folder must
have learnt by then what was changed by day.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from index.changes import Folded, fold
from index.live import LIVE_DIR, folded_position
from index.publish import current
from index.snapshot import Snapshot
from retrieval.data.schema import Dataset
from retrieval.moments import NightError
from retrieval.taken_over import CHANGES_PART, TakenOver, cut_of
from retrieval.tonight import take_items


def with_changes(store_dir: Path, base: Dataset, now: int) -> tuple[Dataset, int, int]:
    """The folder with what its cut cannot know of the store's changes; also how many items were put in and how many withdrawn.

    A withdrawn item takes its events along: no folder holds events of an item that it lacks. Raises NightError for a store in
    which nothing was published, SnapshotError, LogDamaged.
    """
    path = current(store_dir)
    if path is None:
        raise NightError(f"{store_dir} has no published snapshot; name the store that `brewline serve --store` serves")
    snapshot = Snapshot.open(path)
    before = TakenOver(Folded(folded_position(snapshot.manifest, snapshot.name)))
    if CHANGES_PART in snapshot.parts:
        before = TakenOver.parse(snapshot.part(CHANGES_PART).read_bytes())
    known = before.then(fold(store_dir / LIVE_DIR, before.folded.position), now)
    grown, put, gone = known.winning(cut_of(base, now)).over(base)
    return without(grown, gone), len(put), len(gone)


def without(dataset: Dataset, gone: npt.NDArray[np.int64]) -> Dataset:
    """The data set without the items in these rows and without their events."""
    if not len(gone):
        return dataset
    keep = np.ones(len(dataset.items), bool)
    keep[gone] = False
    events = dataset.events.take(keep[dataset.events.item])
    moved = (np.cumsum(keep) - 1).astype(np.int32)
    items = take_items(dataset.items, np.flatnonzero(keep))
    return replace(dataset, items=items, events=replace(events, item=moved[events.item]))
