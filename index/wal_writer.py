"""The writing end of the log of changes: one writer, an acknowledgement only after the disk has it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from io import FileIO
from pathlib import Path

from index.durable import StoreBusy, fsync_path, try_lock, write_durably
from index.wal import LOCK_FILE, SINCE_FACT, Facts, LogBroken, LogDamaged, LogReader, framed, header, segment_path, segments

SEGMENT_BYTES = 8 << 20
"""A full segment is followed by a new one; only whole segments are trimmed, so about so much stays of what was folded in."""

log = logging.getLogger(__name__)


class LogWriter:
    """The one writer of a log, for as long as it is open. `position` is that of the last record."""

    def __init__(
        self, folder: Path, facts: Facts, after: int = 0, segment_bytes: int | None = None, *, newest: int | None = None
    ) -> None:
        """A torn tail is cut off, and all that was read of the last segment is on the disk.

        `after` is the last position that the snapshot holds to which changes are written, `newest` (default: that) the last
        that any snapshot of the store does. An empty log begins behind `newest`: no position may mean two changes.
        Raises StoreBusy while another process writes, LogDamaged (also when the log ends before `newest`), LogBroken.
        """
        self._folder, self._facts, self._segment_bytes = folder, dict(facts), segment_bytes or SEGMENT_BYTES
        self._broken, self.position, self._size = "", max(after, newest or 0), 0
        self._first_facts: Facts = {SINCE_FACT: after} if self.position > after else {}
        self._file: FileIO | None = None
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            fsync_path(folder.parent)
            (folder / LOCK_FILE).touch()
            lock = try_lock(folder / LOCK_FILE)
        if lock is None:
            raise StoreBusy(f"{folder} is being written by another process: one server takes changes, the others follow it")
        self._lock = lock
        try:
            with disk(folder):
                self._continue()
        except BaseException:
            os.close(lock)
            raise

    def append(self, payloads: Sequence[bytes]) -> int:
        """All the payloads are on the disk, in this order, and the position of the last is returned. One fsync for all.

        Raises LogBroken when the disk refuses. After any error none of them is acknowledged, and the log takes no more.
        """
        if self._broken:
            raise LogBroken(f"{self._folder} takes no more changes ({self._broken}): open it anew by starting the server again")
        if not payloads:
            raise ValueError("nothing is appended: expected at least one payload")
        try:
            content = b"".join(framed(self.position + place, one) for place, one in enumerate(payloads, 1))
            if self._file is None or self._size >= self._segment_bytes:
                self._file = self._new_segment(content)
            else:
                _write(self._file, content)
                self._size += len(content)
        except OSError as error:
            # What a failed fsync leaves on the disk is unknown: a second one may claim success, and reading shows what the
            # memory holds. Opening anew writes what can be read to a new file.
            self.give_up(f"writing failed: {error.strerror or error}")
            raise LogBroken(f"{self._folder}: {self._broken}; the changes were not taken") from error
        except BaseException as error:
            self.give_up(f"writing failed: {error!r}")
            raise
        self.position += len(payloads)
        return self.position

    def give_up(self, why: str) -> None:
        """The log takes no more until it is opened anew; the first reason is kept."""
        self._broken = self._broken or why

    def change_facts(self, facts: Facts) -> None:
        """Records appended from now on stand under these facts, in a segment of their own."""
        if self._facts != facts:
            self._facts = dict(facts)
            if self._file is not None:
                self._file.close()
                self._file = None

    def close(self) -> None:
        """Another process may write now. Closing twice is harmless."""
        if self._lock >= 0:
            if self._file is not None:
                self._file.close()
            os.close(self._lock)
            self._lock, self._broken = -1, "it was closed"

    def _continue(self) -> None:
        """The last segment is open for appending, without its torn tail, if its facts are ours."""
        for left in self._folder.glob(".*.new"):  # of a writer that was killed
            left.unlink()
        found = segments(self._folder)
        if not found:
            return
        newest, (first, path) = self.position, found[-1]
        self.position, self._first_facts = first - 1, {}
        with closing(LogReader(self._folder, self.position)) as reader:
            for entry in reader.read():
                self.position = entry.position
            segment = reader.segment
            content = b"" if segment is None else os.pread(segment.file.fileno(), segment.offset, 0)
        if self.position < newest:
            raise LogDamaged(
                f"{self._folder} ends with change {self.position}, a snapshot holds all up to {newest}: the log is an old copy; "
                "move it away and open again"
            )
        torn = path.stat().st_size - len(content)
        if torn:
            log.warning("%s: %d bytes of a change that was never acknowledged are cut off", path, torn)
        # Written anew though it reads well: after a failed fsync of the writer before, it may be in the memory alone.
        write_durably(path, content)
        self._size = len(content)
        if segment is not None and segment.facts == self._facts:
            self._file = path.open("ab", buffering=0)

    def _new_segment(self, content: bytes) -> FileIO:
        """A new segment with these records is on the disk, and open for more."""
        if self._file is not None:
            self._file.close()
        content = header({**self._facts, **self._first_facts}) + content
        path = segment_path(self._folder, self.position + 1)
        write_durably(path, content)  # one without records may be there, of another encoder, and be held by a reader
        self._size, self._first_facts = len(content), {}
        return path.open("ab", buffering=0)


def _write(file: FileIO, content: bytes) -> None:
    """Unbuffered, so that a failure leaves nothing behind that closing the file would write later."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """A full disk or a missing right becomes LogBroken."""
    try:
        yield
    except OSError as error:
        raise LogBroken(f"{folder} cannot be written: {error.strerror or error}") from error
