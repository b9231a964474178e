"""The key-value store in one SQLite file: no server, many threads, several processes on one machine."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from index.keyvalue import Key, StoreError, StoreUnavailable, check_ttl, encode_key

_APPLICATION = 0x42726577
"""Marks the file as ours, so that a path to another program's database is refused instead of filled."""
_CHUNK = 500
"""Ids per statement; old SQLite builds allow 999 parameters."""
_KEYS = 300
"""Whole keys per statement, of three parameters each."""
_PUT = "INSERT OR REPLACE INTO entries (kind, fingerprint, id, value, expires) VALUES (?, ?, ?, ?, ?)"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
  kind BLOB NOT NULL, fingerprint BLOB NOT NULL, id BLOB NOT NULL, value BLOB NOT NULL, expires REAL,
  PRIMARY KEY (kind, fingerprint, id));
CREATE INDEX IF NOT EXISTS entries_expires ON entries (expires) WHERE expires IS NOT NULL;
"""


class SqliteStore:
    """A `KeyValueStore` in the file `path` (":memory:" for none). `clock` tells seconds and decides what has expired; others who
    have the file locked are waited for `patience_s` seconds.

    One connection behind one lock: a batched read takes microseconds, and threads cannot meet inside a transaction. The
    write-ahead log survives a crash of the process; a power cut may cost the last moments' writes, never the file.
    """

    def __init__(self, path: str, clock: Callable[[], float], patience_s: float) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.RLock()
        self._errors = _Errors(path)
        if path != ":memory:" and not Path(path).absolute().parent.is_dir():
            raise StoreUnavailable(f"store sqlite:{path} cannot be opened: its folder does not exist; make it first")
        with self._errors:
            self._database = sqlite3.connect(path, timeout=patience_s, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._database.close()
                raise

    def get_many(self, kind: str, ids: Sequence[str], fingerprint: str = "") -> list[bytes | None]:
        """See KeyValueStore."""
        keys = [encode_key(one, "id") for one in ids]
        prefix = _prefix(kind, fingerprint)
        found: dict[bytes, bytes] = {}
        distinct = list(dict.fromkeys(keys))
        with self._errors, self._lock:
            now = self._clock()
            for start in range(0, len(distinct), _CHUNK):
                chunk = distinct[start : start + _CHUNK]
                marks = ",".join("?" * len(chunk))
                found.update(
                    self._database.execute(
                        "SELECT id, value FROM entries WHERE kind = ? AND fingerprint = ? "
                        f"AND (expires IS NULL OR expires > ?) AND id IN ({marks})",
                        (*prefix, now, *chunk),
                    )
                )
        return [found.get(key) for key in keys]

    def get_each(self, keys: Sequence[Key]) -> list[bytes | None]:
        """See KeyValueStore."""
        found: list[bytes | None] = []
        with self._errors, self._lock:
            now = self._clock()
            for start in range(0, len(keys), _KEYS):  # a statement reads all of its keys at one moment, the next one later
                chunk = keys[start : start + _KEYS]
                asked: list[bytes | float] = []
                for kind, one, fingerprint in chunk:
                    asked += encode_key(kind, "kind"), encode_key(fingerprint, "fingerprint"), encode_key(one, "id")
                asked.append(now)
                values = dict(self._database.execute(_each(len(chunk)), asked))
                found.extend(map(values.get, range(len(chunk))))
        return found

    def put_many(self, kind: str, values: Mapping[str, bytes], fingerprint: str = "", ttl_s: float | None = None) -> None:
        """See KeyValueStore; here all values are kept or none."""
        check_ttl(ttl_s)
        prefix = _prefix(kind, fingerprint)
        rows = [(encode_key(one, "id"), bytes(memoryview(value))) for one, value in values.items()]
        with self._transaction() as now:
            expires = None if ttl_s is None else now + ttl_s
            self._database.execute("DELETE FROM entries WHERE expires IS NOT NULL AND expires <= ?", (now,))
            self._database.executemany(_PUT, ((*prefix, key, value, expires) for key, value in rows))

    def swap(self, kind: str, one: str, old: bytes | None, new: bytes, fingerprint: str = "", ttl_s: float | None = None) -> bool:
        """See KeyValueStore."""
        check_ttl(ttl_s)
        key = (*_prefix(kind, fingerprint), encode_key(one, "id"))
        with self._transaction() as now:
            found = self._database.execute(
                "SELECT value FROM entries WHERE kind = ? AND fingerprint = ? AND id = ? AND (expires IS NULL OR expires > ?)",
                (*key, now),
            ).fetchone()
            if (None if found is None else found[0]) != old:
                return False
            self._database.execute(_PUT, (*key, new, None if ttl_s is None else now + ttl_s))
        return True

    def delete_many(self, kind: str, ids: Sequence[str], fingerprint: str = "") -> None:
        """See KeyValueStore."""
        prefix = _prefix(kind, fingerprint)
        keys = [encode_key(one, "id") for one in ids]
        with self._transaction():
            self._database.executemany(
                "DELETE FROM entries WHERE kind = ? AND fingerprint = ? AND id = ?", ((*prefix, key) for key in keys)
            )

    def ids(self, kind: str, fingerprint: str = "") -> Iterator[str]:
        """See KeyValueStore; read page by page, so writers wait for a page at most."""
        prefix = _prefix(kind, fingerprint)
        last, above = b"", ">="
        while True:
            with self._errors, self._lock:
                page = self._database.execute(
                    f"SELECT id FROM entries WHERE kind = ? AND fingerprint = ? AND id {above} ? "
                    f"AND (expires IS NULL OR expires > ?) ORDER BY id LIMIT {_CHUNK}",
                    (*prefix, last, self._clock()),
                ).fetchall()
            if not page:
                return
            for (key,) in page:
                yield key.decode("utf-8")
            last, above = page[-1][0], ">"

    def ping(self) -> None:
        """See KeyValueStore."""
        with self._errors, self._lock:
            self._database.execute("SELECT 1 FROM entries LIMIT 1").fetchall()

    def close(self) -> None:
        """See KeyValueStore."""
        with self._lock:
            self._database.close()

    def _prepare(self) -> None:
        (mark,) = self._database.execute("PRAGMA application_id").fetchone()
        tables = self._database.execute("SELECT name FROM sqlite_master LIMIT 1").fetchall()
        if mark != _APPLICATION and (mark or tables):
            raise StoreError(f"store sqlite:{self._path} is another program's database: name another file")
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.executescript(_SCHEMA)
        self._database.execute(f"PRAGMA application_id = {_APPLICATION}")

    @contextmanager
    def _transaction(self) -> Iterator[float]:
        """Inside the block this thread alone writes; the time of its beginning is yielded."""
        with self._errors, self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._clock()
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise


class _Errors:
    """Inside the block what SQLite raises becomes one of our errors. No generator: each read of a member enters it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Raises StoreError, StoreUnavailable instead of an error of SQLite's."""
        if not isinstance(error, sqlite3.Error):
            return
        if isinstance(error, sqlite3.ProgrammingError):
            raise StoreError(f"store sqlite:{self._path} is closed or misused: {error}") from error
        if isinstance(error, sqlite3.OperationalError):
            raise StoreUnavailable(f"store sqlite:{self._path} cannot be used now: {error}") from error
        raise StoreError(f"store sqlite:{self._path} is refused by SQLite: {error}; name another file") from error


@lru_cache(_KEYS)
def _each(count: int) -> str:
    """The statement that reads so many whole keys."""
    wanted = ",".join(f"({place},?,?,?)" for place in range(count))
    return (
        f"WITH wanted (place, kind, fingerprint, id) AS (VALUES {wanted}) "
        # CROSS, so that SQLite looks the keys up; it would read the whole table for `(kind, ...) IN (VALUES ...)`
        "SELECT place, value FROM wanted CROSS JOIN entries USING (kind, fingerprint, id) WHERE expires IS NULL OR expires > ?"
    )


def _prefix(kind: str, fingerprint: str) -> tuple[bytes, bytes]:
    return encode_key(kind, "kind"), encode_key(fingerprint, "fingerprint")
