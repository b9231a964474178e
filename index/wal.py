"""A write-ahead log: records numbered without gaps, on the disk before anybody is told so, cut only where a crash tore them.

    FOLDER/LOCK                          held by the one writer, as long as it lives
    FOLDER/00000000000000000017.log      a segment, named by the position of its first record
      header   magic, format u32, length u32, CRC32 of the facts, CRC32 of these 20 bytes    then the facts (JSON)
      record   length u32, position u64, CRC32 of the payload, CRC32 of these 16 bytes       then the payload, ending in \\n

A record at the end of the last segment whose last bytes are missing, or zeros (the file system made room and never filled it),
was torn by a crash and never acknowledged: the next writer cuts it off. That is why a record ends in a byte that is not zero.
Anything else that does not check is damage and stops everybody: cutting there could drop what was acknowledged.

Bytes of a segment are only ever added. A writer that wants others puts a new file in the place of the old one, and a reader looks
whether its file is still the one of that name. A log that was begun anew while an older snapshot is served numbers its changes
behind those of every snapshot; the `since` of its first facts is from where on that older snapshot is meant to read it.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from index.durable import fsync_path
from index.errors import BrewlineError

SUFFIX, LOCK_FILE, SINCE_FACT = ".log", "LOCK", "since"
MAX_PAYLOAD = 64 << 20
_MAGIC, _FORMAT = b"BREWLOG", b"1"
_HEADER, _RECORD = struct.Struct("<8sIII"), struct.Struct("<IQII")
_END = b"\n"

Facts = Mapping[str, str | int]


class LogError(BrewlineError):
    """The log of today's changes cannot be read or written."""


class LogDamaged(LogError):
    """A record that was on the disk is not what was written."""


class LogTrimmed(LogError):
    """Changes are asked for that were folded into a newer snapshot, and left the log."""


class LogBroken(LogError):
    """Writing failed. What was not acknowledged may or may not be there; nothing more is taken until the log is opened anew."""


class Entry(NamedTuple):
    """One record: its position (the first of a log is 1), the facts of its segment, its payload."""

    position: int
    facts: Facts
    payload: bytes


@dataclass(slots=True)
class Segment:
    """An open segment, read up to `offset`; `position` is that of the next record."""

    path: Path
    file: FileIO
    facts: Facts
    offset: int
    position: int

    @property
    def first(self) -> int:
        """The position of its first record."""
        return int(self.path.stem)


class LogReader:
    """Reads the records after `position`, and at each further call those written since, whoever writes them."""

    def __init__(self, folder: Path, after: int) -> None:
        self._folder, self.position = folder, after
        self.segment: Segment | None = None

    def read(self) -> Iterator[Entry]:
        """Every whole record after the last one read is yielded; one that is being written is left for the next call.

        Raises LogDamaged, which names the segment and the offset, and LogTrimmed.
        """
        self.segment = self.segment or self._first()
        while self.segment is not None:
            entry = _next(self.segment, sealed=False)
            if entry is None:
                later = [found for found in segments(self._folder) if found[0] > self.segment.first]
                if self._replaced():
                    self.close()
                    self.segment = self._first()
                    continue
                if not later:
                    return
                # Read again: since the next segment exists this one holds all that it will ever hold, and all of it whole.
                entry = _next(self.segment, sealed=True)
                if entry is None and not self._move_on(*later[0]):
                    return
            if entry is not None and entry.position > self.position:
                self.position = entry.position
                yield entry

    def _replaced(self) -> bool:
        """Whether the open file is not the segment any more: a writer that began wrote it anew, or it was trimmed."""
        assert self.segment is not None
        try:
            return not os.path.samestat(os.fstat(self.segment.file.fileno()), self.segment.path.stat())
        except FileNotFoundError:
            return True

    def _move_on(self, first: int, path: Path) -> bool:
        """The next segment is the open one, unless it is still being made."""
        assert self.segment is not None
        if first != self.segment.position:
            raise self._trimmed(first)
        try:
            opened = _open(path)
        except FileNotFoundError:  # trimmed since it was listed; the next look says so
            return False
        if opened is not None:
            self.close()
            self.segment = opened
        return opened is not None

    def close(self) -> None:
        """The open segment is closed; reading again finds its place by the position."""
        if self.segment is not None:
            self.segment.file.close()
            self.segment = None

    def _first(self) -> Segment | None:
        found = segments(self._folder)
        if not found:
            return None
        first, path = next((one for one in reversed(found) if one[0] <= self.position + 1), found[0])
        try:
            opened = _open(path)
        except FileNotFoundError:  # trimmed since it was listed
            return self._first()
        if first > self.position + 1 and (opened is None or int(opened.facts.get(SINCE_FACT, first)) > self.position):
            if opened is not None:
                opened.file.close()
            raise self._trimmed(first)
        return opened

    def _trimmed(self, first: int) -> LogTrimmed:
        return LogTrimmed(
            f"{self._folder} goes on with change {first}, those after {self.position} are asked for: they were folded into a "
            "newer snapshot; open that one"
        )


