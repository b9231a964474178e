"""The store as a night finds it: alone with it for a while, and the snapshot of the night before or what is wrong with that."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from index.durable import StoreBusy, exclusive, try_lock
from index.manifest import SnapshotError, SnapshotMismatch
from index.publish import CURRENT_FILE, HISTORY_FILE, NIGHT_LOCK, PublishError, current, list_snapshots
from index.snapshot import Snapshot
from retrieval.catalog import Catalog
from retrieval.hysteresis import Numbers, embedded_numbers
from retrieval.moments import NightError, moment_words
from retrieval.parts import CatalogError

UNREADABLE = "unreadable"
RETRY_S = 0.1
"""The garbage collector holds the night's lock for microseconds, to see whether a night works: so one is asked for twice."""

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """A snapshot whose every byte was read and found right, its catalogue, and the as-of numbers its vectors were made with."""

    snapshot: Snapshot
    catalog: Catalog
    numbers: Numbers


@dataclass(frozen=True)
class Yesterday:
    """The published snapshot as a night finds it: open, absent, or useless for the reason in `problem`.

    `name` is "" if nothing was published or the pointer itself cannot be followed. `parent` is what tonight's snapshot names as
    its parent.
    """

    name: str = ""
    parent: str = ""
    opened: Opened | None = None
    problem: str = ""

    @classmethod
    def open(cls, store_dir: Path, as_of: int, fingerprint: str, dims: int) -> Yesterday:
        """The published snapshot is open for a night of `as_of` (seconds), or one warning says why it cannot be used.

        Damage of any part (pointer, manifest, vectors, catalogue) raises nothing: a night must be able to replace it.
        """
        name = ""
        try:
            path = current(store_dir)
            if path is None:
                return cls()
            name = path.name
            opened = _open(path, fingerprint, dims)
        except (PublishError, SnapshotError, CatalogError, OSError) as error:
            log.warning(
                "the published snapshot is unreadable: every item is encoded anew, and the count of items has nothing to be "
                "compared with: %s",
                error,
            )
            # A useless one is a parent too: otherwise what replaces it could be given its name, and be taken for it.
            return cls(name, name, problem=str(error))
        before = opened.snapshot.manifest
        if before.as_of > as_of:
            log.warning(
                "this night is of %s, the published snapshot of %s: items and histories go back in time; is the clock right?",
                moment_words(as_of),
                moment_words(before.as_of),
            )
        # The same night run again has the same parent, and so the same name if it makes the same thing.
        return cls(name, before.parent if before.as_of == as_of else name, opened)

    @property
    def snapshot(self) -> Snapshot | None:
        """The snapshot, if it could be opened."""
        return None if self.opened is None else self.opened.snapshot

    @property
    def told(self) -> str:
        """Its name, "" if there is none, or "unreadable: " and what is wrong."""
        return f"{UNREADABLE}: {self.problem}" if self.problem else self.name


def _open(path: Path, fingerprint: str, dims: int) -> Opened:
    snapshot = Snapshot.open(path)
    facts = snapshot.manifest
    if facts.fingerprint == fingerprint and facts.dims != dims:
        raise SnapshotMismatch(
            f"snapshot {snapshot.name} holds vectors of {facts.dims} dims under encoder {fingerprint}, which makes {dims}"
        )
    catalog = Catalog.open(snapshot)
    return Opened(snapshot, catalog, embedded_numbers(snapshot, catalog))


def clear_pointers(store_dir: Path) -> None:
    """CURRENT and HISTORY can be followed or are absent; one that cannot is kept beside as FILE.unreadable, with a warning.

    For the moment before publishing, which follows both and would be stopped by them every night.
    """
    with exclusive(store_dir):
        for file, read in ((CURRENT_FILE, current), (HISTORY_FILE, list_snapshots)):
            try:
                read(store_dir)
            except PublishError as error:
                aside = (store_dir / file).replace(store_dir / f"{file}.{UNREADABLE}")
                log.warning("%s is now %s: %s", file, aside.name, error)


@contextmanager
def alone(store_dir: Path) -> Iterator[None]:
    """Inside the block no other night works on this store; the lock dies with its process. Raises StoreBusy, NightError."""
    lock = store_dir / NIGHT_LOCK
    try:
        store_dir.mkdir(parents=True, exist_ok=True)
        lock.touch()
        held = try_lock(lock)
        if held is None:
            time.sleep(RETRY_S)
            held = try_lock(lock)
    except OSError as error:
        raise NightError(f"store {store_dir} cannot be written: {error.strerror}; name a folder of your own") from error
    if held is None:
        raise StoreBusy(f"another night is working on store {store_dir} (it holds {NIGHT_LOCK}); run this one when it has ended")
    try:
        yield
    finally:
        os.close(held)
