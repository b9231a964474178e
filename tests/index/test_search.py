from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import index.search
from index.build import build_index
from index.exact import exact_search, overlap
from index.hits import ExclusionError, FilterIgnored, Hits, QueryError, SearchError
from index.recipe import Recipe
from index.search import Searcher

Floats = npt.NDArray[np.float32]


def naive(vectors: Floats, query: Floats, k: int, excluded: set[int]) -> list[tuple[float, int]]:
    scored = [(-float(vector @ query), row) for row, vector in enumerate(vectors) if row not in excluded]
    return [(-score, row) for score, row in sorted(scored)[:k]]


@st.composite
def questions(draw: st.DrawFn) -> tuple[Floats, Floats, int, list[npt.NDArray[np.int64]]]:
    """Small whole numbers: dot products are exact in float32 and ties are everywhere."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, dims, asked = draw(st.integers(0, 40)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    vectors = rng.integers(-2, 3, (count, dims)).astype(np.float32)
    queries = rng.integers(-2, 3, (asked, dims)).astype(np.float32)
    many = draw(st.sampled_from([0, 1, count // 2, count]))
    exclude = [rng.permutation(np.arange(-1, count))[: rng.integers(0, many + 1)].astype(np.int64) for _ in range(asked)]
    return vectors, queries, draw(st.sampled_from([1, 2, 7, 50])), exclude


def check_form(hits: Hits) -> None:
    for rows, scores, count in zip(hits.rows, hits.scores, hits.counts):
        assert (rows[:count] >= 0).all() and (rows[count:] == -1).all() and (scores[count:] == -np.inf).all()
        pairs = list(zip((-scores[:count]).tolist(), rows[:count].tolist()))
        assert pairs == sorted(pairs) and len(set(rows[:count].tolist())) == count


@settings(max_examples=120, deadline=None)
@given(questions(), st.sampled_from([None, 1, 3, 8]))
def test_exact_is_the_sorted_list(question, block_rows: int | None) -> None:
    vectors, queries, k, exclude = question
    hits = exact_search(vectors, queries, k, exclude, block_rows=block_rows)
    check_form(hits)
    assert hits.rows.shape == (len(queries), k) and hits.scores.dtype == np.float32 and hits.counts.dtype == np.int32
    for query in range(len(queries)):
        expected = naive(vectors, queries[query], k, set(exclude[query].tolist()))
        count = hits.counts[query]
        assert list(zip(hits.scores[query, :count].tolist(), hits.rows[query, :count].tolist())) == expected


@settings(max_examples=120, deadline=None)
@given(questions(), st.integers(0, 6), st.integers(1, 6))
def test_search_keeps_its_promises_and_flat_is_exact(question, lists: int, nprobe: int) -> None:
    vectors, queries, k, exclude = question
    lists = min(lists, len(vectors))
    searcher = Searcher(build_index(vectors, Recipe(lists), 0), nprobe=min(nprobe, lists))
    hits, truth = searcher.search(queries, k, exclude), exact_search(vectors, queries, k, exclude)
    check_form(hits)
    assert np.array_equal(hits.counts, truth.counts)  # never short, whatever nprobe
    for query, left_out in enumerate(exclude):
        rows = hits.rows[query, : hits.counts[query]]
        assert not np.isin(rows, left_out).any()
        assert np.array_equal(vectors[rows] @ queries[query], hits.scores[query, : hits.counts[query]])
    if searcher.nprobe in (0, lists):
        assert np.array_equal(hits.scores, truth.scores)  # rows may differ where the last scores tie
        assert (overlap(vectors, queries, hits, truth) == 1).all()


def test_both_ways_of_excluding_agree(unit) -> None:
    vectors, queries = unit(3_000, 16), unit(4, 16, 9)
    few, many = [np.arange(10)] * 4, [np.arange(1_500)] * 4
    for recipe in (Recipe(), Recipe(16)):
        searcher = Searcher(build_index(vectors, recipe, 0), nprobe=recipe.lists)
        for exclude in (few, many, [few[0], many[0], few[0], many[0]]):
            hits, truth = searcher.search(queries, 50, exclude), exact_search(vectors, queries, 50, exclude)
            assert np.array_equal(hits.rows, truth.rows)
            assert np.allclose(hits.scores, truth.scores, atol=1e-6)


def test_two_thousand_of_five_thousand(unit) -> None:
    vectors, queries = unit(5_000, 16), unit(3, 16, 9)
    seen = [np.random.default_rng(q).choice(5_000, 2_900, replace=False) for q in range(3)]
    hits = Searcher(build_index(vectors, Recipe(64), 0), nprobe=1).search(queries, 2_000, seen)
    check_form(hits)
    assert hits.counts.tolist() == [2_000] * 3
    for rows, left_out in zip(hits.rows, seen):
        assert not np.isin(rows, left_out).any()


def test_an_index_that_ignores_its_filter_is_never_believed(unit, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(100, 4)
    searcher = Searcher(build_index(vectors, Recipe(), 0))
    monkeypatch.setattr(searcher._faiss, "SearchParameters", lambda **_: None)
    with pytest.raises(FilterIgnored, match="withheld"):
        searcher.search(vectors[:1], 5, [np.arange(90)])
    assert (searcher.search(vectors[:1], 95, [np.arange(90)]).rows[0, :10] >= 90).all()  # over-fetched: needs no selector


def test_everything_excluded_and_more_asked_than_there_is(unit) -> None:
    vectors = unit(6, 4)
    searcher = Searcher(build_index(vectors, Recipe(), 0))
    hits = searcher.search(vectors[:2], 2_000, [np.arange(6), np.array([2, 2, -1])])
    check_form(hits)
    assert hits.counts.tolist() == [0, 5]
    empty = Searcher(build_index(np.zeros((0, 4), np.float32), Recipe(), 0)).search(vectors, 3)
    assert empty.counts.tolist() == [0] * 6 and (empty.rows == -1).all()


@pytest.mark.parametrize(
    "queries",
    [
        np.ones((2, 3), np.float32),
        np.ones(4, np.float32),
        np.ones((2, 4), np.int64),
        np.array([["a"] * 4]),
        np.array([[1, 2, np.nan, 4]], np.float32),
        np.array([[1, 2, -np.inf, 4]]),
        np.full((1, 4), 1e300),
    ],
)
def test_queries_that_mean_nothing_are_refused(unit, queries) -> None:
    vectors = unit(6, 4)
    with pytest.raises(QueryError):
        Searcher(build_index(vectors, Recipe(), 0)).search(queries, 2)
    with pytest.raises(QueryError):
        exact_search(vectors, queries, 2)


@pytest.mark.parametrize(
    "exclude",
    [[], [np.array([6])], [np.array([-2])], [np.array([0.0])], [np.array([[1]])], [np.array([True])], [np.array([2**40])]],
)
def test_exclusions_that_do_not_fit_give_no_answer(unit, exclude) -> None:
    vectors = unit(6, 4)
    with pytest.raises(ExclusionError):
        Searcher(build_index(vectors, Recipe(), 0)).search(vectors[:1], 2, exclude)
    with pytest.raises(ExclusionError):
        exact_search(vectors, vectors[:1], 2, exclude)


def test_k_and_nprobe_are_checked(unit) -> None:
    vectors = unit(64, 4)
    searcher = Searcher(build_index(vectors, Recipe(4), 0), nprobe=2)
    for arguments in ({"k": 0}, {"k": 1, "nprobe": 0}, {"k": 1, "nprobe": 5}):
        with pytest.raises(SearchError):
            searcher.search(vectors[:1], **arguments)
    for recipe, nprobe in ((Recipe(4), 0), (Recipe(4), 5), (Recipe(), 1)):
        with pytest.raises(SearchError, match="nprobe"):
            Searcher(build_index(vectors, recipe, 0), nprobe=nprobe)


def test_damaged_vectors_cannot_win(unit) -> None:
    vectors = unit(6, 4)
    vectors[3, 1] = np.nan
    with pytest.raises(SearchError, match="vector 3"):
        exact_search(vectors, unit(1, 4), 2)


def test_overlap_is_not_fooled_by_claimed_scores_or_repeats(unit) -> None:
    vectors, queries = unit(50, 4), unit(1, 4, 9)
    truth = exact_search(vectors, queries, 5)
    worst = exact_search(vectors, -queries, 5)
    assert overlap(vectors, queries, truth, truth).tolist() == [1]
    assert overlap(vectors, queries, Hits(worst.rows, truth.scores, truth.counts), truth).tolist() == [0]
    repeated = Hits(np.repeat(truth.rows[:, :1], 5, axis=1), truth.scores, truth.counts)
    assert overlap(vectors, queries, repeated, truth).tolist() == pytest.approx([0.2])


def test_a_snapshot_answers_from_many_threads(make_snapshot, unit) -> None:
    snapshot = make_snapshot(500, recipe="IVF8,Flat")
    searcher = Searcher.of(snapshot)
    assert searcher.nprobe == snapshot.manifest.build["nprobe"] >= 1
    queries = unit(16, 8, 5)
    expected = searcher.search(queries, 10, nprobe=8)
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda q: searcher.search(queries[q : q + 1], 10, [np.zeros(0, int)], nprobe=8).rows[0], range(16))
        assert np.array_equal(np.stack(list(answers)), expected.rows)
    assert index.search.Hits is Hits