def segment_path(folder: Path, position: int) -> Path:
    """The file of the segment whose first record is at `position` is returned; it need not exist."""
    return folder / f"{position:020d}{SUFFIX}"


def segments(folder: Path) -> list[tuple[int, Path]]:
    """First position and file of every segment are returned, oldest first."""
    found = [path for path in folder.glob(f"*{SUFFIX}") if len(path.stem) == 20 and path.stem.isdecimal()]
    return sorted((int(path.stem), path) for path in found)


def trim(folder: Path, position: int) -> int:
    """Segments that hold no record after `position` are gone, but never the last one; how many went is returned."""
    found = segments(folder)
    spare = [path for (_, path), (following, _) in pairwise(found) if following <= position + 1]
    for path in spare:
        path.unlink(missing_ok=True)
    if spare:
        fsync_path(folder)
    return len(spare)


def framed(position: int, payload: bytes) -> bytes:
    """A record is returned as it stands in a segment."""
    content = payload + _END
    return _sealed(struct.pack("<IQI", len(content), position, zlib.crc32(content))) + content


def header(facts: Facts) -> bytes:
    """What a segment begins with is returned."""
    written = json.dumps(facts, sort_keys=True).encode()
    return _sealed(struct.pack("<8sII", _MAGIC + _FORMAT, len(written), zlib.crc32(written))) + written


def _sealed(head: bytes) -> bytes:
    return head + zlib.crc32(head).to_bytes(4, "little")


def _open(path: Path) -> Segment | None:
    """The segment is open at its first record; None while its header is not whole: it was torn."""
    segment = Segment(path, path.open("rb", buffering=0), {}, 0, int(path.stem))
    seen = _look(segment, _HEADER, 1)
    if seen.fields and seen.fields[0] == _MAGIC + _FORMAT:
        segment.facts, segment.offset = json.loads(seen.content), seen.end
        return segment
    segment.file.close()
    if seen.torn or seen.empty:
        return None
    raise _damage(segment, f"the segment does not begin as one of format {_FORMAT.decode()} does")


def _next(segment: Segment, sealed: bool) -> Entry | None:
    """The next record is returned, None while there is none or it is torn. In a sealed segment torn is damaged."""
    seen = _look(segment, _RECORD, 0)
    if seen.empty or (seen.torn and not sealed):
        return None
    if not seen.fields or seen.fields[1] != segment.position:
        raise _damage(segment, f"change {segment.position} is not what was written")
    entry = Entry(segment.position, segment.facts, seen.content.removesuffix(_END))
    segment.offset, segment.position = seen.end, segment.position + 1
    return entry


class _Seen(NamedTuple):
    """What stands at an offset: the fields of a head and its content, both as written, or none; and where they end."""

    fields: tuple[Any, ...]
    content: bytes
    end: int
    empty: bool = False
    torn: bool = False


def _look(segment: Segment, head: struct.Struct, length_at: int) -> _Seen:
    """What follows what was read is returned; torn is what ends, but for zeros, before it is over."""
    descriptor, start = segment.file.fileno(), segment.offset
    first = os.pread(descriptor, head.size, start)
    length = head.unpack(first)[length_at] if _intact(first, head.size) else 0
    seen = _parse(first + os.pread(descriptor, length, start + head.size), start, head, length_at)
    if seen.fields or not first:
        return seen._replace(empty=not first)
    # The writer may have been in the midst of it, and be done by now: whether it is whole or torn is judged from one look.
    tail = os.pread(descriptor, 2 * MAX_PAYLOAD, start)
    seen = _parse(tail, start, head, length_at)
    return seen._replace(torn=not seen.fields and start + len(tail.rstrip(b"\0")) < seen.end)


def _parse(content: bytes, start: int, head: struct.Struct, length_at: int) -> _Seen:
    if not _intact(content[: head.size], head.size):
        return _Seen((), b"", start + head.size)
    fields = head.unpack_from(content)
    length, crc = fields[length_at], fields[2]
    found = content[head.size : head.size + length]
    good = len(found) == length and zlib.crc32(found) == crc
    return _Seen(fields if good else (), found, start + head.size + length)


def _intact(head: bytes, size: int) -> bool:
    return len(head) == size and head == _sealed(head[:-4])


def _damage(segment: Segment, what: str) -> LogDamaged:
    return LogDamaged(
        f"{segment.path}, offset {segment.offset}: {what}; acknowledged changes may lie behind it. Restore the file, or end "
        "every server of the store, move the log away and send the changes since the last snapshot again"
    )
