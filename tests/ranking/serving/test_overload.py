"""More is asked than can be answered: turns are fair, refusals early, cheap and with a hint, and what was let in is answered."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ranking.pipeline import Recommender
from ranking.ranker import Ranker
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.answers import Call
from ranking.serving.load_shed import GATHERED_S, STRICT_S, Patience
from ranking.serving.load_shed_depth import Depth, lowered
from ranking.serving.load_shed_door import caller_of
from ranking.serving.queue_fair import Job
from ranking.serving.queue_forecast import Kind
from ranking.serving.stack import Stack
from ranking.serving.status import Late, Overloaded

Start = Callable[..., tuple[int, Callable[[], None]]]
Stub = recommender_pb2_grpc.RecommenderStub
ASK = pb.RecommendRequest(member=pb.Member(id="m1"), k=5, fanout=40)


class Slow(Ranker):
    """A ranker that takes its time, goes on only when it may, and counts what it is asked."""

    def __init__(self, like: Ranker, seconds: float) -> None:
        self.facts, self.fingerprint, self.engine, self.head, self._like = like.facts, like.fingerprint, like.engine, None, like
        self.seconds, self.ranked, self.here, self.go = seconds, list[int](), threading.Event(), threading.Event()
        self.go.set()

    def score(self, view: Any, tokens: Any, *rest: Any) -> np.ndarray:
        self.ranked.append(len(tokens))
        self.here.set()
        time.sleep(self.seconds)
        assert self.go.wait(20)
        return self._like.score(view, tokens, *rest)


def slowed(stack: Stack, seconds: float) -> tuple[Stack, Slow]:
    """The stack with such a ranker."""
    assert stack.ranker is not None
    ranker = Slow(stack.ranker, seconds)
    return replace(stack, ranker=ranker, recommender=Recommender(stack.recommender.retriever, ranker)), ranker


@pytest.fixture
def stub_of() -> Iterator[Callable[[int], Stub]]:
    """A stub for a port; its connection is closed after the test."""
    channels: list[grpc.Channel] = []

    def connect(port: int) -> Stub:
        channels.append(grpc.insecure_channel(f"127.0.0.1:{port}"))
        return recommender_pb2_grpc.RecommenderStub(channels[-1])

    yield connect
    for channel in channels:
        channel.close()


def code_of(stub: Stub, caller: str = "", **how: Any) -> str:
    """How a Recommend ends."""
    try:
        stub.Recommend(ASK, metadata=[("x-caller", caller)] if caller else None, **how)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def job(caller: str, cost: float = 1.0, deadline: float = 1e9, *, queued: bool = True) -> Job:
    """A job that is not on any event loop."""
    return Job(int, caller, deadline=deadline, cost=cost, least=cost, queued=queued, future=None)  # type: ignore[arg-type]


def test_a_burst_may_wait_and_overload_may_not() -> None:
    patience = Patience(0.25)
    patience.check(job("a", 0.05), 0.2, 100.0)
    patience.check(job("a", 2.0), 1.9, 100.0)
    with pytest.raises(Overloaded, match="may be 250 ms") as caught:
        patience.check(job("a", 0.05), 0.3, 100.0)
    assert caught.value.retry_s == 0.3
    with pytest.raises(Overloaded, match="may be 38 ms"):
        patience.check(job("a", 0.05), 0.04, 100.5)
    patience.check(job("a", 0.05), 0.03, 100.6)
    assert patience.bound(0.001, 100.6, gathered=True) == GATHERED_S
    patience.check(job("b", 0.05), 0.12, 100.6)
    with pytest.raises(Overloaded, match="may be 125 ms"):
        patience.check(job("b", 0.05), 0.13, 100.6)
    patience.check(job("a", 0.001), 0.03, 100.6, at_hand=0.05)
    told = job("a", 0.001)
    told.kind = Kind("RecordEngagements")
    patience.check(told, 0.2, 100.6)
    patience.check(job("a", 0.05), 0.2, 100.6 + STRICT_S)


def test_no_queue_is_blamed_for_a_deadline_that_nothing_could_meet() -> None:
    patience = Patience(1.0)
    with pytest.raises(Late, match="lately took 300 ms or more"):
        patience.check(job("a", 0.3, 10.2), 0.0, 10.0)
    with pytest.raises(Overloaded, match="the wait would be 150 ms"):
        patience.check(job("a", 0.1, 10.2), 0.15, 10.0)
    patience.check(job("a", 0.3, 10.2, queued=False), 0.0, 10.0)  # an idle server tries, or it would never learn better


def test_callers_are_told_apart_by_token_name_or_host() -> None:
    bearer = ("authorization", "Bearer feed.abcDEF")
    assert caller_of([bearer, ("x-caller", "me")], "ipv4:10.0.0.7:5000", tokens=True) == "feed"
    assert caller_of([bearer, ("x-caller", "me")], "ipv4:10.0.0.7:5000", tokens=False) == "me"
    assert caller_of([("x-caller", "a b\n")], "ipv4:10.0.0.7:5000", tokens=False) == "ipv4:10.0.0.7"
    assert caller_of([], "ipv6:%5B::1%5D:5000", tokens=False) == "ipv6:%5B::1%5D"


def test_the_depth_falls_by_steps_to_a_floor() -> None:
    assert [lowered(2000, 250, pressure) for pressure in (0.0, 0.49, 0.5, 0.9, 7.0)] == [2000, 2000, 1000, 500, 500]
    assert lowered(2000, 800, 1.0) == 800 and lowered(100, 250, 1.0) == 100


def test_a_flood_is_refused_with_a_hint_and_another_caller_is_served(
    stack: Stack, start: Start, stub_of: Callable[[int], Stub]
) -> None:
    slow, ranker = slowed(stack, 0.1)
    port, _ = start(slow, most_wait_s=0.25, least_depth=20_000)
    stub = stub_of(port)
    assert code_of(stub) == "OK"  # now it is known how long one takes
    over = threading.Event()
    codes: Counter[str] = Counter()

    def flood() -> None:
        while not over.is_set():
            codes.update([code_of(stub, "greedy")])
            time.sleep(0.01)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(flood)
        time.sleep(0.5)
        modest = [code_of(stub, "modest") for _ in range(6)]
        health = health_pb2_grpc.HealthStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
        alive = health.Check(health_pb2.HealthCheckRequest(), timeout=10).status
        with pytest.raises(grpc.RpcError) as caught:
            for _ in range(50):
                stub.Recommend(ASK, metadata=[("x-caller", "greedy")])
                codes["OK"] += 1
        over.set()
    assert modest.count("OK") >= 5
    assert alive == health_pb2.HealthCheckResponse.SERVING
    assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    hint = dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]
    assert int(hint) >= 50 and "ask again in" in caught.value.details()
    assert ranker.ranked.count(40) == 1 + codes["OK"] + modest.count("OK"), "only what was answered was worked on"


def test_under_load_fewer_candidates_are_ranked_openly(stack: Stack, start: Start, stub_of: Callable[[int], Stub]) -> None:
    slow, ranker = slowed(stack, 0.15)
    port, _ = start(slow, most_wait_s=1.0, least_depth=12)
    stub = stub_of(port)
    quiet = stub.Recommend(ASK)
    assert (quiet.degraded, quiet.candidates) == (pb.NONE, 40)

    def ask(_: int) -> list[pb.RecommendResponse]:
        try:
            return [stub.Recommend(ASK)]
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # on a slow machine six are too many
            return []

    with ThreadPoolExecutor(6) as pool:
        answers = [answer for found in pool.map(ask, range(6)) for answer in found]
    fewer = [answer for answer in answers if answer.degraded == pb.FEWER_CANDIDATES]
    assert fewer and {answer.candidates for answer in fewer} <= {20, 12}
    assert all(f"{answer.candidates} candidates took part and 40 were" in answer.degraded_detail for answer in fewer)
    assert {answer.candidates for answer in answers if answer.degraded == pb.NONE} == {40}
    assert min(ranker.ranked) >= 12 and all(answer.results.count == 5 for answer in answers)
    after = stub.Recommend(ASK)
    assert (after.degraded, after.candidates) == (pb.NONE, 40)


def test_an_answer_that_had_to_leave_early_says_how_few_candidates_there_were(stack: Stack) -> None:
    now = time.monotonic()
    call = Call("r", now, now + 60, now)
    answer = Depth(lambda _: 1.0, least=12).recommend(stack, ASK, call)
    assert call.early is not None and call.early.degraded == pb.RETRIEVAL_ORDER and answer.degraded == pb.FEWER_CANDIDATES
    for one in (answer, call.early):
        assert one.candidates == 12 and "12 candidates took part and 40 were asked for" in one.degraded_detail


def test_a_stop_says_so_first_and_answers_what_it_took(stack: Stack, start: Start, stub_of: Callable[[int], Stub]) -> None:
    slow, ranker = slowed(stack, 0.0)
    port, stop = start(slow, most_wait_s=60.0)
    stub = stub_of(port)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, ThreadPoolExecutor(4) as pool:
        watched = iter(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20))
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        ranker.go.clear()
        accepted = [pool.submit(code_of, stub) for _ in range(3)]
        assert ranker.here.wait(10)
        ends = time.monotonic() + 20
        while stub.Info(pb.InfoRequest()).requests < 3:  # until all of them are in the queue
            assert time.monotonic() < ends
            time.sleep(0.01)
        stopping = threading.Thread(target=stop)
        stopping.start()
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert code_of(stub) == "UNAVAILABLE"
        assert not any(future.done() for future in accepted), "what waits is still to be answered"
        ranker.go.set()
        assert [future.result() for future in accepted] == ["OK"] * 3
        assert list(watched) == []
        stopping.join(10)
    assert not stopping.is_alive()
