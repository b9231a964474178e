"""The four lines, with their stopwatch, their deadline and their exclusions; the parts are real and tiny."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from index.publish import current
from index.snapshot import Snapshot
from ranking.pace import Pace, Stopwatch
from ranking.pipeline import BadScores, Degraded, NoRanker, Ranked, Recommender
from ranking.prompts import RankBudgets, RankPrompts
from ranking.ranker import Ranker, RankerFacts, labels_of, save_ranker
from ranking.tasks import TaskError, tasks_of
from retrieval.data.schema import Dataset, MemberView
from retrieval.encoder import Encoder, save_encoder
from retrieval.features import Quantizer
from retrieval.llama import Size, new_llama
from retrieval.moments import end_of
from retrieval.records import ItemWords, records_of, view_of
from retrieval.refresh import nightly
from retrieval.retrieve import Retriever
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer

SIZE = Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48)


@pytest.fixture(scope="module")
def recommender(
    tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset, tiny_quantizer: Quantizer, tiny_tokens: Tokens
) -> Recommender:
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(5)
    writer = Writer(tiny_tokens, tiny_quantizer, Budgets(item=32, member=96), ("like",))
    save_encoder(folder / "encoder", new_llama(SIZE, len(tiny_tokens), causal_lm=False), writer, {})
    prompts, tasks = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets()), tasks_of(tiny_dataset)
    facts = RankerFacts(tasks, labels_of(tiny_tokens, tasks), RankBudgets(), {}, None, {})
    save_ranker(folder / "ranker", new_llama(SIZE, len(tiny_tokens), causal_lm=True), prompts, facts)
    encoder, ranker = Encoder.load(folder / "encoder"), Ranker.load(folder / "ranker")
    nightly(tiny_dataset, encoder, ranker, folder / "store", end_of(tiny_dataset))
    path: Path | None = current(folder / "store")
    assert path is not None
    snapshot = Snapshot.open(path)
    return Recommender(Retriever.of(snapshot, encoder), ranker)


@pytest.fixture(scope="module")
def views(tiny_dataset: Dataset) -> list[MemberView]:
    words = ItemWords(tiny_dataset.items)
    return [view_of(record, words) for record in records_of(tiny_dataset, end_of(tiny_dataset))]


def test_recommending_is_retrieving_scoring_and_ordering(recommender: Recommender, views: list[MemberView]) -> None:
    view = views[1]
    ranked = recommender.recommend(view, 7, 20)
    candidates = recommender.retrieve(view, 20)
    probabilities = recommender.score(view, candidates.rows)
    best = np.argsort(-probabilities, kind="stable")[:7]
    assert ranked.ids == [candidates.ids[place] for place in best]
    np.testing.assert_array_equal(ranked.places, best)
    np.testing.assert_array_equal(ranked.scores, candidates.scores[best])
    np.testing.assert_allclose(ranked.probabilities, probabilities[best], atol=1e-6)
    assert (ranked.candidates, ranked.degraded, ranked.detail) == (20, Degraded.NONE, "")
    assert list(ranked.places) != sorted(ranked.places), "the tiny ranker should disagree with the tiny encoder"


def test_nobody_is_recommended_their_history(recommender: Recommender, views: list[MemberView]) -> None:
    for view in views[:10]:
        assert view.history
        ranked = recommender.recommend(view, 60, 2_000, exclude=["i2"])
        seen = {done.item.item_id for done in view.history} | {"i2"}
        assert not seen & set(ranked.ids)
        assert len(ranked) == 60 - len(seen)


def test_a_known_vector_gives_the_same_answer(recommender: Recommender, views: list[MemberView]) -> None:
    vector = recommender.retriever.describe(views[3])
    assert recommender.recommend(views[3], 5, vector=vector).ids == recommender.recommend(views[3], 5).ids


def test_tasks_are_questions_of_their_own(recommender: Recommender, views: list[MemberView]) -> None:
    rows = np.arange(10)
    assert recommender.task("") == "label"
    differs = recommender.score(views[0], rows, "label") != recommender.score(views[0], rows, "like")
    assert differs.any()
    with pytest.raises(TaskError, match="dance"):
        recommender.recommend(views[0], 5, task="dance")


def test_relations_reach_the_ranker(recommender: Recommender, views: list[MemberView]) -> None:
    view = views[0]
    assert view.connections
    stranger = MemberView(view.member, view.history, ())
    assert (recommender.score(view, np.arange(8)) != recommender.score(stranger, np.arange(8))).any()


def test_without_a_ranker_only_retrieval_answers(recommender: Recommender, views: list[MemberView]) -> None:
    half = Recommender(recommender.retriever)
    assert len(half.retrieve(views[0], 5)) == 5
    with pytest.raises(NoRanker, match="--ranker"):
        half.recommend(views[0], 5)


def test_a_deadline_that_ranking_would_miss_gives_retrieval_order(recommender: Recommender, views: list[MemberView]) -> None:
    slow = Recommender(recommender.retriever, recommender.ranker)
    slow.pace.record(20, 5.0, time.monotonic())
    late = slow.recommend(views[1], 7, 20, deadline=time.monotonic() + 1.0)
    assert (late.degraded, late.probabilities) == (Degraded.RETRIEVAL_ORDER, None)
    assert "5,000 ms" in late.detail
    assert late.ids == recommender.retrieve(views[1], 7).ids
    assert slow.recommend(views[1], 7, 20, deadline=time.monotonic() + 60).degraded is Degraded.NONE


def test_an_early_answer_is_there_before_ranking(recommender: Recommender, views: list[MemberView]) -> None:
    early: list[Ranked] = []
    watch = Stopwatch()
    ranked = recommender.recommend(views[1], 7, 20, watch=watch, early=early.append)
    assert early[0].degraded is Degraded.RETRIEVAL_ORDER
    assert early[0].ids == recommender.retrieve(views[1], 7).ids
    assert ranked.degraded is Degraded.NONE
    assert set(watch.micros) == {"encode", "search", "rank", "order"} and min(watch.micros.values()) >= 0


def test_no_candidates_is_an_empty_answer(recommender: Recommender, views: list[MemberView]) -> None:
    everything = [f"i{item}" for item in range(60)]
    assert len(recommender.recommend(views[0], 5, exclude=everything)) == 0


def test_scores_that_are_no_probabilities_are_not_served(recommender: Recommender, views: list[MemberView]) -> None:
    class Broken(Ranker):
        def __init__(self) -> None:
            self.facts, self.head = recommender.ranker.facts, None

        def score(self, *_: object) -> np.ndarray:
            return np.array([0.5, math.nan], np.float32)

    with pytest.raises(BadScores):
        Recommender(recommender.retriever, Broken()).score(views[0], np.arange(2))


def test_pace_forecasts_from_runs_near_in_size() -> None:
    pace = Pace()
    assert pace.forecast(1_000, 0.0) == 0.0
    for run in range(4):
        pace.record(10, 0.1, float(run))
        pace.record(1_000, 2.0, float(run))
    assert pace.forecast(1_000, 4.0) == 2.0
    assert pace.forecast(2_000, 4.0) == 4.0
    assert pace.forecast(900, 4.0) == 2.0
    assert pace.forecast(12, 4.0) == pytest.approx(0.12)


def test_a_run_of_one_says_nothing_of_two_thousand() -> None:
    """The member's part is most of what one candidate takes; in proportion it would switch ranking off."""
    pace = Pace()
    pace.record(1, 0.04, 0.0)
    assert pace.forecast(2_000, 1.0) == pace.forecast(4, 1.0) == 0.16, "nothing like it was measured, so it is tried"
    pace.record(2_000, 1.1, 2.0)
    for run in range(4):
        pace.record(1, 0.04, 3.0 + run)
    assert pace.forecast(2_000, 8.0) == 1.1
    for run in range(4):
        pace.record(1, 0.04, 3.0 + Pace.MEMORY_S + run)
    assert pace.forecast(2_000, 8.0 + Pace.MEMORY_S) == 1.1, "the best of what is like it, however long ago"
    assert pace.forecast(1, 8.0 + Pace.MEMORY_S) == 0.04
    pace.record(1, 50.0, 8.0 + Pace.MEMORY_S)
    assert pace.forecast(2_000, 8.0 + Pace.MEMORY_S) == 1.1, "nor does a slow one"


def test_pace_forgets_a_slow_minute() -> None:
    pace = Pace()
    pace.record(100, 0.1, 0.0)
    pace.record(100, 9.0, 100.0)
    assert pace.forecast(100, 101.0) == 9.0
    assert pace.forecast(100, 101.0 + Pace.MEMORY_S) == 0.1
