"""Retrieves that wait are answered together, each exactly as if alone, and none pays for another's fault."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from ranking.pipeline import Recommender
from ranking.ranker import Ranker
from ranking.serving.client import Answer, Client, ServiceError
from ranking.serving.queue_fair import Job
from ranking.serving.queue_forecast import Kind
from ranking.serving.stack import Stack
from ranking.serving.worker import MOST_TOKENS, Worker
from retrieval.data.schema import Member, MemberView
from retrieval.encoder import Encoder

Start = Callable[..., tuple[int, Callable[[], None]]]
BOMB = MemberView(Member("", {"headline": "a bomb"}))


class Counting(Encoder):
    """An encoder that notes how many members it is given at once, and that cannot read one of them."""

    sizes: list[int]

    def members(self, views: Sequence[MemberView], progress: Any = None) -> np.ndarray:
        self.sizes.append(len(views))
        if BOMB.member.profile in [view.member.profile for view in views]:
            raise ZeroDivisionError("the secret of the bomb")
        return super().members(views, progress)


class Held(Ranker):
    """A ranker that waits until it is let go, so that a test decides what queues up behind it."""

    def __init__(self, like: Ranker) -> None:
        self.facts, self.fingerprint, self.engine, self.head, self._like = like.facts, like.fingerprint, like.engine, None, like
        self.go, self.here = threading.Event(), threading.Event()
        self.go.set()

    def score(self, *asked: Any) -> np.ndarray:
        self.here.set()
        assert self.go.wait(20)
        return self._like.score(*asked)


def held(stack: Stack) -> tuple[Stack, Held, Counting]:
    """The stack with such an encoder and such a ranker."""
    assert stack.ranker is not None
    ranker, encoder = Held(stack.ranker), copy.copy(stack.encoder)
    encoder.__class__ = Counting
    assert isinstance(encoder, Counting)
    encoder.sizes = []
    retriever = replace(stack.recommender.retriever, encoder=encoder)
    return replace(stack, ranker=ranker, encoder=encoder, recommender=Recommender(retriever, ranker)), ranker, encoder


def asked_at_once(port: int, ranker: Held, asks: Sequence[Callable[[Client], Answer]]) -> list[Answer | ServiceError]:
    """What each is answered if all wait together behind a Recommend."""
    ranker.here.clear()
    ranker.go.clear()

    def one(ask: Callable[[Client], Answer]) -> Answer | ServiceError:
        with Client(f"127.0.0.1:{port}") as client:
            try:
                return ask(client)
            except ServiceError as error:
                return error

    with Client(f"127.0.0.1:{port}") as watch, ThreadPoolExecutor(len(asks) + 1) as pool:
        before = watch.info().requests
        first = pool.submit(one, lambda client: client.recommend("m1", 1))
        assert ranker.here.wait(20)
        rest = [pool.submit(one, ask) for ask in asks]
        ends = time.monotonic() + 15
        while watch.info().requests < before + 1 + len(asks):  # until all of them are in the queue
            assert time.monotonic() < ends
            time.sleep(0.01)
        ranker.go.set()
        assert isinstance(first.result(), Answer)
        return [future.result() for future in rest]


def test_what_waits_is_encoded_together_and_answered_as_if_alone(stack: Stack, start: Start, views: list[MemberView]) -> None:
    slow, ranker, encoder = held(stack)
    port, _ = start(slow, most_wait_s=60.0)
    who: list[str | MemberView] = [*views[:7], "m3", "m8"]
    sizes = [60, 5, 60, 5, 60, 5, 60, 60, 7]
    asks = [lambda client, one=one, k=k: client.retrieve(one, k, exclude=["i1"]) for one, k in zip(who, sizes)]
    encoder.sizes.clear()
    together = asked_at_once(port, ranker, asks)  # first: nothing is known of the time it takes, so that does not bound the batch
    assert max(encoder.sizes) == 7, "two members' vectors were known, the others' are made at once"
    with Client(f"127.0.0.1:{port}") as client:
        alone = [ask(client) for ask in asks]
    for one, other in zip(alone, together):
        assert isinstance(other, Answer)
        assert one.ids == other.ids
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)
        parts = sum(micros for stage, micros in other.times.items() if stage != "total_us")
        assert other.times["total_us"] >= parts and other.times["queue_us"] > 0
    assert len({other.request_id for other in together if isinstance(other, Answer)}) == len(asks)


def test_one_bad_request_hurts_nobody_else(stack: Stack, start: Start, views: list[MemberView]) -> None:
    slow, ranker, encoder = held(stack)
    port, _ = start(slow, most_wait_s=60.0)
    encoder.sizes.clear()
    answers = asked_at_once(
        port,
        ranker,
        [
            lambda client: client.retrieve(views[0], 10),
            lambda client: client.retrieve(views[1], 30_000),
            lambda client: client.retrieve("nobody", 10),
            lambda client: client.retrieve(views[1], 10),
            lambda client: client.retrieve(BOMB, 10),
            lambda client: client.retrieve(views[2], 10),
        ],
    )
    codes = [answer.code if isinstance(answer, ServiceError) else "OK" for answer in answers]
    assert codes == ["OK", "INVALID_ARGUMENT", "NOT_FOUND", "OK", "INTERNAL", "OK"]
    assert "secret" not in str(answers[4])
    assert max(encoder.sizes) == 4, "those that could be read were tried together first"
    with Client(f"127.0.0.1:{port}") as client:
        alone = [client.retrieve(view, 10) for view in views[:3]]
    assert [one.ids for one in alone] == [answers[row].ids for row in (0, 3, 5)]  # type: ignore[union-attr]


def retrieves(count: int, sizes: list[int], tokens: int = 0) -> list[Job]:
    """Jobs that are run together and note how many they were."""

    def together(jobs: Sequence[Job]) -> list[int]:
        sizes.append(len(jobs))
        return [0] * len(jobs)

    return [
        Job(lambda: sizes.append(1), "a", Kind("Retrieve"), time.monotonic() + 60, together=together, tokens=tokens)
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, [4, 2]), (MOST_TOKENS // 2, [2, 2, 2]), (MOST_TOKENS, [1] * 6)],
    ids=["by count", "by tokens", "too large to share"],
)
async def test_a_batch_is_bounded(tokens: int, expected: list[int]) -> None:
    worker, go, sizes = Worker(most_wait_s=60.0, most_together=4), threading.Event(), list[int]()
    gate = worker.submit(go.wait)
    futures = [worker.put(job) for job in retrieves(6, sizes, tokens)]
    go.set()
    await asyncio.gather(gate, *futures)
    worker.close()
    assert sizes == expected


async def test_the_tightest_deadline_bounds_a_batch() -> None:
    worker, go, sizes = Worker(most_wait_s=60.0), threading.Event(), list[int]()
    first, *rest = retrieves(1, sizes)
    await worker.put(first)
    worker._forecast.record(Kind("Retrieve", 1), 5.0, time.monotonic())  # about a second each, from now on
    gate = worker.submit(go.wait)
    jobs = retrieves(4, sizes)
    futures = [worker.put(job) for job in jobs]
    assert all(0.9 < job.cost < 1.1 for job in jobs) and not rest
    go.set()
    await asyncio.gather(gate, *futures)
    worker.close()
    assert sizes[1:] == [1, 1, 1, 1], "a second of work is never put off for the sake of others"


def test_a_batch_of_the_server_may_be_switched_off(stack: Stack, start: Start, views: list[MemberView]) -> None:
    slow, ranker, encoder = held(stack)
    port, _ = start(slow, most_wait_s=60.0, most_together=1)
    encoder.sizes.clear()
    asked_at_once(port, ranker, [lambda client, view=view: client.retrieve(view, 5) for view in views[:4]])
    assert set(encoder.sizes) == {1}
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        grpc.channel_ready_future(channel).result(5)
