"""The writing end of the log of changes: one writer, an acknowledgement only after the disk has it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from io import FileIO
from pathlib import Path

from index.durable import StoreBusy, fsync_path, try_lock
from index.wal import LOCK_FILE, Facts, LogBroken, LogDamaged, LogReader, framed, header, segment_path, segments

SEGMENT_BYTES = 8 << 20
"""A full segment is followed by a new one; only whole segments are trimmed, so about so much stays of what was folded in."""

log = logging.getLogger(__name__)


class LogWriter:
    """The one writer of a log, for as long as it is open. `position` is that of the last record, `after` if there is none."""

    def __init__(self, folder: Path, facts: Facts, after: int = 0, segment_bytes: int | None = None) -> None:
        """A torn tail is cut off. `after` is the last position that a snapshot holds: an empty log begins behind it.

        Raises StoreBusy while another process writes, LogDamaged (also when the log ends before `after`), LogBroken.
        """
        self._folder, self._facts, self._segment_bytes = folder, dict(facts), segment_bytes or SEGMENT_BYTES
        self._broken, self.position, self._size = "", after, 0
        self._file: FileIO | None = None
        with _disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            fsync_path(folder.parent)
            (folder / LOCK_FILE).touch()
            lock = try_lock(folder / LOCK_FILE)
        if lock is None:
            raise StoreBusy(f"{folder} is being written by another process: one server takes changes, the others follow it")
        self._lock = lock
        try:
            with _disk(folder):
                self._continue(after)
        except BaseException:
            os.close(lock)
            raise

    def append(self, payloads: Sequence[bytes]) -> int:
        """All the payloads are on the disk, in this order, and the position of the last is returned. One fsync for all.

        Raises LogBroken when the disk refuses: none of them is acknowledged, and the log takes no more.
        """
        if self._broken:
            raise LogBroken(f"{self._folder} takes no more changes ({self._broken}): open it anew by starting the server again")
        try:
            if self._file is None or self._size >= self._segment_bytes:
                self._file = self._new_segment()
            content = b"".join(framed(self.position + place, one) for place, one in enumerate(payloads, 1))
            _write(self._file, content)
        except OSError as error:
            # What a failed fsync leaves on the disk is unknown, and a second one may claim success: only reading it again tells.
            self._broken = f"writing failed: {error.strerror or error}"
            raise LogBroken(f"{self._folder}: {self._broken}; the changes were not taken") from error
        self._size += len(content)
        self.position += len(payloads)
        return self.position

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

    def _continue(self, after: int) -> None:
        """The last segment is open for appending, without its torn tail, if its facts are ours."""
        found = segments(self._folder)
        if not found:
            return
        first, path = found[-1]
        self.position = first - 1
        with closing(LogReader(self._folder, self.position)) as reader:
            for entry in reader.read():
                self.position = entry.position
            segment = reader.segment
        if self.position < after:
            raise LogDamaged(
                f"{self._folder} ends with change {self.position}, the snapshot holds all up to {after}: the log is an old copy; "
                "move it away and open again"
            )
        self._size = 0 if segment is None else segment.offset
        torn = path.stat().st_size - self._size
        if torn:
            log.warning("%s: %d bytes of a change that was never acknowledged are cut off", path, torn)
            os.truncate(path, self._size)
            fsync_path(path)
        if segment is not None and segment.facts == self._facts:
            self._file = path.open("ab", buffering=0)

    def _new_segment(self) -> FileIO:
        if self._file is not None:
            self._file.close()
        content = header(self._facts)
        path = segment_path(self._folder, self.position + 1)
        file = path.open("wb", buffering=0)  # one without records may be there, of another encoder
        _write(file, content)
        fsync_path(self._folder)
        self._size = len(content)
        return file


def _write(file: FileIO, content: bytes) -> None:
    """Unbuffered, so that a failure leaves nothing behind that closing the file would write later."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LogBroken(f"{folder} cannot be written: {error.strerror or error}") from error
