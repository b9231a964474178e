"""Nights and models that change under a load with filters: nothing fails, nothing is mixed, and all is where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from typer.testing import CliRunner

from index.publish import CURRENT_FILE, current, publish
from index.store import open_store
from ranking.cli.main import app
from ranking.ranker import Ranker
from ranking.serving.load import Measured
from ranking.serving.load_bench import BenchWish, bench_serve
from ranking.serving.load_nights import Models, Night, NoSecondSnapshot, pair_of
from ranking.serving.load_requests import RequestWish
from ranking.serving.load_server import ServerWish
from ranking.serving.load_swap import Move, mixed, seen_swaps, swap_figures
from ranking.serving.stack import MEMBERS_FILE
from retrieval.data.schema import DAY, Dataset
from retrieval.encoder import Encoder
from retrieval.members import MemberStore
from retrieval.moments import end_of
from retrieval.refresh import nightly

ONE, TWO = Night("one", "e", "r"), Night("two", "f", "s")


class Generations(NamedTuple):
    """A store with a night of each of two pairs of models, and a later one of the first pair that is not served."""

    store: Path
    first: ServerWish
    second: Models


@pytest.fixture
def generations(night: Path, copied: Path, tiny_dataset: Dataset) -> Generations:
    served_now = current(copied)
    assert served_now is not None
    for number, days in ((2, 0), (1, 3)):
        reader, judge = Encoder.load(night / f"encoder{number}"), Ranker.load(night / f"ranker{number}")
        members = MemberStore(open_store(f"sqlite:{copied / MEMBERS_FILE}"), reader.fingerprint)
        nightly(tiny_dataset, reader, judge, copied, end_of(tiny_dataset) - days * DAY, members)
    publish(copied, served_now.name)
    options = ["--swap-poll-seconds", "0.1", "--most-wait-ms", "20000"]  # a machine that stands still is no swap's fault
    first = ServerWish(copied, night / "encoder1", night / "ranker1", options=options)
    return Generations(copied, first, Models(night / "encoder2", night / "ranker2"))


@pytest.mark.parametrize(
    ("models", "rate", "seconds", "every", "least"),
    [(False, 20, 6, 3, 80), (True, 20, 6, 3, 80), pytest.param(True, 100, 505, 25, 50_000, marks=pytest.mark.soak)],
)
def test_a_storm_of_swaps_fails_no_request(
    generations: Generations, models: bool, rate: float, seconds: float, every: float, least: int
) -> None:
    before = {name: (generations.store / name).read_text() for name in (CURRENT_FILE, "HISTORY")}
    wish = BenchWish(
        server=generations.first,
        requests=RequestWish("recommend", k=5, fanout=20, filtered=True),
        rate=rate,
        seconds=seconds,
        deadline_s=20.0,
        swap_every=every,
        other=generations.second if models else None,
    )
    found = bench_serve(wish, lambda *_: None)
    facts = found.figures
    assert facts["failed"] == facts["degraded"] == facts["mixed"] == 0 and facts["sent"] == facts["answered"]
    assert facts["pointer_moves"] == seconds // every and facts["sent"] >= least
    assert facts["swaps"] >= seconds // every - 1, "one that comes just before the end may not be seen"
    kinds = {"snapshot": facts["swaps"], "encoder": models * facts["swaps"], "ranker": models * facts["swaps"]}
    assert facts["swaps_by_kind"] == kinds
    assert len(found.run.snapshots) == 2 and len(found.run.models) == 1 + models and facts["p99_ms_during_swap"] > 0
    after = {name: (generations.store / name).read_text() for name in before}
    assert after == before, "the pointer and the way back are as they were"


def test_the_other_night_is_that_of_the_models_that_are_named(generations: Generations, night: Path) -> None:
    store, first, second = generations
    now, other = pair_of(first)
    assert now.encoder == other.encoder and now.ranker == other.ranker and now.snapshot != other.snapshot
    same, changed = pair_of(first, second)
    assert same == now and now.differs(changed) == {"snapshot": True, "encoder": True, "ranker": True}
    unranked, retrieving = replace(first, ranker=None), replace(second, ranker=None)
    assert pair_of(unranked, retrieving)[1] == changed, "without a ranker, whose tokens a night has is nobody's business"
    with pytest.raises(NoSecondSnapshot):
        pair_of(unranked, retrieving, running=True)
    with pytest.raises(NoSecondSnapshot, match="with --other-encoder and --other-ranker and another --as-of"):
        pair_of(first, Models(night / "encoder1", night / "ranker2"))
    words = ["--store", store, "--other-encoder", second.encoder, "--encoder", first.encoder, "--rate", 5]
    assert "go with --swap-every" in CliRunner().invoke(app, ["bench", "serve", *map(str, words)], env={"COLUMNS": "150"}).output


def test_a_store_of_one_night_has_nothing_to_swap(night: Path, copied: Path) -> None:
    with pytest.raises(NoSecondSnapshot, match="another --as-of"):
        pair_of(ServerWish(copied, night / "encoder1", night / "ranker1"))


def run_of(at: np.ndarray, ms: np.ndarray, snapshot: np.ndarray, model: np.ndarray) -> Measured:
    """Ten seconds of answers of two nights."""
    none = np.zeros(at.size, np.int64)
    names = (["one", "two"], ["e|r", "f|s", "f|", "e|s"])
    return Measured(10.0, 10.0, 100.0, 0.1, 1.0, *names, at, 0.0 * ms, ms, none, none, snapshot, model, 0.0 * ms, ms)


def test_what_lies_around_a_swap_is_told_apart() -> None:
    at = np.arange(0, 10, 0.1)
    away = ((at >= 3.55) & (at < 7.25)).astype(np.int64)
    ms = np.where((at > 2) & (at < 4.6), 50.0, 5.0)
    run = run_of(at, ms, away, away)
    moves = [Move(103.0, TWO), Move(107.0, ONE), Move(109.95, TWO)]
    swaps = seen_swaps(run, moves)
    assert [(round(swap.moved, 3), round(swap.seen, 3)) for swap in swaps] == [(3.0, 3.6), (7.0, 7.3)], (
        "the last was not followed"
    )
    found = swap_figures(run, moves, (ONE, TWO))
    assert (found["pointer_moves"], found["swaps"], found["swap_seconds"]) == (3, 2, pytest.approx(0.6))
    assert (found["p99_ms_during_swap"], found["p99_ms_rest"]) == (50, 5) and found["sent_during_swap"] == 27 + 23
    assert found["swaps_by_kind"] == {"snapshot": 2, "encoder": 2, "ranker": 2} and found["mixed"] == 0
    alike = swap_figures(run, moves, (ONE, replace(TWO, encoder="e")))
    assert alike["swaps_by_kind"] == {"snapshot": 2, "encoder": 0, "ranker": 2}


def test_an_answer_of_two_nights_is_counted() -> None:
    at = np.arange(5.0)
    model = np.array([0, 1, 2, 3, 1])
    assert mixed(run_of(at, at, np.array([0, 1, 1, 0, 0]), model), (ONE, TWO)) == 2, "e|s of the one, f|s of the one"
    assert json.dumps(mixed(run_of(at, at, np.array([0, 1, 1, 1, 1]), model), (ONE, TWO))) == "1"
