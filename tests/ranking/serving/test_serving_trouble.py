"""Late, overloaded, broken or stopped: the service degrades openly, sheds, says what it can, and goes on."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ranking.pipeline import Degraded, Recommender
from ranking.ranker import Ranker
from ranking.serving.client import Client, ServiceError
from ranking.serving.stack import Stack

Start = Callable[..., tuple[int, Callable[[], None]]]


def slowed(stack: Stack, seconds: float) -> Stack:
    """The same stack with a ranker that takes its time, and no idea yet how long."""

    class Slow(Ranker):
        def __init__(self) -> None:
            assert stack.ranker is not None
            self.facts, self.fingerprint, self.engine = stack.ranker.facts, stack.ranker.fingerprint, stack.ranker.engine
            self.head, self.quick = None, True

        def score(self, *asked: Any) -> np.ndarray:
            assert stack.ranker is not None
            if not self.quick:
                time.sleep(seconds)
            self.quick = False  # the warm-up is quick, so the forecast is wrong
            return stack.ranker.score(*asked)

    return replace(stack, ranker=Slow(), recommender=Recommender(stack.recommender.retriever, Slow()))


def test_lateness_degrades_openly_or_is_a_deadline(stack: Stack, start: Start) -> None:
    port, _ = start(slowed(stack, 4.0))
    with Client(f"127.0.0.1:{port}") as client:
        surprised = client.recommend("m1", 5, deadline_ms=2_500)
        assert surprised.degraded is Degraded.RETRIEVAL_ORDER and surprised.probabilities is None
        assert "still running" in surprised.degraded_detail
        with pytest.raises(ServiceError) as caught:
            client.recommend("m1", 5, deadline_ms=100)  # waits behind the first, which still ranks
        assert caught.value.code == "DEADLINE_EXCEEDED"
        time.sleep(2.5)
        forewarned = client.recommend("m1", 5, deadline_ms=2_500)
        assert forewarned.degraded is Degraded.RETRIEVAL_ORDER
        assert "ms were left" in forewarned.degraded_detail
        assert forewarned.ids == surprised.ids == client.retrieve("m1", 5).ids
        assert client.recommend("m1", 5).degraded is Degraded.NONE


def test_overload_is_shed_and_a_stop_lets_running_work_finish(stack: Stack, start: Start) -> None:
    port, stop = start(slowed(stack, 0.8), most_waiting=1)
    answers: list[object] = []

    def ask() -> None:
        with Client(f"127.0.0.1:{port}", attempts=1) as client:
            try:
                answers.append(len(client.recommend("m1", 5)))
            except ServiceError as error:
                answers.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    threads[0].start()
    time.sleep(0.2)  # it runs, so of the others one may wait; before, it would itself be the one that waits
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.3)
    stop()
    for thread in threads:
        thread.join(10)
    assert sorted(map(str, answers)) == ["5", "5", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"]


def test_a_bug_is_internal_with_a_request_id_and_the_next_request_succeeds(
    stack: Stack, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    class Explodes(Ranker):
        def __init__(self) -> None:
            assert stack.ranker is not None
            self.facts, self.fingerprint, self.engine = stack.ranker.facts, stack.ranker.fingerprint, stack.ranker.engine
            self.head, self.left = None, 1

        def score(self, *rest: object) -> np.ndarray:
            self.left -= 1
            if self.left == -1:
                raise ZeroDivisionError("the password is hunter2")
            assert stack.ranker is not None
            return stack.ranker.score(*rest)

    port, _ = start(replace(stack, recommender=Recommender(stack.recommender.retriever, Explodes())))
    with Client(f"127.0.0.1:{port}") as client:
        with caplog.at_level(logging.INFO), pytest.raises(ServiceError) as caught:
            client.recommend("m1", 5)
        assert caught.value.code == "INTERNAL"
        assert "hunter2" not in caught.value.details
        (request_id,) = re.findall(r"request id ([0-9a-f]{32})", caught.value.details)
        assert request_id in caplog.text and "ZeroDivisionError" in caplog.text
        assert len(client.recommend("m1", 5)) == 5
