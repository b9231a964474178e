"""The key-value store as a server asks it: never waiting twice for one that is gone, and remembering what it said last.

The first request that meets a store which does not answer pays its patience. From then on every one is refused at once, while a
thread of its own asks for a sign of life; as soon as there is one, requests reach the store again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from index.keyvalue import Key, KeyValueStore, StoreError, StoreUnavailable

T = TypeVar("T")

REST_S = 1.0
MOST_BYTES = 64 << 20
STAMPS = 4_096
"""Counts of writes, each shared by the keys of one hash: a few too many values are not kept, and no key costs memory for good."""
ENTRY_BYTES = 256
"""About what an entry costs beside its value: key, links, objects."""

log = logging.getLogger(__name__)


class SteadyStore:
    """A `KeyValueStore` over another one. Only reads decide that the store is gone: SQLite may refuse to write for a while and
    still answer. Writes that were refused are not tried again for `rest_s` seconds."""

    def __init__(self, store: KeyValueStore, rest_s: float = REST_S, most_bytes: int = MOST_BYTES) -> None:
        self._store, self._rest_s = store, rest_s
        self._memory = _Memory(most_bytes)
        self._lock = threading.Lock()
        self._gone = ""
        self._writes_again = 0.0
        self._closed = threading.Event()

    def remembered(self, kind: str, one: str, fingerprint: str = "") -> bytes | None:
        """The value that was last read or written here, None if there was none or it was forgotten. Never waits."""
        return self._memory.get((kind, one, fingerprint))

    def get_many(self, kind: str, ids: Sequence[str], fingerprint: str = "") -> list[bytes | None]:
        """See KeyValueStore."""
        keys = [(kind, one, fingerprint) for one in ids]
        stamps = self._memory.stamps(keys)
        found = self._read(lambda: self._store.get_many(kind, ids, fingerprint))
        self._memory.read(keys, found, stamps)
        return found

    def get_each(self, keys: Sequence[Key]) -> list[bytes | None]:
        """See KeyValueStore."""
        stamps = self._memory.stamps(keys)
        found = self._read(lambda: self._store.get_each(keys))
        self._memory.read(keys, found, stamps)
        return found

    def put_many(self, kind: str, values: Mapping[str, bytes], fingerprint: str = "", ttl_s: float | None = None) -> None:
        """See KeyValueStore."""
        keys = [(kind, one, fingerprint) for one in values]
        stamps = self._memory.stamps(keys)
        self._write(lambda: self._store.put_many(kind, values, fingerprint, ttl_s))
        self._memory.wrote(keys, list(values.values()), stamps)

    def swap(self, kind: str, one: str, old: bytes | None, new: bytes, fingerprint: str = "", ttl_s: float | None = None) -> bool:
        """See KeyValueStore."""
        keys = [(kind, one, fingerprint)]
        stamps = self._memory.stamps(keys)
        done = self._write(lambda: self._store.swap(kind, one, old, new, fingerprint, ttl_s))
        if done:
            self._memory.wrote(keys, [new], stamps)
        return done

    def delete_many(self, kind: str, ids: Sequence[str], fingerprint: str = "") -> None:
        """See KeyValueStore."""
        keys = [(kind, one, fingerprint) for one in ids]
        stamps = self._memory.stamps(keys)
        self._write(lambda: self._store.delete_many(kind, ids, fingerprint))
        self._memory.wrote(keys, [None] * len(keys), stamps)

    def ids(self, kind: str, fingerprint: str = "") -> Iterator[str]:
        """See KeyValueStore."""
        return self._store.ids(kind, fingerprint)

    def ping(self) -> None:
        """See KeyValueStore; asks the store itself."""
        self._store.ping()

    def close(self) -> None:
        """See KeyValueStore."""
        self._closed.set()
        self._store.close()

    def _read(self, ask: Callable[[], T]) -> T:
        self._refuse_if_gone()
        try:
            return ask()
        except StoreUnavailable as error:
            self._fell(str(error))
            raise

    def _write(self, ask: Callable[[], T]) -> T:
        self._refuse_if_gone()
        if time.monotonic() < self._writes_again:
            raise StoreUnavailable("the store refused to write a moment ago; ask again in a moment")
        try:
            return ask()
        except StoreUnavailable:
            self._writes_again = time.monotonic() + self._rest_s
            raise

    def _refuse_if_gone(self) -> None:
        gone = self._gone
        if gone:
            raise StoreUnavailable(f"{gone} (asked again every {self._rest_s:g} s; until then nobody waits for it)")

    def _fell(self, why: str) -> None:
        with self._lock:
            if self._gone or self._closed.is_set():
                return
            self._gone = why
        log.warning("the key-value store does not answer: %s", why)
        try:
            threading.Thread(target=self._watch, name="brewline-store-watch", daemon=True).start()
        except RuntimeError as error:  # nobody would ever look again: requests ask the store themselves
            self._gone = ""
            log.warning("no thread can be started that asks the key-value store for a sign of life: %s", error)

    def _watch(self) -> None:
        since, said = time.monotonic(), ""
        while not self._closed.wait(self._rest_s):
            try:
                self._store.ping()
            except StoreError:
                continue
            except Exception as error:  # a fault of ours must not keep a store refused that is back
                if said != repr(error):
                    said = repr(error)
                    log.exception("the key-value store cannot be asked for a sign of life")
                continue
            self._gone = ""
            log.warning("the key-value store answers again, after %.1f s", time.monotonic() - since)
            return


class _Memory:
    """Values by key up to a number of bytes; those that nobody put for longest leave first. Any thread.

    Whoever asks the store takes the stamps of the keys first. A value that was read while somebody else wrote may be older than
    what was written, so it is not kept; of two values written at once nobody here knows which one stayed, so neither is.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._values: OrderedDict[Key, bytes] = OrderedDict()
        self._writes = [0] * STAMPS
        self._lock = threading.Lock()

    def get(self, key: Key) -> bytes | None:
        with self._lock:
            return self._values.get(key)

    def stamps(self, keys: Sequence[Key]) -> list[int]:
        """How often each key was written, or another one that shares its count."""
        return [self._writes[hash(key) % STAMPS] for key in keys]

    def read(self, keys: Sequence[Key], values: Sequence[bytes | None], stamps: Sequence[int]) -> None:
        """The values are kept, but for those of keys that were written since the stamps."""
        with self._lock:
            for key, value, stamp in zip(keys, values, stamps):
                if self._writes[hash(key) % STAMPS] == stamp:
                    self._put(key, value)

    def wrote(self, keys: Sequence[Key], values: Sequence[bytes | None], stamps: Sequence[int]) -> None:
        """The values are kept, and nothing of keys that others wrote too since the stamps."""
        with self._lock:
            alone = [self._writes[hash(key) % STAMPS] == stamp for key, stamp in zip(keys, stamps)]
            for key, value, own in zip(keys, values, alone):
                self._writes[hash(key) % STAMPS] += 1
                self._put(key, value if own else None)

    def _put(self, key: Key, value: bytes | None) -> None:
        before = self._values.pop(key, None)
        if before is not None:
            self._bytes -= len(before) + ENTRY_BYTES
        if value is not None:
            self._values[key] = bytes(value)
            self._bytes += len(value) + ENTRY_BYTES
        while self._bytes > self._most:
            _, oldest = self._values.popitem(last=False)
            self._bytes -= len(oldest) + ENTRY_BYTES
