"""A rehearsal answers nobody, changes nothing, lets requests go before, and ends where it would."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from index.keyvalue import StoreUnavailable
from index.shadow import Shadow
from ranking.serving import recommender_pb2 as pb
from ranking.serving.gather import rehearse
from ranking.serving.queue_fair import Job
from ranking.serving.rehearsal import LONGEST_S, MOST, Rehearsal
from ranking.serving.stack import Stack, open_stack
from ranking.serving.worker import Worker
from retrieval.members import RECORD, VECTOR

WARM = pb.RetrieveRequest(member=pb.Member(id="m3"), k=20)


@pytest.fixture
def own(night: Path, copied: Path) -> Iterator[Stack]:
    stack = open_stack(copied, night / "encoder1", None, None)
    yield stack
    stack.today.close()


def test_it_comes_after_an_answer_so_often_and_then_rests() -> None:
    ran, rehearsal = list[int](), Rehearsal(0.01)
    assert rehearsal.due_s is None
    rehearsal.learn(None, 0.001)
    assert rehearsal.due_s is None, "a change is no question"
    rehearsal.learn(lambda: ran.append(1), 0.001)
    while rehearsal.due_s is not None:
        assert rehearsal.due_s == 0.01
        rehearsal.run()
    assert len(ran) == MOST
    rehearsal.learn(lambda: ran.append(1), 0.001)
    assert rehearsal.due_s is not None
    off = Rehearsal(0.0)
    off.learn(lambda: ran.append(1), 0.001)
    assert off.due_s is None


def test_what_is_slow_or_fails_is_not_rehearsed_until_it_went_well(caplog: pytest.LogCaptureFixture) -> None:
    rehearsal = Rehearsal(0.01)
    rehearsal.learn(lambda: None, 2 * LONGEST_S)
    assert rehearsal.due_s is None
    rehearsal.learn(lambda: time.sleep(2 * LONGEST_S), LONGEST_S / 2)
    rehearsal.run()
    assert rehearsal.due_s is None

    def fails() -> None:
        raise StoreUnavailable("gone")

    rehearsal.learn(fails, LONGEST_S / 2)
    with caplog.at_level("INFO"):
        rehearsal.run()
    assert rehearsal.due_s is None and "StoreUnavailable" in caplog.text
    rehearsal.learn(lambda: None, LONGEST_S / 2)
    assert rehearsal.due_s is not None


def test_the_worker_rehearses_when_idle_and_requests_go_before() -> None:
    async def scene() -> None:
        worker, again, enough = Worker(most_wait_s=60.0, rehearse_s=0.002), list[int](), threading.Event()

        def once_more() -> None:
            again.append(1)
            if len(again) == 3:
                enough.set()

        try:
            assert await worker.put(Job(lambda: "answer", again=once_more)) == "answer"
            assert await asyncio.to_thread(enough.wait, 60)
            assert worker.waiting == 0 and worker._until == 0.0, "nobody is told to wait for a rehearsal"
            assert await worker.put(Job(lambda: "next")) == "next"
            assert await worker.submit(lambda: "own") == "own"
        finally:
            await worker.drain(60)
            worker.close()
        assert not worker._thread.is_alive() and len(again) <= MOST

    asyncio.run(scene())


def test_a_worker_that_was_not_told_to_never_rehearses() -> None:
    async def scene() -> list[int]:
        worker, again = Worker(), list[int]()
        await worker.put(Job(lambda: None, again=lambda: again.append(1)))
        await asyncio.sleep(0.1)
        worker.close()
        return again

    assert asyncio.run(scene()) == []


def test_a_rehearsal_reads_the_member_and_writes_nothing(own: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own.members is not None
    store, read = own.origin.connection, list[str]()
    stored = store.get_many(VECTOR, ["m3"], own.members.fingerprint)
    store.delete_many(VECTOR, ["m3"], own.members.fingerprint)
    get = own.members.get
    monkeypatch.setattr(own.members, "get", lambda one: read.append(one) or get(one))
    rehearse(own, WARM)
    assert read == ["m3"] and store.get_many(VECTOR, ["m3"], own.members.fingerprint) == [None], "a request would keep one"
    store.put_many(VECTOR, {"m3": stored[0] or b""}, own.members.fingerprint)
    own.members.put([replace(get("m4").record, member=replace(get("m3").member))])
    before = store.get_many(RECORD, ["m3"])
    rehearse(own, WARM)
    assert store.get_many(RECORD, ["m3"]) == before


def test_where_answers_are_compared_nothing_is_rehearsed(own: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own.members is not None
    compared, read = replace(own, origin=replace(own.origin, shadow=Shadow(0.5))), list[str]()
    get = own.members.get
    monkeypatch.setattr(own.members, "get", lambda one: read.append(one) or get(one))
    rehearse(compared, WARM)
    assert read == []
    rehearse(own, WARM)
    assert read == ["m3"]


def test_a_thread_that_was_woken_for_a_request_that_never_came_takes_the_next() -> None:
    async def scene() -> None:
        worker, again = Worker(most_wait_s=60.0, rehearse_s=0.002), list[int]()
        try:
            for turn in range(50):
                worker.expect()
                await asyncio.sleep(0)
                if turn % 3:
                    assert await worker.put(Job(lambda turn=turn: turn, again=lambda: again.append(1))) == turn
            worker.expect()
            assert worker.waiting == 0 and await worker.submit(lambda: "own") == "own"
        finally:
            worker.close()

    asyncio.run(scene())
