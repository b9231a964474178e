"""The door to the key-value store: one address, SQLite by default, Redis in production."""

from __future__ import annotations

import time
from collections.abc import Callable

from index.keyvalue import KeyValueStore, StoreError, StoreUnavailable

__all__ = ["KeyValueStore", "StoreError", "StoreUnavailable", "open_store", "shown_address"]

PATIENCE_S = 5.0
"""What a night can wait, so that a moment's trouble does not end it. Whoever is waited for by people waits for less."""
_REDIS = ("redis://", "rediss://", "unix://", "redis+cluster://", "rediss+cluster://")


def open_store(url: str, clock: Callable[[], float] = time.time, patience_s: float = PATIENCE_S) -> KeyValueStore:
    """A store at this address is returned; a Redis one connects at first use, `ping` says whether it is there.

    `sqlite:PATH` (`sqlite::memory:` for none), `redis://`, `rediss://`, `unix://`, `redis+cluster://`, `rediss+cluster://`.
    `clock` (seconds) decides what expires in SQLite; Redis has its own. A store that does not answer, or is locked, is waited for
    `patience_s` seconds. Raises StoreError, StoreUnavailable.
    """
    if url.startswith("sqlite:"):
        from index.sqlite_store import SqliteStore

        path = url.removeprefix("sqlite:").removeprefix("//")
        if not path:
            raise StoreError("store address sqlite: names no file: expected sqlite:PATH")
        return SqliteStore(path, clock, patience_s)
    if url.startswith(_REDIS):
        from index.redis_store import RedisStore

        return RedisStore(url, patience_s)
    scheme = url.partition(":")[0] if ":" in url else ""
    raise StoreError(f"store address of kind {scheme[:20]!r} is unknown: expected sqlite:PATH or redis://host:port/db")


def shown_address(url: str) -> str:
    """The address as messages may show it: without user, password and options. Raises StoreError for one that is none."""
    if url.startswith("sqlite:"):
        return url
    from index.redis_store import RedisStore

    return RedisStore(url, PATIENCE_S).shown
