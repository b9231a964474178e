"""A store that was away is reached again, whatever went wrong while it was looked for."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any, TypeVar

import pytest

from index.keyvalue import StoreUnavailable
from index.sqlite_store import SqliteStore
from index.steady_store import SteadyStore

T = TypeVar("T")


class Moody(SqliteStore):
    """A real store that fails as it is told to."""

    reads: Exception | None = None
    pings: Exception | None = None
    pinged = 0
    asked, answers = threading.Event(), threading.Event()
    late: tuple[str, ...] = ()
    """Calls that have done their work, say so with `asked`, and end only when they may."""

    def get_many(self, kind: str, ids: list[str], fingerprint: str = "") -> list[bytes | None]:  # type: ignore[override]
        if self.reads is not None:
            raise self.reads
        return self._later("get_many", super().get_many(kind, ids, fingerprint))

    def swap(self, *how: Any) -> bool:
        return self._later(f"swap {how[3]!r}", super().swap(*how))

    def _later(self, name: str, done: T) -> T:
        if name in self.late:
            self.asked.set()
            assert self.answers.wait(20)
        return done

    def ping(self) -> None:
        self.pinged += 1
        if self.pings is not None:
            raise self.pings
        super().ping()


@pytest.fixture
def moody(tmp_path: Path) -> Moody:
    return Moody(str(tmp_path / "store.sqlite"), time.time, 1.0)


def eventually_read(steady: SteadyStore) -> list[bytes | None]:
    deadline = time.monotonic() + 20
    while True:
        try:
            return steady.get_many("k", ["a"])
        except StoreUnavailable:
            assert time.monotonic() < deadline, "the store is back and still refused"
            time.sleep(0.01)


def test_an_error_that_nobody_expected_does_not_end_the_watch(moody: Moody, caplog: pytest.LogCaptureFixture) -> None:
    steady = SteadyStore(moody, rest_s=0.01)
    steady.put_many("k", {"a": b"1"})
    moody.reads, moody.pings = StoreUnavailable("away"), RuntimeError("odd")
    with caplog.at_level(logging.WARNING), pytest.raises(StoreUnavailable, match="away"):
        steady.get_many("k", ["a"])
    deadline = time.monotonic() + 20
    while moody.pinged < 3:
        assert time.monotonic() < deadline, "it was asked again"
        time.sleep(0.01)
    moody.reads = moody.pings = None
    assert eventually_read(steady) == [b"1"]
    assert [entry.message for entry in caplog.records].count("the key-value store cannot be asked for a sign of life") == 1
    steady.close()


def test_without_room_for_a_watch_requests_ask_themselves(moody: Moody) -> None:
    steady = SteadyStore(moody, rest_s=0.01)
    steady.put_many("k", {"a": b"1"})
    moody.reads = StoreUnavailable("away")
    before = threading.stack_size(1 << 47)  # more than a process can address
    try:
        with pytest.raises(StoreUnavailable, match="away"):
            steady.get_many("k", ["a"])
    finally:
        threading.stack_size(before)
    moody.reads = None
    assert steady.get_many("k", ["a"]) == [b"1"]
    steady.close()


@pytest.mark.parametrize("late", ["get_many", "swap b'2'"])
def test_what_is_remembered_is_never_older_than_what_was_written(moody: Moody, late: str) -> None:
    """A read, or a write, that is told of its end last is not the last."""
    steady = SteadyStore(moody)
    steady.put_many("k", {"a": b"1"})
    moody.late, moody.asked, moody.answers = (late,), threading.Event(), threading.Event()
    slow = (lambda: steady.get_many("k", ["a"])) if late == "get_many" else (lambda: steady.swap("k", "a", b"1", b"2"))
    thread = threading.Thread(target=slow)
    thread.start()
    assert moody.asked.wait(20)
    assert steady.swap("k", "a", b"1" if late == "get_many" else b"2", b"3")
    moody.answers.set()
    thread.join(20)
    assert steady.remembered("k", "a") in ((b"3",) if late == "get_many" else (b"3", None))
    moody.late = ()
    assert steady.get_many("k", ["a"]) == [b"3"] and steady.remembered("k", "a") == b"3"
    steady.close()
