"""Changes that one worker hands to another: who takes them, who is asked, and what comes of it when one hangs or dies."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from google.protobuf.message import Message

from index.changes import ChangeRefused
from index.durable import StoreBusy
from ranking.serving import recommender_pb2 as pb
from ranking.serving.status import Draining, Handed, Late, Overloaded, message_of, status_of
from ranking.serving.workers_peers import Change, Peers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="--workers needs Linux")
WAIT_S = 120.0
"""Longer than anything here takes on a busy machine."""
SAID = pb.UpsertItemsResponse(position=7, request_id="r1")

Take = Callable[[Change], Awaitable[Message]]


def asked(seconds: float = WAIT_S) -> Change:
    return Change("UpsertItems", b"raw", "shop", "r1", time.monotonic() + seconds)


async def busy(*_: Change) -> Message:
    raise StoreBusy("another process writes")


async def slow(_: Change) -> Message:
    await asyncio.sleep(10 * WAIT_S)
    return SAID


def between(folder: Path, *neighbours: Take, change: Change | None = None) -> Message:
    """What worker 0 answers to a change when somebody else writes and workers 1, 2 ... do this."""

    async def run() -> Message:
        one, others = Peers(folder / "0"), [Peers(folder / str(place)) for place in range(1, len(neighbours) + 1)]
        await one.start(busy)
        for other, neighbour in zip(others, neighbours, strict=True):
            await other.start(neighbour)
        try:
            return await one.change(change or asked(), pb.UpsertItemsResponse, busy)
        finally:
            for peers in (one, *others):
                await peers.stop()

    return asyncio.run(run())


def test_a_change_goes_to_the_worker_that_writes(tmp_path: Path) -> None:
    taken: list[Change] = []

    async def take(change: Change) -> Message:
        taken.append(change)
        return SAID

    change = asked(seconds=30.0)
    assert between(tmp_path, take, change=change) == SAID
    assert taken == [change]
    assert between(tmp_path, take, change=asked(math.inf)) == SAID and taken[1].deadline < math.inf, "nobody waits for ever"


def test_a_worker_that_hangs_and_does_not_write_keeps_nobody_waiting(tmp_path: Path) -> None:
    async def take(_: Change) -> Message:
        return SAID

    async def full(_: Change) -> Message:
        raise Overloaded("too many", 1.5)

    assert between(tmp_path, slow, busy, full, take) == SAID


def test_the_worker_that_writes_is_remembered_until_it_is_gone(tmp_path: Path) -> None:
    tried, hangs = [], asyncio.Event()

    async def here() -> Message:
        tried.append(1)
        return await busy()

    async def take(change: Change) -> Message:
        return await (slow(change) if hangs.is_set() else asyncio.sleep(0, SAID))

    async def run() -> None:
        one, other, heir = (Peers(tmp_path / str(place)) for place in range(3))
        await other.start(take)

        async def change(seconds: float = WAIT_S) -> Message:
            return await one.change(asked(seconds), pb.UpsertItemsResponse, here)

        assert await change() == SAID and len(tried) == 1
        assert await asyncio.gather(change(), change(), change()) == [SAID] * 3 and len(tried) == 1
        hangs.set()
        for _ in range(2):
            with pytest.raises(Late):
                await change(seconds=0.1)
        assert len(tried) == 1, "one that hangs has the log's lock all the same"
        hangs.clear()
        await other.stop()
        await heir.start(take)
        assert await change() == SAID and len(tried) == 2
        assert await change() == SAID and len(tried) == 2
        await heir.stop()

    asyncio.run(run())


def test_a_neighbours_refusal_is_the_callers_own(tmp_path: Path) -> None:
    def refusing(error: Exception) -> Callable[[Change], Awaitable[Message]]:
        async def take(_: Change) -> Message:
            raise error

        return take

    with pytest.raises(Handed, match="no id") as caught:
        between(tmp_path, refusing(ChangeRefused("no id")))
    assert status_of(caught.value).name == "INVALID_ARGUMENT"
    with pytest.raises(Overloaded, match="too many") as full:
        between(tmp_path, refusing(Overloaded("too many", 1.5)))
    assert full.value.retry_s == 1.5
    with pytest.raises(Handed) as bug:
        between(tmp_path, refusing(ZeroDivisionError("secret")))
    assert status_of(bug.value).name == "INTERNAL" and message_of(bug.value, "r1") == message_of(ZeroDivisionError(), "r1")
    for elsewhere in (StoreBusy("not here either"), Draining("going down")):
        with pytest.raises(StoreBusy, match="another process writes"):
            between(tmp_path, refusing(elsewhere))


def test_a_neighbour_that_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(Late):
        between(tmp_path, slow, change=asked(seconds=0.3))


def test_a_neighbour_that_dies_leaves_it_open(tmp_path: Path) -> None:
    async def run() -> None:
        async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.close()

        server = await asyncio.start_unix_server(die, tmp_path / "1")
        with pytest.raises(Handed, match="kept or not") as caught:
            await Peers(tmp_path / "0").change(asked(), pb.UpsertItemsResponse, busy)
        assert status_of(caught.value).name == "UNAVAILABLE"
        server.close()  # its socket stays behind, as that of a killed worker does
        with pytest.raises(StoreBusy):
            await Peers(tmp_path / "0").change(asked(), pb.UpsertItemsResponse, busy)

    asyncio.run(run())
