"""Which snapshot is served: a one-line pointer, swapped by a rename, with the way back remembered.

    STORE/CURRENT   the name of the served snapshot; the only truth
    STORE/HISTORY   the names served before it, oldest first; the last one is where `rollback` goes
    STORE/LOCK      held while either changes
    STORE/NIGHT     held by a night from beginning to end

A crash between the two files leaves the current name at the end of HISTORY; every reader drops it there.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from index.durable import exclusive, try_lock, write_durably
from index.errors import BrewlineError
from index.manifest import NAME_PATTERN, SnapshotError, SnapshotNotFound
from index.snapshot import RUN_FILE, Snapshot, read_manifest, snapshots_dir
from index.writer import PARTIAL_PREFIX, TRASH_PREFIX

CURRENT_FILE, HISTORY_FILE, NIGHT_LOCK = "CURRENT", "HISTORY", "NIGHT"


class PublishError(BrewlineError):
    """The pointer to the served snapshot cannot be read or moved."""


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """One folder of the store. `problem` is empty, or says why the snapshot cannot be used (the facts are then 0).

    `in_line`: it is served, or stands in the line of those that were served before it. One that does not was refused by a
    gate or rolled back, belongs to a night that has not published yet, or the line was lost.
    """

    name: str
    current: bool
    rollback: bool
    count: int = 0
    dims: int = 0
    as_of: int = 0
    bytes: int = 0
    fingerprint: str = ""
    written_at: float = 0.0
    problem: str = ""
    in_line: bool = False


def publish(store_dir: Path, name: str) -> Path:
    """The snapshot `name` is the served one after the call, and after a crash either it or the one before.

    Publishing the served snapshot again changes nothing. Raises SnapshotNotFound, SnapshotTorn, StoreBusy, PublishError.
    """
    with exclusive(store_dir):
        path = _whole(store_dir, name)
        before = _read_current(store_dir)
        if before != name:
            past = _history(store_dir, before)
            if before is not None:
                _write_names(store_dir / HISTORY_FILE, [*past, before])
            _write_names(store_dir / CURRENT_FILE, [name])
        return path


def rollback(store_dir: Path) -> str:
    """The snapshot served before the current one is served again; its name is returned.

    Raises PublishError when there is none to go back to, SnapshotNotFound or SnapshotTorn when it is not whole any more.
    """
    with exclusive(store_dir):
        past = _history(store_dir, _read_current(store_dir))
        if not past:
            raise PublishError(
                f"store {store_dir} has no earlier snapshot to go back to; the next `brewline nightly` publishes a new one"
            )
        _whole(store_dir, past[-1])
        _write_names(store_dir / CURRENT_FILE, past[-1:])
        _write_names(store_dir / HISTORY_FILE, past[:-1])
        return past[-1]


def current(store_dir: Path) -> Path | None:
    """The folder of the served snapshot is returned, None while nothing was published.

    Raises PublishError when CURRENT is damaged or names a snapshot that is gone.
    """
    name = _read_current(store_dir)
    if name is None:
        return None
    path = snapshots_dir(store_dir) / name
    if not path.is_dir():
        raise PublishError(f"{store_dir / CURRENT_FILE} names {name}, which is not there: roll back or publish another")
    return path


def list_snapshots(store_dir: Path) -> list[SnapshotInfo]:
    """Every finished snapshot of the store is returned, oldest first by the time it was written; damaged ones say so."""
    served = _read_current(store_dir)
    past = _history(store_dir, served)
    infos = [_info(path, served, past) for path in _finished(store_dir)]
    return sorted(infos, key=lambda info: (info.written_at, info.name))


def collect_garbage(store_dir: Path, keep: int, *, own_night: bool = False) -> list[str]:
    """All but the `keep` newest snapshots, the served one and its rollback target are gone; the gone names are returned.

    Also gone is what crashed writers left behind. Damaged snapshots stay: they are for a person to look at. A server that
    still maps a removed snapshot keeps its pages until it lets go. While a night works on the store, every snapshot that was
    never served stays, whatever `keep`: one of them may be the night's, written and about to be published (`own_night`: the
    caller is that night, and has published). Raises PublishError for keep < 0.
    """
    if keep < 0:
        raise PublishError(f"keep is {keep}, expected 0 or more snapshots to keep")
    with exclusive(store_dir):
        whole = [info for info in list_snapshots(store_dir) if not info.problem]
        past = _history(store_dir, _read_current(store_dir))
        spare = whole[: max(0, len(whole) - keep)]
        if not own_night and _night_works(store_dir):
            spare = [info for info in spare if info.name in past]
        gone = [info.name for info in spare if not (info.current or info.rollback)]
        folder = snapshots_dir(store_dir)
        _sweep(folder)  # first, too: a collector that crashed may have left a folder where one of these is to go
        for name in gone:
            # Renamed first: a crash halfway through the deletion must not leave a torn snapshot under a good name.
            (folder / name).rename(folder / f"{TRASH_PREFIX}{name}")
        _sweep(folder)
        if set(past) & set(gone):
            _write_names(store_dir / HISTORY_FILE, [name for name in past if name not in gone])
        return gone


def _night_works(store_dir: Path) -> bool:
    lock = store_dir / NIGHT_LOCK
    held = try_lock(lock) if lock.exists() else -1
    if held is not None and held >= 0:
        os.close(held)
    return held is None


def _sweep(folder: Path) -> None:
    """What crashed writers and collectors left behind is gone."""
    for path in folder.glob(".*"):
        if path.name.startswith(TRASH_PREFIX):
            shutil.rmtree(path)
        elif path.name.startswith(PARTIAL_PREFIX):
            lock = try_lock(path)
            if lock is not None:
                shutil.rmtree(path)
                os.close(lock)


def _finished(store_dir: Path) -> list[Path]:
    folder = snapshots_dir(store_dir)
    return [path for path in folder.glob("*") if NAME_PATTERN.fullmatch(path.name) and path.is_dir()]


def _info(path: Path, served: str | None, past: list[str]) -> SnapshotInfo:
    stamp, name = path / RUN_FILE, path.name
    written_at = stamp.stat().st_mtime if stamp.exists() else path.stat().st_mtime
    info = SnapshotInfo(name, name == served, name in past[-1:], written_at=written_at, in_line=name == served or name in past)
    try:
        facts = read_manifest(path)
        Snapshot(path, facts).verify(hashes=False)
    except SnapshotError as error:
        return replace(info, problem=str(error))
    return replace(
        info,
        count=facts.count,
        dims=facts.dims,
        as_of=facts.as_of,
        bytes=sum(fact.bytes for fact in facts.files.values()),
        fingerprint=facts.fingerprint,
    )


def _whole(store_dir: Path, name: str) -> Path:
    """Sizes and the manifest's hash are looked at; the gates have read every byte before."""
    if NAME_PATTERN.fullmatch(name) is None:
        raise SnapshotNotFound(f"{name!r} is no snapshot name: expected one like 20260131-0123456789ab")
    return Snapshot.open(snapshots_dir(store_dir) / name, verify=False).path


def _read_current(store_dir: Path) -> str | None:
    names = _read_names(store_dir / CURRENT_FILE)
    if names is None:
        return None
    if len(names) != 1:
        raise PublishError(
            f"{store_dir / CURRENT_FILE} holds {len(names)} lines, expected one name: remove the file and publish anew"
        )
    return names[0]


def _history(store_dir: Path, served: str | None) -> list[str]:
    past = _read_names(store_dir / HISTORY_FILE) or []
    while past and past[-1] == served:
        past.pop()
    return past


def _read_names(path: Path) -> list[str] | None:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split()
    except FileNotFoundError:
        return None
    for line in lines:
        if NAME_PATTERN.fullmatch(line) is None:
            raise PublishError(f"{path} holds {line[:60]!r}, expected a snapshot name: remove the file and publish anew")
    return lines


def _write_names(path: Path, names: list[str]) -> None:
    write_durably(path, "".join(f"{name}\n" for name in names).encode())
