"""What changed since the night, as a server sees it: followed from its start, written from the first change that is sent here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from index.durable import StoreBusy
from index.live import LiveIndex
from index.live_view import LiveView
from index.snapshot import Snapshot
from index.wal import LogBroken
from retrieval.catalog import Catalog
from retrieval.data.schema import Item
from retrieval.live_catalog import ItemTokens, LiveCatalog, LiveItems, PutItem, put_items

if TYPE_CHECKING:
    from retrieval.encoder import Encoder

log = logging.getLogger(__name__)


class Today:
    """The changes of one store over its snapshot. For one thread at a time.

    Of all servers of a store one writes: the first that is sent a change, until it ends. `shown` is the moment last looked at.
    """

    def __init__(self, snapshot: Snapshot, store: Path, encoder: Encoder, ranker: ItemTokens | None) -> None:
        """Raises LogDamaged, LogTrimmed, CatalogError."""
        self._snapshot, self._store, self._encoder, self._ranker = snapshot, store, encoder, ranker
        self._night = Catalog.open(snapshot)
        self._writes = False
        self.shown: tuple[LiveView, LiveCatalog]
        self._open(write=False)
        if self._live.view().stale:
            try:
                self._write()
            except (StoreBusy, LogBroken) as error:
                log.warning("items that another encoder's server took wait for the next night: %s", error)

    def now(self) -> tuple[LiveView, LiveCatalog]:
        """The present moment and its catalogue: all that was acknowledged here, and elsewhere up to a fraction of a second ago.

        Raises LogDamaged rather than show what may have been withdrawn.
        """
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
        return self._kept(live, lambda: live.upsert(ids, [one.to_bytes() for one in put], vectors, self._encoder.fingerprint))

    def withdraw(self, ids: Sequence[str]) -> tuple[int, int]:
        """The items are durably in no later moment; returns the log's position and how many were there. Raises as `upsert`."""
        live = self._write()
        here = int((self.now()[0].rows(ids) >= 0).sum())
        return self._kept(live, lambda: live.withdraw(ids)), here

    def close(self) -> None:
        """Another server may write. What was shown stays; a change that comes all the same makes this one the writer again."""
        self._live.close()
        self._writes = False

    def _open(self, *, write: bool) -> None:
        self._live = LiveIndex(self._snapshot, self._store, write=write)
        self._writes, self._items = write, LiveItems(self._ranker)
        view = self._live.view()
        self.shown = view, LiveCatalog(self._night, view, self._items)

    def _write(self) -> LiveIndex:
        """The log is this server's, and what other encoders' servers put in is read by this one's."""
        if not self._writes:
            follower = self._live
            self._open(write=True)
            follower.close()
            stale = [PutItem.parse(record) for record in self._live.view().stale.values()]
            for one in stale:
                put, vectors = put_items(self.now()[1], self._encoder, [one.item], one.at)
                self._live.upsert([one.item.item_id], [put[0].to_bytes()], vectors, self._encoder.fingerprint)
        return self._live

    def _kept(self, live: LiveIndex, change: Callable[[], int]) -> int:
        try:
            position = change()
            self.now()
            return position
        except LogBroken:
            # What is on the disk only reading it again can tell; the next change may find the disk mended.
            live.close()
            self._open(write=False)
            raise
