"""The capacity model: formulas against closed ones, and against a simulation of every request."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from ranking.capacity import MOST_TOGETHER, MOST_WAIT_S, Layout, Load, Prices, dollars, plan, published_gpus
from ranking.capacity_queues import (
    CELLS,
    Batches,
    CapacityError,
    Times,
    batched,
    constant,
    let_in,
    lognormal,
    must_wait,
    spread,
    waits,
)
from ranking.capacity_simulation import MARGIN_BUSY, MARGIN_P99, MOST_WAITING, Line, check, serve
from ranking.cli.main import app
from ranking.serving import load_shed, worker
from ranking.serving.server import ServeSettings

OPEN = Line(most_waiting=10**9, most_wait_s=math.inf)
"""A line without bounds, as the closed formulas have it."""


def waits_md1(busy: float, seconds: float) -> float:
    """P(wait <= seconds) where every service takes one second (Erlang 1909)."""
    return (1 - busy) * math.fsum(
        (busy * (k - seconds)) ** k / math.factorial(k) * math.exp(-busy * (k - seconds)) for k in range(int(seconds) + 1)
    )


def exponential(step: float) -> Times:
    cells = np.exp(-np.arange(3_000) * step)
    mass = cells - np.append(cells[1:], 0.0)
    return spread((np.arange(3_000) + 0.5) * step, mass, step)


def simulated(busy: float, services: np.ndarray, line: Line) -> np.ndarray:
    came = np.cumsum(np.random.default_rng(0).exponential(1 / (busy * line.workers), len(services)))
    done, _ = serve(came, services, line, [""] * len(services))
    return done - came - services


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.85])
def test_services_of_one_length_wait_as_in_md1(busy: float) -> None:
    found = waits(busy, constant(1.0, 1 / 50))
    assert found.mean == pytest.approx(busy / (2 * (1 - busy)), rel=1e-6)
    seen = simulated(busy, np.ones(60_000), OPEN)
    assert seen.mean() == pytest.approx(found.mean, rel=0.06)
    for seconds in (0.5, 1.5, 4.5):
        assert 1 - found.later(seconds) == pytest.approx(waits_md1(busy, seconds), abs=5e-3)
        assert (seen <= seconds).mean() == pytest.approx(waits_md1(busy, seconds), abs=0.02)


@pytest.mark.parametrize(("workers", "busy"), [(1, 0.5), (4, 0.75), (16, 0.75)])
def test_random_services_before_many_workers_wait_as_in_mmc(workers: int, busy: float) -> None:
    load = workers * busy
    terms = [load**n / math.factorial(n) for n in range(workers)]
    last = load**workers / math.factorial(workers) / (1 - busy)
    erlang = last / (sum(terms) + last)
    assert must_wait(load, workers) == pytest.approx(erlang, rel=1e-9)
    found = waits(load, exponential(1 / 50), workers)
    assert found.mean == pytest.approx(erlang / (workers - load), rel=0.01)
    services = np.random.default_rng(1).exponential(1.0, 60_000)
    seen = simulated(busy, services, replace(OPEN, workers=workers))
    for seconds in (0.1, 0.5, 1.0):
        told = erlang * math.exp(-(workers - load) * seconds)
        assert found.later(seconds) == pytest.approx(told, abs=7e-3)
        assert (seen > seconds).mean() == pytest.approx(told, abs=0.02)


@pytest.mark.parametrize("fill", [0.1, 0.5, 0.8])
def test_a_worker_that_takes_what_waits_is_the_chain_of_its_batches(fill: float) -> None:
    work = Batches(0.0136, 0.002, 32)
    rate = fill * work.most_rate
    times, busy = batched(rate, work, 0.0005)
    came = np.cumsum(np.random.default_rng(2).exponential(1 / rate, 40_000))
    done, seconds = serve(came, np.ones(len(came)), replace(OPEN, together=work), [""] * len(came))
    assert (done - came).mean() == pytest.approx(times.mean, rel=0.02)
    assert np.quantile(done - came, 0.99) == pytest.approx(times.quantile(0.99), rel=0.06)
    assert seconds / came[-1] == pytest.approx(busy, abs=0.01)


def test_who_would_wait_too_long_is_refused_as_often_as_told() -> None:
    service = lognormal(0.155, 0.2, 0.155 / 50)
    found, refused = let_in(waits(0.45 / 0.155, service), 0.45, MOST_WAIT_S)
    rng = np.random.default_rng(3)
    came = np.cumsum(rng.exponential(0.155 / 0.45, 60_000))
    done, _ = serve(came, service.at(rng.random(60_000)), Line(), [f"{row % 64}" for row in range(60_000)])
    answered = np.isfinite(done)
    assert 0 < refused < 0.01 and found.later(MOST_WAIT_S) == pytest.approx(0, abs=1e-12)
    assert 1 - answered.mean() == pytest.approx(refused, abs=0.004)
    assert np.quantile((done - came)[answered], 0.99) == pytest.approx(found.then(service).quantile(0.99), rel=MARGIN_P99)


def test_a_full_line_refuses_by_count() -> None:
    done, busy = serve(np.zeros(10), np.ones(10), Line(most_waiting=3, most_wait_s=math.inf), [""] * 10)
    assert np.isfinite(done).sum() == 3 and busy == 3.0


def test_the_slowest_of_many_and_one_after_the_other() -> None:
    dice = Times(1.0, np.append(0.0, np.full(6, 1 / 6)))
    assert dice.slowest(2).mean == pytest.approx(161 / 36) and dice.then(dice).quantile(0.5) == 7.0
    assert Times(1.0, np.array([0.5, 0.2])).quantile(0.9) == math.inf


@pytest.mark.parametrize("search", ["exact", "approximate"])
def test_a_plan_agrees_with_its_simulation(search: str) -> None:
    load = Load(items=8e6, rate=200, candidates=200)
    found = check(plan(load, Layout(search=search)), shards=8, replicas=2, requests=8_000)  # type: ignore[arg-type]
    assert found["agrees"], found
    assert found["busy_difference"] <= MARGIN_BUSY and 0 <= found["refused_simulated"] < 0.02


def test_a_plan_that_is_wrong_does_not_agree() -> None:
    """The check can fail: it asks what the plan told, of its times and of how busy its lines are."""
    found = plan(Load(items=4e6, rate=100, candidates=200), Layout())
    quick = [replace(one, times=Times(one.times.step / 10, one.times.mass)) for one in found.stages]
    idle = [replace(one, busy=one.busy / 2) for one in found.stages]
    plans = [replace(found, stages=tuple(stages)) for stages in (found.stages, quick, idle)]
    agrees = [check(told, shards=4, replicas=2, requests=4_000) for told in plans]
    assert [one["agrees"] for one in agrees] == [True, False, False]
    assert agrees[1]["p99_ms_computed"] == pytest.approx(float(agrees[0]["p99_ms_computed"]) / 10, rel=0.01)


def test_services_that_vary_much_stay_on_the_grid() -> None:
    far = lognormal(1.0, 3.0, 1 / 500)
    assert far.mass.shape == (CELLS,) and 0.9 < far.mass.sum() < 1, "what lies beyond the last cell is later than all"
    assert spread(np.array([1e12]), np.ones(1), 1e-3).quantile(0.5) == math.inf


def test_what_runs_out_first_decides_the_machines() -> None:
    search = plan(Load(), Layout()).stages[1]
    many = Prices(cores=64, memory_gb=1e6, memory_gb_s=1e6)
    assert search.machines(many) == math.ceil(search.lines / 64)
    assert search.machines(replace(many, memory_gb=6.5)) == math.ceil(search.lines / 10), "each holds .648 GB"
    assert search.machines(replace(many, memory_gb_s=2.5 * search.gb_s)) == math.ceil(search.lines / 2)
    with pytest.raises(CapacityError, match="too much"):
        search.machines(replace(many, memory_gb=0.5))


def test_more_load_needs_more_and_twice_the_items_twice_the_search() -> None:
    small, large = plan(Load(items=50e6), Layout()), plan(Load(items=100e6), Layout())
    assert large.stages[1].lines == 2 * small.stages[1].lines and large.stages[2].lines == small.stages[2].lines
    assert dollars(10, 3.6, 1_000) == pytest.approx(10.0)
    assert published_gpus(Load(items=300e6, rate=3_000, candidates=2_200)) == pytest.approx({"search": 24, "rank": 3_000})


def test_the_lines_are_the_servers() -> None:
    assert (MOST_WAIT_S, MOST_TOGETHER) == (load_shed.MOST_WAIT_S, worker.MOST_TOGETHER)
    assert ServeSettings().most_waiting == MOST_WAITING


@pytest.mark.parametrize("wrong", ["--busy=1", "--items=1 --fill=0"])
def test_what_makes_no_sense_is_refused(wrong: str) -> None:
    done = CliRunner().invoke(app, ["bench", "capacity", *wrong.split()])
    assert isinstance(done.exception, CapacityError)


def test_overload_is_an_error() -> None:
    with pytest.raises(CapacityError, match="bear less"):
        must_wait(4.0, 4)
    with pytest.raises(CapacityError, match="bears less"):
        batched(500.0, Batches(0.0136, 0.002, 32), 0.001)


def test_the_command_says_where_its_figures_come_from() -> None:
    words = "bench capacity --items 3e6 --rate 20 --requests 2000 --simulated-shards 2 --json"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert all(unit["where"] for unit in told["units"].values())
    assert told["cpu"]["machines"] == sum(stage["machines"] for stage in told["stages"])
    assert told["check"]["requests"] == 2_000 and told["stages"][1]["shards"] == 3
