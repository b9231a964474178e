"""What only the SQLite store can get wrong: the file, the transactions, the locks."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from index.store import StoreError, StoreUnavailable, open_store


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_foreign_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_bytes(b"this is no database, " * 100)
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE theirs (a)")
    other.close()
    before = (tmp_path / "other.db").read_bytes()
    for name, match in (
        ("text.db", "not a database"),
        ("other.db", "another program"),
        ("no/such.db", "folder"),
        ("", "unable"),
    ):
        with pytest.raises(StoreError, match=match):
            open_store(f"sqlite:{tmp_path / name}")
    assert (tmp_path / "other.db").read_bytes() == before


def test_a_failed_put_keeps_nothing(tmp_path: Path) -> None:
    store = open_store(f"sqlite:{tmp_path / 'kv.db'}")
    store._database.execute("CREATE TRIGGER t BEFORE INSERT ON entries WHEN NEW.id = x'62' BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(StoreError, match="no"):
        store.put_many("k", {"a": b"1", "b": b"1"})
    assert store.get_many("k", ["a", "b"]) == [None, None]
    store.put_many("k", {"a": b"2"})
    assert store.get_many("k", ["a"]) == [b"2"]
    store.close()


def test_a_writer_elsewhere_makes_us_wait_and_then_say_so(tmp_path: Path) -> None:
    store = open_store(f"sqlite:{tmp_path / 'kv.db'}", patience_s=0.05)
    store.put_many("k", {"a": b"1"})
    other = sqlite3.connect(tmp_path / "kv.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        store.put_many("k", {"a": b"2"})
    assert store.get_many("k", ["a"]) == [b"1"]  # readers never wait
    other.execute("ROLLBACK")
    store.put_many("k", {"a": b"3"})
    other.close()
    store.close()


def test_expired_rows_leave_the_file(tmp_path: Path) -> None:
    clock = Clock()
    store = open_store(f"sqlite:{tmp_path / 'kv.db'}", clock)
    store.put_many("k", {"a": b"1", "b": b"1"}, ttl_s=10)
    clock.now += 11
    store.put_many("k", {"c": b"1"})
    assert store._database.execute("SELECT count(*) FROM entries").fetchone() == (1,)
    store.close()


def test_more_keys_than_a_statement_takes_are_read_in_their_order(tmp_path: Path) -> None:
    clock = Clock()
    store = open_store(f"sqlite:{tmp_path / 'kv.db'}", clock)
    keys = [(f"k{n % 7}", f"id{n % 11}", f"f{n % 13}") for n in range(7 * 11 * 13)]
    for kind, one, fingerprint in keys:
        store.put_many(kind, {one: f"{kind}/{one}/{fingerprint}".encode()}, fingerprint)
    store.put_many("k0", {"short": b"1"}, ttl_s=10)
    asked = [("k0", "short", ""), *keys, keys[3], keys[3], ("k0", "id0", "f99")]
    values = ["/".join(key).encode() for key in (*keys, keys[3], keys[3])]
    assert store.get_each(asked) == [b"1", *values, None]
    clock.now += 11
    assert store.get_each(asked) == [None, *values, None]
    store.close()


def test_listing_does_not_stop_writers(tmp_path: Path) -> None:
    store = open_store(f"sqlite:{tmp_path / 'kv.db'}")
    store.put_many("k", {f"{n:04}": b"" for n in range(1_200)})
    listing = store.ids("k")
    next(listing)
    writer = threading.Thread(target=store.delete_many, args=("k", [f"{n:04}" for n in range(600, 1_200)]))
    writer.start()
    writer.join(5)
    assert not writer.is_alive() and len(list(listing)) < 1_199
    store.close()
