"""Today's changes over last night's snapshot: durable before they are acknowledged, searched as if they had always been there.

    STORE/live/    the log (see index.wal): one process writes, any number follow it
    MANIFEST.json  of a snapshot says in `extra` up to which position of the log it holds the changes: `live_position`

One row space: rows 0..N-1 are the snapshot's, row N + i is the i-th item put in since. A row never changes: an item put in
again gets a new row, and its earlier ones vanish. Ties in score go to the lower row, as everywhere, so the answers are those of
an index over the snapshot's surviving rows followed by the live ones.

A night takes the changes with it: `fold` (index.changes) says what they are up to a position, the snapshot notes that position,
and once it is published `trim_folded` drops what no snapshot of the store needs any more. Whatever snapshot is opened, published,
killed half-way or rolled back to, the changes since its own position are laid over it: nothing acknowledged is lost at any point.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from index.changes import Changes, check_changes
from index.durable import exclusive
from index.live_view import LiveTable, LiveView
from index.manifest import Manifest, SnapshotMismatch, SnapshotTorn
from index.publish import current, list_snapshots
from index.shadow import Shadow
from index.snapshot import Snapshot, read_manifest, snapshots_dir
from index.wal import LogBroken, LogDamaged, LogReader, trim
from index.wal_writer import LogWriter, disk

LIVE_DIR, POSITION_FACT = "live", "live_position"
FOLLOW_S = 0.2
"""A follower looks for new changes this often when it is asked: a look costs microseconds, and a second is promised."""


class LiveIndex:
    """A snapshot with the changes since; `view()` is the present moment, to be kept for the length of a request.

    Any number of threads may read and write. `write=True` takes the log for this process alone until `close`.
    """

    def __init__(
        self, snapshot: Snapshot, store_dir: Path, *, write: bool = False, shadow: Shadow | None = None, wait_s: float = 10.0
    ) -> None:
        """`shadow` compares some answers of the views with the exact ones.

        Raises StoreBusy while another process writes, or keeps the store's LOCK for longer than `wait_s` seconds, LogDamaged,
        LogTrimmed (open the newer snapshot), LogBroken.
        """
        self._folder = store_dir / LIVE_DIR
        self._queue: list[tuple[bytes, Changes]] = []
        self._queued = self._done = 0
        self._queue_lock, self._lock = threading.RLock(), threading.Lock()
        self._reader: LogReader | None = None
        self._shadow, self.closed = shadow, False
        position = folded_position(snapshot.manifest, snapshot.name)
        self._writer = self._begin(snapshot.manifest, position, store_dir, wait_s) if write else None
        try:
            self._open(snapshot, position)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def view(self) -> LiveView:
        """The present moment is returned: all that this process acknowledged, and what was on the disk FOLLOW_S ago.

        A follower raises LogDamaged when it cannot tell what changed: an answer without the changes may show what was withdrawn.
        One that was closed raises RuntimeError.
        """
        self._require_open()
        if self._writer is None and time.monotonic() - self._looked >= FOLLOW_S:
            with self._lock:
                self._catch_up()
        return self._table.view

    def upsert(self, ids: Sequence[str], records: Sequence[bytes], vectors: npt.NDArray[Any], fingerprint: str) -> int:
        """These items, with their opaque records and unit vectors float32 [n, D], are durable and in every later view.

        They replace what had the same ids. The log's position is returned. All of them or none: raises ChangeRefused, and
        SnapshotMismatch for vectors of another encoder than the snapshot's, LogBroken when the disk refuses.
        """
        dims = self._table.view.snapshot.manifest.dims
        return self._write(check_changes(ids, records, vectors, (), dims), fingerprint)

    def withdraw(self, ids: Sequence[str]) -> int:
        """These ids are durably gone from every later view; one that was not there is remembered too. The position is returned.

        All of them or none: raises ChangeRefused, LogBroken.
        """
        return self._write(check_changes((), (), np.zeros((0, 1), np.float32), ids, 1), None)

    def move_to(self, snapshot: Snapshot) -> None:
        """The changes lie over this newer snapshot from now on; views taken before keep theirs. Raises as opening does."""
        with self._lock, self._queue_lock:
            if self._writer is not None and self._queue:
                self._commit(self._writer)
            self._open(snapshot, folded_position(snapshot.manifest, snapshot.name))
            if self._writer is not None:
                self._writer.change_facts(_facts(snapshot.manifest))

    def take_over(self, other: LiveIndex) -> None:
        """What `other` shows is in every later view; if `other` writes the log, this one does from now on, and `other` follows.

        For two of one store in this process, so that no other process can take the log in between. Raises LogDamaged, also when
        the log ends before this snapshot's position; nothing has changed then.
        """
        with other._lock, other._queue_lock, self._lock, self._queue_lock:
            writer = other._writer
            if writer is not None and other._queue:
                other._commit(writer)
            self._catch_up()
            if writer is None:
                return
            if writer.position < self._table.view.position:
                raise LogDamaged(
                    f"{self._folder} ends with change {writer.position}, snapshot {self._table.view.snapshot.name} with the log "
                    f"over it holds all up to {self._table.view.position}: restore the log, or publish a new night"
                )
            self._writer, other._writer = writer, None
            writer.change_facts(_facts(self._table.view.snapshot.manifest))
            if other._reader is not None:  # it has not moved since the writer's own changes went straight into the table
                other._reader.close()
            other._reader = LogReader(other._folder, other._table.view.position)

    def close(self) -> None:
        """The log may be written by another process. Earlier views stay usable, there are no later ones. Twice is harmless."""
        self.closed, writer, self._writer = True, self._writer, None
        if writer is not None:
            writer.close()
        if self._reader is not None:
            self._reader.close()

    def _require_open(self) -> None:
        if self.closed:
            raise RuntimeError("this LiveIndex was closed, and nobody tells it what changes: open another one")

    def _begin(self, manifest: Manifest, position: int, store_dir: Path, wait_s: float) -> LogWriter:
        with disk(store_dir), exclusive(store_dir, wait_s):  # no snapshot is collected meanwhile
            newest = max([position, *_folded_positions(store_dir)])
        return LogWriter(self._folder, _facts(manifest), position, newest=newest)

    def _open(self, snapshot: Snapshot, position: int) -> None:
        began = time.monotonic()  # what is written while this reads may be missed: the next look is due FOLLOW_S after here
        table, reader = LiveTable(snapshot, position, self._shadow), LogReader(self._folder, position)
        with closing(reader):
            table.take(_batches(reader))
        if self._reader is not None:
            self._reader.close()
        self._table, self._reader, self._looked = table, reader, began

    def _catch_up(self) -> None:
        assert self._reader is not None
        began = time.monotonic()
        try:
            self._table.take(_batches(self._reader))
        except BaseException:
            # What was read before the error is not in the table yet: the next look begins behind what is.
            self._reader.close()
            self._reader = LogReader(self._folder, self._table.view.position)
            raise
        self._looked = began

    def _write(self, changes: Changes, fingerprint: str | None) -> int:
        """Group commit: whoever gets the lock writes for all who wait for it, with one fsync."""
        self._require_open()
        if self._writer is None:
            raise RuntimeError("this LiveIndex follows a log that another process writes: open it with write=True")
        payload = changes.to_bytes()
        with self._queue_lock:
            ours = self._table.view.snapshot.manifest.fingerprint
            if fingerprint not in (None, ours):
                raise SnapshotMismatch(f"vectors of encoder {fingerprint} are put into an index of encoder {ours}: load that one")
            self._queue.append((payload, changes))
            self._queued += 1
            ticket = self._queued
        with self._lock:
            if self._done < ticket and self._writer is not None:
                self._commit(self._writer)
            if self._done < ticket:
                raise LogBroken(f"{self._folder}: a change was not written with those that waited with it; send it again")
            return self._table.view.position

    def _commit(self, writer: LogWriter) -> None:
        """All who wait are on the disk and in the table. After any error the log takes no more, and none of them is told so."""
        try:
            with self._queue_lock:
                waiting, self._queue = self._queue, []
            last = writer.append([payload for payload, _ in waiting])
            first, ours = last - len(waiting) + 1, self._table.view.snapshot.manifest.fingerprint
            self._table.take([(first + place, ours, changes) for place, (_, changes) in enumerate(waiting)])
            self._done += len(waiting)
        except BaseException as error:
            writer.give_up(f"a change failed: {error!r}")
            raise


def folded_position(manifest: Manifest, name: str) -> int:
    """The position of the log up to which a snapshot holds the changes is returned, 0 if it says nothing. Raises SnapshotTorn."""
    text = manifest.extra.get(POSITION_FACT, "0")
    if not (text.isascii() and text.isdecimal()):
        raise SnapshotTorn(f"snapshot {name}: MANIFEST.json says {POSITION_FACT}={text!r}, expected a number; build it again")
    return int(text)


def trim_folded(store_dir: Path) -> int:
    """Of the log only what some whole snapshot of the store lacks is left, in whole segments; how many went is returned.

    For the end of a night, after the publishing and the collector. Nothing goes before anything was published.
    """
    positions = _folded_positions(store_dir)
    if current(store_dir) is None or not positions:
        return 0
    return trim(store_dir / LIVE_DIR, min(positions))


def _folded_positions(store_dir: Path) -> list[int]:
    names = [info.name for info in list_snapshots(store_dir) if not info.problem]
    return [folded_position(read_manifest(snapshots_dir(store_dir) / name), name) for name in names]


def _facts(manifest: Manifest) -> dict[str, str | int]:
    return {"fingerprint": manifest.fingerprint, "dims": manifest.dims}


def _batches(reader: LogReader) -> list[tuple[int, str, Changes]]:
    return [(entry.position, str(entry.facts["fingerprint"]), Changes.parse(entry.payload)) for entry in reader.read()]
