"""What changed since the night, as a server sees it: followed from its start, written from the first change that is sent here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from index.durable import StoreBusy
from index.live import LiveIndex
from index.live_view import LiveView
from index.shadow import Shadow
from index.snapshot import Snapshot
from index.wal import LogBroken
from retrieval.catalog import Catalog
from retrieval.data.schema import Item
from retrieval.live_catalog import ItemTokens, LiveCatalog, LiveItems, PutItem, put_items

if TYPE_CHECKING:
    from retrieval.encoder import Encoder

TOGETHER = 32
"""Items that are put in again with one write; so many of the largest still fit into one."""

LOCK_S = 0.2
"""Who collects snapshots holds the store's LOCK; the thread that answers waits no longer to become the writer."""

log = logging.getLogger(__name__)


class Today:
    """The changes of one store over its snapshot. For one thread at a time.

    Of all servers of a store one writes: the first that is sent a change, until it ends. `shown` is the moment last looked at.
    """

    def __init__(
        self, snapshot: Snapshot, store: Path, encoder: Encoder, ranker: ItemTokens | None, shadow: Shadow | None = None
    ) -> None:
        """Follows; `read_anew` or `take_over` is to come. `shadow` compares some answers with the exact ones.

        Raises LogDamaged, LogTrimmed, CatalogError.
        """
        self._snapshot, self._store, self._encoder, self._ranker, self._shadow = snapshot, store, encoder, ranker, shadow
        self._night = Catalog.open(snapshot)
        self._writes = False
        self._made: dict[bytes, tuple[PutItem, npt.NDArray[np.float32]]] = {}
        self.shown: tuple[LiveView, LiveCatalog]
        self._open(write=False)

    def prepare(self) -> None:
        """Items that another encoder's server took are read by this one's, and `read_anew` need not. Raises CatalogError."""
        self._made = {record: self._anew(record) for record in self._live.view().stale.values()}

    def read_anew(self) -> None:
        """Items that another encoder's server took have a vector of this one's, or wait while another server writes."""
        if not self._live.view().stale:
            return
        try:
            live = self._write()
            stale = list(live.view().stale.values())
            for start in range(0, len(stale), TOGETHER):
                made = [self._made.get(record) or self._anew(record) for record in stale[start : start + TOGETHER]]
                ids, records = [put.item.item_id for put, _ in made], [put.to_bytes() for put, _ in made]
                live.upsert(ids, records, np.stack([vector for _, vector in made]), self._encoder.fingerprint)
        except (StoreBusy, LogBroken) as error:
            log.warning("items that another encoder's server took wait for the next night: %s", error)
        finally:
            self._made = {}

    def take_over(self, before: Today) -> None:
        """All that `before` showed is in every later moment, and if it wrote the log, this one does. Raises LogDamaged.

        For the thread that calls `before`: nothing may be changed by that one afterwards.
        """
        self._live.take_over(before._live)
        self._writes, before._writes = before._writes, False
        self.read_anew()
        self.now()

    def now(self) -> tuple[LiveView, LiveCatalog]:
        """The present moment and its catalogue: all that was acknowledged here, and elsewhere up to a fraction of a second ago.

        Raises LogDamaged, LogTrimmed rather than show what may have been withdrawn.
        """
        if self._live.closed:  # reading the log again after a change that failed failed too
            self._open(write=False)
        view = self._live.view()
        if view is not self.shown[0]:
            self.shown = view, LiveCatalog(self._night, view, self._items)
        return self.shown

    def upsert(self, items: Sequence[Item], at: int) -> int:
        """The items, put in at a time (seconds), are on the disk and in every later moment; returns the log's position.

        Raises StoreBusy while another server writes, ChangeRefused, LogBroken, LogDamaged.
        """
        live = self._write()
        put, vectors = put_items(self.now()[1], self._encoder, items, at)
        ids = [item.item_id for item in items]
        return self._kept(lambda: live.upsert(ids, [one.to_bytes() for one in put], vectors, self._encoder.fingerprint))

    def withdraw(self, ids: Sequence[str]) -> tuple[int, int]:
        """The items are durably in no later moment; returns the log's position and how many were there. Raises as `upsert`."""
        live = self._write()
        here = int((self.now()[0].rows(ids) >= 0).sum())
        return self._kept(lambda: live.withdraw(ids)), here

    def close(self) -> None:
        """Another server may write. What was shown stays; asked or told all the same, this one follows or writes again."""
        self._live.close()
        self._writes = False

    def _open(self, *, write: bool) -> None:
        self._live = LiveIndex(self._snapshot, self._store, write=write, shadow=self._shadow, wait_s=LOCK_S)
        self._writes, self._items = write, LiveItems(self._ranker)
        view = self._live.view()
        self.shown = view, LiveCatalog(self._night, view, self._items)

    def _write(self) -> LiveIndex:
        """The log is this server's, and what other encoders' servers put in is read by this one's."""
        if not self._writes:
            follower = self._live
            self._open(write=True)
            follower.close()
            self.read_anew()
        return self._live

    def _anew(self, record: bytes) -> tuple[PutItem, npt.NDArray[np.float32]]:
        one = PutItem.parse(record)
        put, vectors = put_items(self.now()[1], self._encoder, [one.item], one.at)
        return put[0], vectors[0]

    def _kept(self, change: Callable[[], int]) -> int:
        try:
            position = change()
            self.now()
            return position
        except LogBroken:
            # What is on the disk only reading it again can tell; the next change may find the disk mended.
            self.close()
            self._open(write=False)
            raise
