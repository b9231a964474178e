"""What a server is told to serve, looked at without reading it: to know of something new costs a few dozen stat calls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from index.errors import BrewlineError
from index.publish import current

if TYPE_CHECKING:
    from ranking.prefill.load import Arithmetic

Marks = tuple[tuple[str | int, ...], ...]


@dataclass(frozen=True)
class Source:
    """Where stacks come from: a store, folders or links to them, the address of the member store, how the ranker multiplies."""

    store: Path
    encoder: Path
    ranker: Path | None
    members: str
    hybrid: bool = False
    arithmetic: Arithmetic = "float32"


@dataclass(frozen=True)
class Seen:
    """One look at a source. Two looks are equal unless the pointer moved or a file was put in the place of another.

    `snapshot` is the name that the pointer has, or what is wrong with it; the others are the `marks` of folders.
    """

    snapshot: str
    files: Marks
    encoder: Marks
    ranker: Marks


def look(source: Source) -> Seen:
    """What there is now. Raises nothing for what is missing or damaged: opening it says so."""
    name, files = _pointer(source.store)
    return Seen(name, files, marks(source.encoder), () if source.ranker is None else marks(source.ranker))


def marks(folder: Path) -> Marks:
    """Name, device, inode, bytes and time (ns) of each file directly in a folder, links followed; empty if it cannot be read."""
    try:
        found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    except OSError:
        return ()
    return tuple((name, one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for name, one in found)


def changed(before: Seen, now: Seen) -> str:
    """What differs between two looks, in words."""
    parts = {
        f"the pointer names {now.snapshot or 'nothing'}": before.snapshot != now.snapshot,
        "files of the snapshot": before.snapshot == now.snapshot and before.files != now.files,
        "files of the encoder": before.encoder != now.encoder,
        "files of the ranker": before.ranker != now.ranker,
    }
    return ", ".join(words for words, differs in parts.items() if differs)


def _pointer(store: Path) -> tuple[str, Marks]:
    try:
        path = current(store)
    except (BrewlineError, OSError) as error:
        return str(error), ()
    return ("", ()) if path is None else (path.name, marks(path))
