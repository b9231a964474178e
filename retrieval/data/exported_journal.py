"""The journal of what was served, as it lies on the disk: ids, numbers and names, never a word of a member, item or instruction.

    STORE/journal/2026-11-22-5f0c2a9be1d4.log     one file for each day (UTC) and process

One record a line: the CRC32 of the rest in 8 hexadecimal digits, a space, a JSON object. JSON holds no line feed, so damage costs
the lines that it touches and no other; a last line without its line feed is one that is being written, or was when its writer was
killed. Files are only ever added to.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval.data.refusals import Refusals
from retrieval.data.schema import DataError

JOURNAL_DIR, SUFFIX = "journal", ".log"
DIGITS = 8


@dataclass(frozen=True, slots=True)
class Shown:
    """One answer that was handed over at a time (seconds): `items` in their order, `probabilities` of each (none if unranked)."""

    at: int
    request: str
    member: str
    surface: str
    items: tuple[str, ...]
    probabilities: tuple[float, ...]
    task: str
    degraded: str
    snapshot: str
    encoder: str
    ranker: str


@dataclass(frozen=True, slots=True)
class Done:
    """One engagement that was acknowledged. `action` "" is the first that counts; `request` and `surface` "" are unknown."""

    member: str
    event: str
    item: str
    timestamp: int
    action: str
    label: int | None
    request: str
    surface: str


Record = Shown | Done
KINDS: dict[str, type[Shown] | type[Done]] = {"shown": Shown, "done": Done}


def encode_line(record: Record) -> bytes:
    """The record as one line, line feed included; `read_journal` reads it back."""
    kind = "shown" if isinstance(record, Shown) else "done"
    told = {"kind": kind, **{name: getattr(record, name) for name in record.__slots__}}
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def read_journal(folder: Path, refusals: Refusals) -> Iterator[Record]:
    """Every whole record of every file is yielded, file by file; each line that is none is in `refusals`, with its file.

    Raises DataError if the folder or a file of it cannot be read: a day left out would be a day on which nothing was shown.
    """
    try:
        for path in sorted(path for path in folder.iterdir() if path.suffix == SUFFIX):
            with path.open("rb") as file:
                for row, line in enumerate(file):
                    try:
                        yield _parsed(line)
                    except _NoRecord as error:
                        refusals.one(path.name, row, str(error), line[DIGITS + 1 :])
    except OSError as error:
        raise DataError(
            f"the journal {folder} cannot be read ({error}); run as the user of the servers, who alone may"
        ) from error


class _NoRecord(ValueError):
    """A line that is none of ours; the message is the reason."""


def _parsed(line: bytes) -> Record:
    if not line.endswith(b"\n"):
        raise _NoRecord("unfinished: being written, or its writer was killed")
    text = line[DIGITS + 1 : -1]
    if line[: DIGITS + 1] != b"%08x " % zlib.crc32(text):
        raise _NoRecord("damaged: the checksum does not fit")
    try:
        found = json.loads(text)
        kind = KINDS[found.pop("kind")]
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        return kind(**fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _NoRecord("no record that this version knows") from error
