"""The search for the capacity finds what is known, ends in the time that was foretold, and says so where it cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from ranking.serving import recommender_pb2 as pb
from ranking.serving.load import Enough, LoadError, Measured, Target, arrivals, open_load
from ranking.serving.load_bench import BenchWish
from ranking.serving.load_capacity import (
    LEAST_SHARE,
    MOST_PROBES,
    NEEDED,
    PLENTY,
    Capacity,
    NoCapacity,
    Search,
    SearchTooShort,
    Unloaded,
    find_capacity,
    foresee,
    lasting,
    overload_figures,
    prober,
    requests_of_a_probe,
    unloaded,
)
from ranking.serving.load_requests import RequestWish
from ranking.serving.load_server import ServerWish

Answering = Callable[[Callable[[], Awaitable[None]]], str]
REQUEST = pb.RetrieveRequest(k=1).SerializeToString()
IDLE = Unloaded(10.0, 60.0, 300, 24.0)


class Pausing:
    """Everybody waits as long."""

    def __init__(self) -> None:
        self.pause_s, self.asked = 0.0, 0

    async def __call__(self) -> None:
        self.asked += 1
        await asyncio.sleep(self.pause_s)


@pytest.fixture
def pausing(answering: Answering) -> tuple[Pausing, Target]:
    pause = Pausing()
    return pause, Target(answering(pause), "Retrieve", [REQUEST], 20.0)


def silent(*_: object) -> None:
    """Nobody is told."""


def measured(at: np.ndarray, ms: np.ndarray) -> Measured:
    """Ten seconds in which these were answered in full."""
    none = np.zeros(at.size, np.int64)
    return Measured(10.0, 10.0, 100.0, 0.1, 1.0, ["one"], ["e|r"], at, 0.0 * ms, ms, none, none, none, none, 0.0 * ms, ms)


def one_server(rate: float) -> Measured:
    """Even arrivals at one server that takes 10 ms for each: it bears 100 a second, and beyond that the queue grows."""
    at = arrivals(rate, 10, 0, even=True)
    done = 0.0
    ended = []
    for moment in at:
        done = max(done, moment) + 0.01
        ended.append(done)
    return measured(at, (np.array(ended) - at) * 1e3)


def test_the_search_finds_a_capacity_that_is_known() -> None:
    found = find_capacity(one_server, IDLE)
    assert 89 < found.rate <= 101 and found.too_much / found.rate < 1.121
    assert {row["borne"] for row in found.tried if row["rate"] <= found.rate} == {True}
    assert {row["borne"] for row in found.tried if row["rate"] >= found.too_much} == {False}
    facts = found.figures()
    assert facts["capacity_settled"] is True and facts["requests_unloaded"] == 300
    facts = overload_figures(one_server(500), found)
    assert facts["times_capacity"] == pytest.approx(500 / found.rate) and facts["rejected"] == {}
    assert facts["goodput_over_capacity"] < 0.2, "a queue that refuses nothing answers nobody in time"


def test_a_server_that_is_late_at_any_rate_ends_the_search() -> None:
    tried: list[float] = []

    def late(rate: float) -> Measured:
        tried.append(rate)
        return measured(np.arange(100.0), np.full(100, 50.0))

    with pytest.raises(NoCapacity, match="something else runs on this machine"):
        find_capacity(late, IDLE)
    assert LEAST_SHARE * IDLE.foreseen <= min(tried) < IDLE.foreseen and len(tried) <= MOST_PROBES


def test_a_search_ends_with_what_it_knows_when_its_seconds_are_over() -> None:
    probes: list[float] = []

    def probe(rate: float) -> Measured:
        probes.append(rate)
        return one_server(rate)

    def so_many(most: int) -> None:
        probes.clear()
        found.append(find_capacity(probe, IDLE, lambda _: len(probes) < most))

    found: list[Capacity] = []
    so_many(5)
    assert found[0].rate == 81.0 and found[0].too_much == 121.5 and found[0].figures()["capacity_settled"] is False
    assert probes == [24, 36, 54, 81, 121.5], "this was too much once, and there was no time to try it again"
    for most, words in ((4, "81 requests/s are borne and no rate was too much; 12. would"), (0, "no rate was tried; 24 would")):
        with pytest.raises(SearchTooShort, match=words):
            so_many(most)


def test_a_probe_has_as_many_requests_as_the_search_has_time_for() -> None:
    assert requests_of_a_probe(3.3, 280.0) == 154, "a Recommend of 90 ms, in the default of 300 s"
    assert requests_of_a_probe(0.5, 280.0) == NEEDED and requests_of_a_probe(400.0, 280.0) == PLENTY
    assert lasting(3.3, 5.0, 154) == pytest.approx(46.7, abs=0.1) and lasting(160.0, 5.0, 300) == 5.0


def test_what_is_foreseen_is_what_a_queue_of_one_bears() -> None:
    constant = np.full(200, 10.0)
    busy = foresee(constant) / 100
    assert 1 - (1 - busy) * np.exp(busy) == pytest.approx(0.01, abs=0.004), "late: whoever waits for more than one in full"
    mixed = np.where(np.arange(200) < 196, 10.0, 40.0)
    assert foresee(mixed) / 1e3 * mixed.mean() > 2 * busy, "where some take long anyway, p99 leaves room to wait"
    assert foresee(10 * constant) == pytest.approx(foresee(constant) / 10)


def test_one_caller_is_measured_until_it_is_no_maximum_of_a_few(pausing: tuple[Pausing, Target]) -> None:
    handler, target = pausing
    handler.pause_s = 0.01
    idle = unloaded(target, Search(20.0, 0.2))
    assert NEEDED <= idle.requests <= 2 * PLENTY < handler.asked + PLENTY and idle.p99_ms >= 10
    handler.pause_s = 0.1
    with pytest.raises(SearchTooShort, match=r"a 99th percentile needs 120: give --search-seconds [0-9]+ or more"):
        unloaded(target, Search(4.0, 0.2))


def test_a_probe_ends_when_it_is_known_that_the_rate_is_too_much(pausing: tuple[Pausing, Target]) -> None:
    handler, target = pausing
    handler.pause_s = 0.02
    at = arrivals(50, 60, seed=3)
    found = open_load(target, at, 60.0, enough=Enough(1.0, 10))
    assert 10 <= found.at.size < at.size / 2, "nobody sends the rest of a minute to hear the same"
    np.testing.assert_allclose(found.at, at[: found.at.size], atol=1e-5, err_msg="nothing that was due before is left out")
    assert found.whole_p99 >= 20 and handler.asked == found.at.size
    whole = open_load(target, at[:40], 1.0, enough=Enough(20_000.0, 1))
    assert whole.at.size == 40


def test_no_two_probes_are_the_same_bursts_and_each_says_what_it_is(pausing: tuple[Pausing, Target]) -> None:
    told: list[str] = []
    probe = prober(pausing[1], Search(60.0, 0.2, seed=7), 10, 20_000.0, lambda name, *_: told.append(name))
    one, two = probe(50.0), probe(50.0)
    assert one.at.size and not np.array_equal(one.at[:5], two.at[:5])
    assert {"probe 1, 50/s", "probe 2, 50/s"} <= set(told)


def test_what_a_measurement_takes_is_foretold() -> None:
    server, asked = ServerWish(Path("store"), Path("encoder")), RequestWish("recommend")
    assert BenchWish(server, asked, rate=5.0, seconds=60.0).foretold() == {"warming": 2.0, "load": 60.0}
    only = BenchWish(server, asked, capacity_only=True, search_seconds=120.0)
    assert only.foretold() == {"warming": 2.0, "search": 120.0}
    assert BenchWish(server, asked, overload=5.0).foretold() == {"warming": 2.0, "search": 300.0, "load": 30.0}
    assert BenchWish(server, asked, batching_budget_ms=9.0).foretold() == {"warming": 2.0, "callers": 25.0}


def test_what_is_not_answered_in_full_is_no_measure(pausing: tuple[Pausing, Target]) -> None:
    handler, target = pausing
    handler.pause_s = 1.0
    with pytest.raises(LoadError, match=r"one by one .* failed .* give a longer --deadline-ms"):
        unloaded(Target(target.address, "Retrieve", [REQUEST], 0.05), Search(20.0, 0.2))
