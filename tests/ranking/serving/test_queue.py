"""Turns are fair to whoever asks again, what is remembered is bounded, and a forecast that was wrong is not believed for ever."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ranking.serving import load_shed, queue_fair
from ranking.serving.load_shed import NEWCOMER, STRICT, Patience
from ranking.serving.queue_fair import FairQueue, Job
from ranking.serving.queue_forecast import RECENT, TRIAL_S, TRIAL_TURNS, Forecast, Kind
from ranking.serving.status import Late, Overloaded
from ranking.serving.worker import Worker

RANK = Kind("Rank", 100)
AGES = 1e6
"""Seconds that make any measurement old."""


def job(caller: str, cost: float = 1.0) -> Job:
    """A job that is not on any event loop."""
    return Job(int, caller, cost=cost, least=cost, queued=True, future=None)  # type: ignore[arg-type]


def taken(queue: FairQueue, count: int) -> str:
    """The callers of the next jobs."""
    found = [queue.take() for _ in range(count)]
    return "".join(one.caller for one in found if one is not None)


def test_callers_take_turns_by_what_they_cost() -> None:
    queue = FairQueue(100)
    for caller, cost, count in (("a", 1.0, 20), ("b", 1.0, 3), ("c", 4.0, 5)):
        for _ in range(count):
            queue.put(job(caller, cost))
    assert Counter(taken(queue, 7)) == {"a": 3, "b": 3, "c": 1}, "the many wait behind themselves, and so do the costly"
    waits = {caller: queue.wait(caller) for caller in ("a", "b", "new")}
    assert waits["new"] <= 1 and waits["b"] <= 2 and waits["a"] == 17 + 4 * 4, waits
    assert Counter(taken(queue, 5)) == {"a": 4, "c": 1}
    assert Counter(taken(queue, 30)) == {"a": 13, "c": 3}
    assert queue.take() is None and queue.cost == 0


def test_asking_one_at_a_time_gives_no_more_than_a_share() -> None:
    queue = FairQueue(100)
    for caller in "ab" * 30:
        queue.put(job(caller))
    served = ""
    for _ in range(30):
        if "c" not in queue._waiting:
            queue.put(job("c"))
        served += taken(queue, 1)
    assert Counter(served)["c"] in (9, 10, 11)


def test_work_that_cost_more_than_forecast_is_paid_for_later() -> None:
    queue = FairQueue(100)
    for caller in "abababab":
        queue.put(job(caller))
    assert taken(queue, 1) == "a"
    queue.settle("a", 1.5)
    assert taken(queue, 4) == "bbba"


def test_a_full_queue_takes_from_the_longest_line() -> None:
    queue = FairQueue(4)
    greedy = [job("greedy") for _ in range(4)]
    assert [queue.put(one) for one in greedy] == [None] * 4
    assert not queue.has_room("greedy") and queue.has_room("modest")
    assert queue.put(job("modest")) is greedy[-1]
    assert queue.put(job("modest")) is greedy[-2]
    assert not queue.has_room("modest") and len(queue) == 4
    queue.remove(greedy[0])
    queue.remove(greedy[0])
    assert len(queue) == 3 and queue.has_room("greedy")


def test_the_forecast_is_of_the_nearest_size_and_errs_upwards() -> None:
    forecast = Forecast()
    assert forecast.seconds(Kind("Rank", 100)) == forecast.most("Rank") == 0.0
    forecast.record(Kind("Rank", 100), 0.1, 0.0)
    assert forecast.seconds(Kind("Rank", 90)) == forecast.seconds(Kind("Rank", 3)) == 0.1
    assert forecast.seconds(Kind("Rank", 400)) == pytest.approx(0.4)
    forecast.record(Kind("Rank", 1000), 0.5, 0.0)
    for _ in range(40):
        forecast.record(Kind("Rank", 100), 0.2, 0.0)
    assert forecast.seconds(Kind("Rank", 100)) == pytest.approx(0.2, rel=0.01)
    assert forecast.most("Rank") == 0.5 and forecast.seconds(Kind("Recommend", 100)) == 0.0


def test_strangers_who_ask_once_do_not_starve_who_asks_again() -> None:
    queue = FairQueue(100)
    queue.put(job("web", 3.0))
    for stranger in range(4):
        queue.put(job(f"s{stranger}"))
    assert "web" in taken(queue, 4)
    queue.put(job("web"))
    served = []
    for stranger in range(4, 500):
        queue.put(job(f"s{stranger}"))
        served.append(taken(queue, 1))
    assert 4 < served.index("web") < 20, "after as much work for each who waits as his own first took"


def test_who_did_not_ask_has_saved_up_one_turn_and_no_more() -> None:
    queue = FairQueue(100)
    for _ in range(20):
        queue.put(job("a"))
    assert taken(queue, 10) == "a" * 10
    for _ in range(8):
        queue.put(job("b"))
    assert Counter(taken(queue, 8)) == {"a": 3, "b": 5}


def test_nobody_owes_anything_after_the_queue_stood_still() -> None:
    queue = FairQueue(100)
    queue.put(job("greedy", 1000.0))
    assert taken(queue, 1) == "greedy" and queue.take() is None
    for _ in range(3):
        queue.put(job("greedy"))
        queue.put(job("modest"))
    assert taken(queue, 6) == "greedymodest" * 3


def test_what_is_remembered_of_callers_is_bounded() -> None:
    queue = FairQueue(100)
    for n in range(3 * queue_fair.REMEMBERED):
        queue.put(job(f"c{n}"))
        queue.put(job(f"c{n}"))
        taken(queue, 2)
    assert len(queue._idle) == queue_fair.REMEMBERED and not queue._waiting


def test_made_up_callers_who_are_refused_do_not_pile_up() -> None:
    patience = Patience(0.25)
    for n in range(3 * load_shed.REMEMBERED):
        patience.refuse(f"c{n}", 0.1, "", 100.0)
    assert len(patience._refused) == load_shed.REMEMBERED
    bounds = [patience.bound(0.05, 100.0, caller) for caller in ("c0", f"c{n}")]
    assert bounds == [0.05 * NEWCOMER, 0.05 * STRICT], "who was refused last is still known"
    patience.refuse(f"c{n - 100}", 0.1, "", 100.0)
    for m in range(load_shed.REMEMBERED - 1):
        patience.refuse(f"d{m}", 0.1, "", 100.0)
    assert patience.bound(0.05, 100.0, f"c{n - 100}") == 0.05 * STRICT, "a new refusal renews the memory of an old one"


def test_the_median_of_the_last_runs_is_what_speaks_against_a_deadline() -> None:
    forecast = Forecast()
    assert forecast.usual(RANK) == 0.0
    forecast.record(RANK, 0.4, 0.0)
    assert forecast.usual(RANK) == forecast.usual(Kind("Rank", 5000)) == 0.4
    assert forecast.usual(Kind("Rank", 10)) == 0.0, "less was never tried"
    forecast.record(RANK, 0.1, 1.0)
    assert forecast.usual(RANK) == 0.1 and forecast.seconds(RANK) > 0.3
    for _ in range(RECENT):
        forecast.record(RANK, 0.5, 2.0)
    forecast.record(RANK, 9.0, 2.0)
    assert forecast.usual(RANK) == 0.5, "neither what was quick long ago nor what was slow once"
    assert not forecast.is_old(RANK, 2.0 + TRIAL_S, 0.0) and forecast.is_old(RANK, 2.1 + TRIAL_S, 0.0)
    assert not forecast.is_old(RANK, 2.0 + TRIAL_TURNS * 0.5, 0.5) and forecast.is_old(RANK, 2.1 + TRIAL_TURNS * 0.5, 0.5)
    forecast.tried(RANK, 3.0)
    assert not forecast.is_old(RANK, 2.1 + TRIAL_S, 0.0) and forecast.usual(RANK) == 0.5
    forecast.record(RANK, 0.1, 4.0)
    assert forecast.usual(RANK) == forecast.seconds(RANK) == 0.1, "what was tried is believed instead"


class Busy:
    """A worker that is held by one request until it is let go, and what the others ran."""

    def __init__(self) -> None:
        self.worker, self.ran = Worker(most_wait_s=1e9), list[str]()
        self._go, self._here = threading.Event(), threading.Event()

    async def hold(self) -> asyncio.Future[Any]:
        """The future of the request that holds the worker, which has begun."""
        self._go.clear()
        self._here.clear()
        future = self.worker.put(Job(self._held, "gate", Kind("Gate")))
        assert await asyncio.to_thread(self._here.wait, 20)
        return future

    def let_go(self) -> None:
        """The worker goes on."""
        self._go.set()

    def ask(self, name: str, kind: Kind, seconds: float = math.inf) -> Job:
        """A request that notes its name and is to be answered within so many seconds."""
        return Job(lambda: self.ran.append(name), name, kind, time.monotonic() + seconds)

    def _held(self) -> None:
        self._here.set()
        assert self._go.wait(20)


@pytest.fixture
async def busy() -> AsyncIterator[Busy]:
    found = Busy()
    yield found
    found.let_go()
    await asyncio.to_thread(found.worker.close)


async def test_no_work_is_begun_for_what_would_be_late(busy: Busy) -> None:
    busy.worker._forecast.record(Kind("Gate"), 1000.0, time.monotonic())
    busy.worker._forecast.record(RANK, 1.0, time.monotonic())
    gate = await busy.hold()
    with pytest.raises(Overloaded, match="ask again in"):
        busy.worker.put(busy.ask("at the door", RANK, 500.0))
    late = busy.ask("at its turn", RANK)
    future = busy.worker.put(late)
    late.deadline = time.monotonic() + 0.5  # less than it takes
    busy.let_go()
    await gate
    with pytest.raises(Late, match="the deadline passed, or would have"):
        await future
    assert not busy.ran


async def test_what_is_dropped_costs_its_caller_nothing(busy: Busy) -> None:
    busy.worker._forecast.record(RANK, 50.0, time.monotonic())
    gate = await busy.hold()
    dropped = [busy.ask("a", RANK) for _ in range(6)]
    futures = [busy.worker.put(one) for one in [*dropped, busy.ask("a", RANK), *(busy.ask("b", RANK) for _ in range(9))]]
    for one in dropped:
        one.deadline = 0.0
    busy.let_go()
    await gate
    ends = await asyncio.gather(*futures, return_exceptions=True)
    assert Counter(type(end) for end in ends) == {Late: 6, type(None): 10}
    assert "a" in busy.ran[:2], "one turn of the other's, and not one for each that was dropped"


async def test_a_slow_first_run_is_tried_again_and_forgotten(busy: Busy) -> None:
    busy.worker._forecast.record(RANK, 600.0, time.monotonic() - AGES)
    gate = await busy.hold()
    tried = busy.worker.put(busy.ask("tried", RANK, 60.0))
    with pytest.raises(Late, match="half of such answers lately took 600,000 ms or more"):
        busy.worker.put(busy.ask("one at a time", RANK, 60.0))
    busy.let_go()
    await asyncio.gather(gate, tried)
    gate = await busy.hold()
    believed = busy.worker.put(busy.ask("believed", RANK, 60.0))
    busy.let_go()
    await asyncio.gather(gate, believed)
    assert busy.ran == ["tried", "believed"]
