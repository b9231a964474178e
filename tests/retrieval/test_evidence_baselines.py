"""Baselines on a checkerboard whose right answer is known, and each formula against a slow twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from retrieval.data.schema import DAY, Dataset
from retrieval.evidence.baselines import Baseline, Ease, ItemNeighbours, Oracle, Past, Random
from retrieval.evidence.blends import Blend, standardised
from retrieval.evidence.choice import choose_baselines, families
from retrieval.evidence.metrics import judge
from retrieval.evidence.popularity import Freshness, LivePopularity, Popularity
from retrieval.evidence.protocol import EvidenceError, Queries, last_after_cut
from retrieval.evidence.rank import rank_queries
from retrieval.evidence.text_baselines import Bm25, TfIdf
from retrieval.terms import Terms


@pytest.fixture(scope="module")
def asked(tiny_dataset: Dataset) -> tuple[Past, Queries]:
    return Past(tiny_dataset, "test"), last_after_cut(tiny_dataset)


@pytest.mark.parametrize("baseline", [ItemNeighbours(), Ease(penalty=5), TfIdf(), Bm25(), TfIdf(profile=0.5)])
def test_what_reads_the_history_puts_the_own_topic_first(asked: tuple[Past, Queries], baseline: Baseline) -> None:
    past, queries = asked
    ranked = rank_queries(queries, baseline.fit(past), len(past.dataset.items), depth=5)
    own = (ranked.rows % 4) == (queries.member % 4)[:, None]
    assert own.mean() > 0.85  # a few members have seen nearly all of their topic


@pytest.mark.parametrize("baseline", [Random(), Popularity(), LivePopularity()])
def test_what_does_not_read_the_history_knows_no_topic(asked: tuple[Past, Queries], baseline: Baseline) -> None:
    past, queries = asked
    ranked = rank_queries(queries, baseline.fit(past), len(past.dataset.items), depth=5)
    assert ((ranked.rows % 4) == (queries.member % 4)[:, None]).mean() < 0.5


def test_frozen_popularity_counts_nothing_after_the_cut_and_live_nothing_of_the_day(asked: tuple[Past, Queries]) -> None:
    past, queries = asked
    log = past.dataset.engagements
    np.testing.assert_array_equal(
        Popularity().fit(past)(queries)[0], np.bincount(log.item[log.timestamp < past.before], minlength=60)
    )
    scores = LivePopularity(2).fit(past)(queries)
    for row in (0, len(queries) - 1):
        day = queries.timestamp[row] // DAY
        window = (log.day >= day - 2) & (log.day < day)
        np.testing.assert_array_equal(scores[row], np.bincount(log.item[window], minlength=60))


def test_live_popularity_that_fades_knows_the_day_before_best_and_nothing_of_the_day(asked: tuple[Past, Queries]) -> None:
    past, queries = asked
    log = past.dataset.engagements
    baseline = LivePopularity(half_life=3.0)
    assert (baseline.name, baseline.setting) == ("Live popularity, fading", "half-life 3 d")
    scores = baseline.fit(past)(queries)
    for row in (0, len(queries) - 1):
        day = queries.timestamp[row] // DAY
        weight = np.where(log.day < day, 0.5 ** ((day - 1 - log.day) / 3.0), 0.0)
        np.testing.assert_allclose(scores[row], np.bincount(log.item, weight, 60), rtol=1e-5)


def test_a_half_life_halves(asked: tuple[Past, Queries]) -> None:
    past, queries = asked
    log = past.events
    weight = np.power(0.5, (past.before - log.timestamp) / (3 * DAY))
    expected = np.bincount(log.item, weight, 60)
    np.testing.assert_allclose(Popularity(3).fit(past)(queries)[0], expected, rtol=1e-5)


def test_freshness_learns_the_rate_by_age_and_puts_the_unborn_last(tiny_dataset: Dataset) -> None:
    """Items of 3 days draw events in a log where every event falls on the third day of an item's life."""
    created = np.repeat(np.arange(20), 3)[:60] * DAY + tiny_dataset.meta.cut_test - 18 * DAY
    log = tiny_dataset.events
    age = (log.timestamp - created[log.item]) // DAY
    kept = log.take(age == 3)
    dataset = replace(tiny_dataset, events=kept, items=replace(tiny_dataset.items, created_at=created.astype(np.int64)))
    queries = last_after_cut(tiny_dataset)
    scores = Freshness().fit(Past(dataset, "test"))(queries)
    for row in range(len(queries)):
        ages = queries.day[row] - created // DAY
        assert set(np.flatnonzero(scores[row] == scores[row].max())) == set(np.flatnonzero(ages == 3))
        unborn = ages < 0
        assert not unborn.any() or scores[row][unborn].max() < scores[row][~unborn].min()


