"""Files that survive a crash: written beside, flushed to the disk, then renamed; and locks that die with their holder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from index.errors import BrewlineError

_POLL_S = 0.05


class StoreBusy(BrewlineError):
    """Another process holds the lock of a snapshot store."""


def sha256_of(path: Path) -> str:
    """The hex SHA-256 of the file's content is returned; the file is read once, in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """The file's content, or the folder's list of names, is on the disk after the call."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """The file holds `content` after the call, and after a crash at any moment either the old content or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    fsync_path(path.parent)


def try_lock(path: Path) -> int | None:
    """An open descriptor that holds the exclusive lock of a file or folder is returned, or None if somebody holds it.

    The kernel drops the lock when the descriptor is closed or its process dies, so a lock is never stale.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def exclusive(store_dir: Path, wait_s: float = 10.0) -> Iterator[None]:
    """Inside the block no other process or thread changes the pointers of this snapshot store.

    Raises StoreBusy when another holder keeps the lock for longer than `wait_s` seconds.
    """
    store_dir.mkdir(parents=True, exist_ok=True)
    lock = store_dir / "LOCK"
    lock.touch()
    deadline = time.monotonic() + wait_s
    descriptor = try_lock(lock)
    while descriptor is None:
        if time.monotonic() >= deadline:
            raise StoreBusy(
                f"snapshot store {store_dir} is being changed by another process (waited {wait_s:g} s for its LOCK): "
                "wait for that one to end and try again"
            )
        time.sleep(_POLL_S)
        descriptor = try_lock(lock)
    try:
        yield
    finally:
        os.close(descriptor)
