"""The journal is written here: off the request's path, by one thread, into files of this process alone.

What waits is bounded in bytes. If more comes than the disk takes, or the disk refuses (it is full, or read-only), answers go on;
what could not be written is counted as lost, and a warning says so once a minute. Each batch is handed to the system at once, so
a kill of the process costs what still waited (milliseconds); a power cut costs at most the last `SYNC_S` seconds.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from index.durable import fsync_path
from retrieval.data.exported_journal import SUFFIX, Record, encode_line

MOST_BYTES = 16 << 20
SYNC_S, TELL_S = 1.0, 60.0
CLOSE_S = 10.0
AT_ONCE = 256
"""Records per write: what waits behind a burst is not held back until all of it is written out."""

Make = Callable[[], Iterable[Record]]

log = logging.getLogger(__name__)


class Journal:
    """The journal in one folder. `written` and `lost` count records; any thread may put."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES, clock: Callable[[], float] = time.time) -> None:
        """Nothing is begun before the first record: a folder that cannot be written is told of then, and answers go on."""
        self._file, self._clock, self._most = _DayFile(folder), clock, most_bytes
        self.written = self.lost = 0
        self._untold, self._why, self._told_at = 0, "", -TELL_S
        self._waiting: list[tuple[Make, int]] = []
        self._bytes = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, make: Make, size: int, count: int = 1) -> None:
        """What `make` will return (about `size` bytes, `count` records) is written soon, or counted as lost. Never waits."""
        with self._changed:
            why = self._begin(size)
            if why:
                self._lose(count, why)
            else:
                self._waiting.append((make, count))
                self._bytes += size
                self._changed.notify()
        if why:  # told from here too: the writer may hang in a write that never ends
            self._tell(at_once=False)

    def miss(self, why: str) -> None:
        """A record that could not even be put is counted as lost."""
        with self._changed:
            self._lose(1, why)
        self._tell(at_once=False)

    def close(self) -> None:
        """What waits is on the disk, or counted as lost; later records are lost."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def counts(self) -> dict[tuple[str, ...], float]:
        """Records by what became of them, for a meter."""
        return {("written",): self.written, ("lost",): self.lost}

    def _begin(self, size: int) -> str:
        """There is a writer, and room for so many bytes; returns why not, else ""."""
        if self._closing or self._bytes + size > self._most:
            return "more comes than the disk takes"
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="brewline-journal", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no room for one more; the next record tries again
                return str(error)
            self._thread = thread
        return ""

    def _run(self) -> None:
        closing = False
        while not closing:
            with self._changed:
                if not self._waiting and not self._closing:
                    self._changed.wait(SYNC_S if self._file.unsynced or self._untold else None)
                batch, self._waiting, self._bytes = self._waiting, [], 0
                closing = self._closing
            for start in range(0, max(len(batch), 1), AT_ONCE):
                self._write(batch[start : start + AT_ONCE])
            self._tell(at_once=closing)
        self._file.close()

    def _write(self, batch: list[tuple[Make, int]]) -> None:
        lines: list[bytes] = []
        for make, count in batch:
            try:
                lines += map(encode_line, make())
            except Exception as error:  # a bug in one record must not end the journal of all others
                log.exception("a record of the journal cannot be made")
                with self._changed:
                    self._lose(count, f"{type(error).__name__}")
        try:
            self._file.append(time.strftime("%Y-%m-%d", time.gmtime(self._clock())), b"".join(lines))
            self.written += len(lines)
        except OSError as error:
            with self._changed:
                self._lose(len(lines), error.strerror or str(error))
        self._file.sync_if_due()

    def _lose(self, count: int, why: str) -> None:
        self.lost += count
        self._untold += count
        self._why = why

    def _tell(self, *, at_once: bool) -> None:
        now = time.monotonic()
        with self._changed:
            if not self._untold or not (at_once or now - self._told_at >= TELL_S):
                return
            count, why, self._untold, self._told_at = self._untold, self._why, 0, now
        log.warning(
            "%d records of what was served are lost to the journal %s (%s); answers go on, --no-journal stops it",
            count,
            self._file.folder,
            why,
        )


class _DayFile:
    """The file of the day, of this process alone; a new day, or a line torn by an error, begins a new one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.unsynced = folder, False
        self._day, self._descriptor, self._size = "", -1, 0
        self._synced_at, self._told_at = 0.0, -TELL_S
        self._listed = False

    def append(self, day: str, lines: bytes) -> None:
        """The lines are the system's. Raises OSError; then none of them is in the file."""
        if not lines:
            return
        if day != self._day:
            self._open(day)
        try:
            left = memoryview(lines)
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            self._undo()
            raise
        self._size += len(lines)
        self.unsynced = True

    def sync_if_due(self) -> None:
        """What was appended is the disk's too, every `SYNC_S` seconds."""
        if self.unsynced and time.monotonic() - self._synced_at >= SYNC_S:
            self._synced_at = time.monotonic()
            self._sync()

    def close(self) -> None:
        """The file is on the disk, as far as the disk allows, and closed. Raises OSError; then it is given up all the same."""
        if self._day:
            self._sync()
            # Forgotten first: after a close that fails the number may be that of another file of this process.
            descriptor, self._day, self._descriptor = self._descriptor, "", -1
            os.close(descriptor)

    def _sync(self) -> None:
        """The file and its name are on the disk, or a warning says that they may not be: the lines are written all the same."""
        self.unsynced = False
        try:
            os.fsync(self._descriptor)
            if not self._listed:
                fsync_path(self.folder)
                self._listed = True
        except OSError as error:
            if time.monotonic() - self._told_at >= TELL_S:
                self._told_at = time.monotonic()
                log.warning("a power cut may cost the last lines of the journal %s: %s", self.folder, error.strerror)

    def _open(self, day: str) -> None:
        self.close()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.folder / f"{day}-{uuid.uuid4().hex[:12]}{SUFFIX}"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._day, self._size, self._listed = day, 0, False

    def _undo(self) -> None:
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError:  # its torn last line is recognised as one; what comes next must not be written behind it
            self.close()