def test_fitting_never_looks_past_the_cut(tiny_dataset: Dataset) -> None:
    """Whatever others do after the cut, frozen scores stay; the members' own histories are kept."""
    queries = last_after_cut(tiny_dataset)
    log = tiny_dataset.events
    early = log.timestamp < tiny_dataset.meta.cut_test
    shuffled = replace(log, item=np.where(early, log.item, (log.item + 13) % 60).astype(np.int32))
    other = replace(tiny_dataset, events=shuffled)
    for baseline in (Popularity(), Popularity(7), ItemNeighbours(), Ease(), TfIdf(), Bm25()):
        before, after = baseline.fit(Past(tiny_dataset, "test"))(queries), baseline.fit(Past(other, "test"))(queries)
        np.testing.assert_array_equal(before, after, err_msg=baseline.name)


def test_neighbours_equal_a_dense_twin(asked: tuple[Past, Queries]) -> None:
    past, queries = asked
    matrix = past.matrix.toarray()
    together = matrix.T @ matrix
    norm = np.sqrt(np.diag(together))
    similar = together / (norm[:, None] * norm[None, :] + 10)
    np.fill_diagonal(similar, 0)
    history = queries.history[0]
    weight = 0.8 ** np.arange(len(history))[::-1]
    expected = weight @ similar[queries.events.item[history]]
    scores = ItemNeighbours(neighbours=60, shrink=10, decay=0.8).fit(past)(queries)
    np.testing.assert_allclose(scores[0], expected, rtol=1e-4, atol=1e-6)


def test_ease_solves_its_equations(asked: tuple[Past, Queries]) -> None:
    past, _ = asked
    head = np.flatnonzero(past.counts > 0)
    weights = past.ease(head, 10.0).astype(np.float64)
    matrix = past.matrix[:, head].toarray().astype(np.float64)
    gram = matrix.T @ matrix
    gradient = gram @ weights - gram + 10.0 * weights
    np.fill_diagonal(gradient, 0)
    assert np.abs(np.diag(weights)).max() == 0
    assert np.abs(gradient).max() < 1e-2


def test_tfidf_rows_have_length_one_and_strange_words_do_not_matter(tiny_dataset: Dataset) -> None:
    terms = Terms.of_items(tiny_dataset.items)
    vectors = terms.tfidf(terms.counts)
    np.testing.assert_allclose(np.sqrt(vectors.multiply(vectors).sum(axis=1)), 1, rtol=1e-5)
    assert terms.count(["never-seen words only", ""]).nnz == 0
    longer = replace(tiny_dataset.items, text=["<|item|> \x00 " + "a" * 100_000, *tiny_dataset.items.text[1:]])
    assert Terms.of_items(longer).counts.shape[0] == 60


def test_the_oracle_is_the_ceiling_and_must_know_the_catalogue(asked: tuple[Past, Queries]) -> None:
    past, queries = asked

    class Known:
        def engage_scores(self, member_row: int, timestamp: int) -> np.ndarray:
            row = np.flatnonzero((queries.member == member_row) & (queries.timestamp == timestamp))[0]
            scores = np.zeros(60)
            scores[queries.targets[row]] = 1
            return scores

    ranked = rank_queries(queries, Oracle(Known()).fit(past), 60)
    assert judge(ranked, queries, 60).metrics["ndcg@10"].value == 1

    class Smaller:
        def engage_scores(self, member_row: int, timestamp: int) -> np.ndarray:
            return np.zeros(3 + 0 * member_row * timestamp)

    with pytest.raises(EvidenceError, match="knows 3 items"):
        Oracle(Smaller()).fit(past)(queries)


def test_settings_come_from_the_validation_window_alone(tiny_dataset: Dataset) -> None:
    chosen = choose_baselines(tiny_dataset)
    cut = tiny_dataset.meta.cut_test
    until = replace(tiny_dataset, events=tiny_dataset.events.before(cut))
    assert choose_baselines(until) == chosen
    assert len({baseline.name for baseline in chosen}) == len(chosen) >= len(families(tiny_dataset)) + 1
    blend = chosen[-1]
    assert isinstance(blend, Blend)
    assert blend.knowledge == "live"
    assert max(blend.weights) == 1


def test_standardised_rows() -> None:
    rows = standardised(np.array([[1, 2, 3], [5, 5, 5]], np.float32))
    np.testing.assert_allclose(rows, [[-1.2247, 0, 1.2247], [0, 0, 0]], atol=1e-3)
