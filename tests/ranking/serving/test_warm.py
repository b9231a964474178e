"""What a warm Retrieve leaves out, held against the long way: the answer is the same, and nothing unread is let through."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ranking.pipeline import Ranked
from ranking.serving import answers
from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import Call, asker_of, vector_of
from ranking.serving.change_messages import read_wanted, wanted_message
from ranking.serving.messages import BadRequest, fill_results, pack_ids
from ranking.serving.queue_fair import FairQueue, Job
from ranking.serving.stack import Stack, open_stack
from ranking.serving.worker import Worker
from retrieval.attributes import EVERYTHING, Wanted
from retrieval.data.schema import Item


@pytest.fixture
def own(night: Path, copied: Path) -> Iterator[Stack]:
    stack = open_stack(copied, night / "encoder1", None, None)
    yield stack
    stack.today.close()


def call() -> Call:
    return Call("r", time.monotonic(), started=time.monotonic())


def rebuilt(stack: Stack) -> Stack:
    """The present moment put together from all its parts, whether or not anything changed."""
    moment, catalog = stack.today.now()
    retriever = replace(stack.recommender.retriever, moment=moment, catalog=catalog)
    return replace(stack, catalog=catalog, recommender=replace(stack.recommender, retriever=retriever))


def test_a_moment_without_changes_is_answered_by_the_stack_at_hand(own: Stack) -> None:
    request = pb.RetrieveRequest(member=pb.Member(id="m3"), k=20, readable=True)
    assert own.now() is own
    assert answers.retrieve(own.now(), request, call()).results == answers.retrieve(rebuilt(own), request, call()).results
    own.today.upsert([Item("new", "roses and compost", "pruning", "gardens", "author 9")], 1_705_000_000)
    own.today.withdraw(["i5"])
    now = own.now()
    assert now is not own and now.now() is now and now.catalog.rows(["new", "i5"]).tolist() == [60, -1]
    everything = pb.RetrieveRequest(member=pb.Member(id="m3"), k=61, readable=True)
    found = answers.retrieve(own.now(), everything, call()).results
    assert found == answers.retrieve(rebuilt(own), everything, call()).results
    shown = {item.item_id for item in found.items}
    assert "new" in shown and "i5" not in shown


def test_a_filter_that_says_nothing_asks_nothing_and_any_word_is_read() -> None:
    assert read_wanted(pb.Filter()) == EVERYTHING == read_wanted(pb.RetrieveRequest().filter)
    one = frozenset(("roses",))
    for wanted in (
        *(Wanted(categories=one), Wanted(creators=one), Wanted(languages=one), Wanted(regions=one)),
        *(Wanted(blocked_creators=one), Wanted(by_connections=True)),
    ):
        assert read_wanted(wanted_message(wanted)) == wanted != EVERYTHING
    newer = pb.Filter.FromString(bytes([15 << 3, 0]))  # field 15, as small as a field can be
    with pytest.raises(BadRequest, match="ask a newer server"):
        read_wanted(newer)


@pytest.mark.parametrize("ids", [["i1", "i2", "i3"], ["é🦆", "", "plain"], []])
@pytest.mark.parametrize("chances", [True, False])
def test_a_table_filled_in_its_answer_is_the_one_that_is_put_into_it(stack: Stack, ids: list[str], chances: bool) -> None:
    scores, rows = np.linspace(1, 0, len(ids), dtype=np.float32), np.arange(len(ids))
    halves = (scores / 2).astype(np.float32)
    ranked = Ranked(ids, rows, rows[::-1], scores, halves if chances else None, 9)
    own = pb.Results(
        count=len(ids),
        ids=pack_ids(ids),
        scores=scores.tobytes(),
        probabilities=halves.tobytes() if chances else b"",
        places=rows[::-1].astype("<u4").tobytes(),
    )
    response = pb.RetrieveResponse(request_id="r")
    fill_results(response.results, ranked, stack.catalog, readable=False)
    put = pb.RetrieveResponse(request_id="r", results=own)
    assert response == put and response.SerializeToString() == put.SerializeToString()


def test_a_kept_vector_is_the_one_that_would_be_made(stack: Stack) -> None:
    asker = asker_of(stack, pb.Member(id="m4"), "")
    assert asker.vector is not None
    made = vector_of(stack, replace(asker, vector=None), call())
    np.testing.assert_allclose(vector_of(stack, asker, call()), made, atol=1e-6)


async def test_nobody_waits_in_an_empty_queue_whatever_he_owes() -> None:
    queue = FairQueue(8)
    for caller in ("a", "a", "b"):
        queue.put(Job(list, caller, cost=0.5))
    while (job := queue.take()) is not None and len(queue):
        queue.settle(job.caller, 3.0)
    assert not len(queue) and {queue.wait(caller) for caller in ("a", "b", "stranger")} == {0.0}


async def test_who_no_longer_waits_leaves_the_queue_and_the_count() -> None:
    worker, gate = Worker(), threading.Event()
    running, waiting = worker.put(Job(gate.wait, "a")), worker.put(Job(list, "b"))
    while worker.waiting > 1:
        await asyncio.sleep(0.001)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await waiting
    assert worker.waiting == 0 and waiting.cancelled()
    gate.set()
    assert await running
    before = time.monotonic()
    await worker.drain(60)
    assert time.monotonic() - before < 30, "nobody is inside any more"
    worker.close()
