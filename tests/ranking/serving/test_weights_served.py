"""Weights of several tasks, and wishes, over the wire: the order, the formula and each task in every call that ranks."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from ranking.pace import Pace
from ranking.pipeline import Degraded
from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import Call, rank, recommend
from ranking.serving.explain import explain
from ranking.serving.messages import pack_ids, unpack_ids
from ranking.serving.stack import Stack
from ranking.serving.weights import own_probabilities
from ranking.tasks_weighted import WeightsError
from ranking.wishes import FACTOR

WEIGHTS = [pb.Weight(task="like", weight=2.0), pb.Weight(task="label", weight=-1.0)]


def call() -> Call:
    return Call("request", time.monotonic(), started=time.monotonic())


def floats(column: bytes) -> np.ndarray:
    return np.frombuffer(column, "<f4")


def test_a_weighted_answer_holds_its_formula_and_every_task(stack: Stack) -> None:
    member = pb.Member(id="m3")
    response = recommend(stack, pb.RecommendRequest(member=member, k=12, fanout=30, weights=WEIGHTS), call())
    assert [(one.task, one.weight) for one in response.weights] == [("like", 2.0), ("label", -1.0)] and response.task == ""
    columns = {one.task: floats(one.probabilities) for one in response.results.tasks}
    score = floats(response.results.probabilities)
    np.testing.assert_allclose(score, (2 * columns["like"] - columns["label"]) / 3, atol=1e-6)
    assert len(score) == 12 and (np.diff(score) <= 0).all()
    for name, column in columns.items():
        alone = rank(stack, pb.RankRequest(member=member, items=response.results.ids, task=name), call()).results
        found = dict(zip(unpack_ids(alone.ids), floats(alone.probabilities).tolist()))
        np.testing.assert_allclose([found[item] for item in unpack_ids(response.results.ids)], column, atol=1e-6)
    ranked = rank(stack, pb.RankRequest(member=member, items=response.results.ids, weights=WEIGHTS), call())
    assert unpack_ids(ranked.results.ids) == unpack_ids(response.results.ids)
    np.testing.assert_allclose(floats(ranked.results.probabilities), score, atol=1e-6)
    assert len(ranked.results.tasks) == len(ranked.weights) == 2


def test_without_weights_nothing_of_them_is_said(stack: Stack) -> None:
    response = recommend(stack, pb.RecommendRequest(member=pb.Member(id="m3")), call())
    assert not response.weights and not response.results.tasks and response.task == "label"
    ranked = rank(stack, pb.RankRequest(member=pb.Member(id="m3"), items=pack_ids(["i1", "i2"]), task="like"), call())
    assert not ranked.weights and not ranked.results.tasks and ranked.task == "like"


def test_bad_weights_are_refused_before_any_work(stack: Stack) -> None:
    for weights in ([WEIGHTS[0], WEIGHTS[0]], [pb.Weight(task="like")], [pb.Weight(task="like", weight=math.inf)]):
        with pytest.raises(WeightsError):
            recommend(stack, pb.RecommendRequest(member=pb.Member(id="m3"), weights=weights), call())
    with pytest.raises(WeightsError, match="ask for one task"):
        rank(stack, pb.RankRequest(member=pb.Member(id="m3"), items=pack_ids(["i1"]), task="like", weights=WEIGHTS), call())


def test_an_explanation_knows_the_weights(stack: Stack) -> None:
    question = pb.RecommendRequest(member=pb.Member(id="m3"), k=5, fanout=10, weights=WEIGHTS)
    answer = recommend(stack, question, call())
    best = unpack_ids(answer.results.ids)[0]
    told = explain(stack, pb.ExplainRequest(question=question, item_id=best), call())
    assert told.place == 0 and told.probability == pytest.approx(float(floats(answer.results.probabilities)[0]), abs=1e-6)


def test_a_late_weighted_answer_still_tells_its_formula(stack: Stack) -> None:
    slow = Pace()
    slow.record(2_000, 5.0, time.monotonic())
    slowed = replace(stack, recommender=replace(stack.recommender, pace=slow))
    late = Call("request", time.monotonic(), deadline=time.monotonic() + 0.5, started=time.monotonic())
    response = recommend(slowed, pb.RecommendRequest(member=pb.Member(id="m3"), k=5, fanout=10, weights=WEIGHTS), late)
    assert response.degraded == pb.RETRIEVAL_ORDER == Degraded.RETRIEVAL_ORDER
    assert len(response.weights) == 2 and not response.results.tasks


def test_a_plain_wish_is_obeyed_by_every_call_that_ranks_and_told(stack: Stack) -> None:
    """The order is that of the moved score; the ranker's own probabilities stand beside it, as several tasks' do."""
    member, wish = pb.Member(id="m3"), "no chess, more gardens"
    response = recommend(stack, pb.RecommendRequest(member=member, k=50, fanout=50, instruction=wish, readable=True), call())
    assert [(one.kind, one.said) for one in response.wishes] == [("no", "no chess"), ("more", "more gardens")]
    rows = response.results.items
    named = [row.category for row in rows]
    assert [one.items for one in response.wishes] == [named.count("chess"), named.count("gardens")]
    assert own_probabilities(response) == response.results.tasks[0].probabilities, "meters and the journal see the ranker's own"
    (own,) = (dict(zip(unpack_ids(response.results.ids), floats(one.probabilities).tolist())) for one in response.results.tasks)
    for row in rows:
        said = own[row.item_id]
        moved = {"chess": 0.0, "gardens": FACTOR * said / (1 - said + FACTOR * said)}.get(row.category, said)
        assert row.probability == pytest.approx(moved, abs=1e-6)
    assert {row.category for row in rows[-named.count("chess") :]} == {"chess"}
    ranked = rank(stack, pb.RankRequest(member=member, items=response.results.ids, instruction=wish), call())
    assert unpack_ids(ranked.results.ids) == unpack_ids(response.results.ids)
    assert [(one.kind, one.items) for one in ranked.wishes] == [(one.kind, one.items) for one in response.wishes]
    one = next(row for row in rows if row.category == "chess")
    question = pb.RecommendRequest(member=member, k=50, fanout=50, instruction=wish)
    assert explain(stack, pb.ExplainRequest(question=question, item_id=one.item_id), call()).probability == 0
    question = pb.RecommendRequest(member=member, k=5, fanout=5, instruction="only gardens")
    told = recommend(stack, pb.RecommendRequest(member=member, k=5, fanout=5, readable=True), call()).results.items
    other = next(row for row in rows if row.category != "gardens" and row.item_id not in {item.item_id for item in told})
    assert {row.category for row in told} & {"gardens"}, "or this asks nothing"
    assert explain(stack, pb.ExplainRequest(question=question, item_id=other.item_id), call()).probability == 0


def test_a_wish_goes_to_the_bottom_of_a_score_with_a_weight_below_zero(stack: Stack) -> None:
    asked = pb.RecommendRequest(
        member=pb.Member(id="m3"), k=50, fanout=50, weights=WEIGHTS, instruction="no chess", readable=True
    )
    response = recommend(stack, asked, call())
    assert {row.probability for row in response.results.items if row.category == "chess"} == {-1.0}
    assert len(response.results.tasks) == 2 and len(response.wishes) == 1 and own_probabilities(response) == b""


def test_what_is_not_understood_moves_nothing_and_is_not_told(stack: Stack) -> None:
    response = recommend(stack, pb.RecommendRequest(member=pb.Member(id="m3"), instruction="chess bores me"), call())
    assert not response.wishes and not response.results.tasks
