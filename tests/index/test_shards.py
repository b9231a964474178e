"""Many shards answer as one index does: the same rows, ties and filters, k whenever k exist, and never without a shard."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.build import build
from index.certified import Certified
from index.filters import FilterError, RowSet
from index.hits import Hits, Rows, SearchError
from index.int8 import Crew
from index.recipe import Recipe
from index.search import Searcher
from index.shards import ShardError, Shards, by_hash, one_by_one

Array = npt.NDArray[np.float32]


def grid(rng: np.random.Generator, count: int) -> Array:
    """Vectors of few whole numbers: many ties, and sums that are exact in any order."""
    return rng.integers(-2, 3, (count, 6)).astype(np.float32)


def names(count: int) -> list[str]:
    return [f"item-{row}" for row in range(count)]


def by_range(count: int, shards: int) -> list[Rows]:
    return np.array_split(np.arange(count), shards)


def assembled(vectors: Array, parts: list[Rows], exact: bool, threads: int = 1) -> Shards:
    def searcher(rows: Rows) -> Searcher | Certified:
        return Certified(vectors[rows]) if exact else Searcher(build(vectors[rows], recipe=Recipe(), k=5).index)

    each = one_by_one if threads == 1 else Crew(threads).each
    return Shards([searcher(rows) for rows in parts], parts, each)


def true_top(vectors: Array, query: Array, k: int, permitted: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    rows = np.flatnonzero(permitted)
    return rows[np.lexsort((rows, -(vectors[rows] @ query)))][:k]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 90),
    shards=st.integers(1, 6),
    k=st.integers(1, 100),
    hashed=st.booleans(),
    exact=st.booleans(),
)
def test_shards_answer_what_numpy_finds_in_the_whole(
    seed: int, count: int, shards: int, k: int, hashed: bool, exact: bool
) -> None:
    rng = np.random.default_rng(seed)
    vectors, queries = grid(rng, count), grid(rng, 4)
    excluded = [rng.integers(-1, count, rng.integers(0, count + 1)) for _ in range(4)]
    masks = rng.random((3, count)) < rng.random()
    allow = [*(RowSet.where(mask) for mask in masks), None]
    parts = by_hash(names(count), shards) if hashed else by_range(count, shards)
    hits = assembled(vectors, parts, exact, threads=2 if seed % 2 else 1).search(queries, k, excluded, allow=allow)
    for query in range(4):
        permitted = np.ones(count, np.bool_) if query == 3 else masks[query].copy()
        permitted[excluded[query][excluded[query] >= 0]] = False
        wanted = true_top(vectors, queries[query], k, permitted)
        assert hits.counts[query] == min(k, permitted.sum())
        found = hits.rows[query, : len(wanted)]
        if exact:
            np.testing.assert_array_equal(found, wanted)
        assert permitted[found].all() and len(np.unique(found)) == len(found)  # FAISS chooses among those that tie for the end
        np.testing.assert_array_equal(hits.scores[query, : len(wanted)], vectors[wanted] @ queries[query])
        assert (hits.rows[query, len(wanted) :] == -1).all()


def test_over_ivf_the_answer_is_the_merge_of_what_the_shards_find(unit: Callable[..., Array]) -> None:
    vectors, queries = unit(400, 8), unit(5, 8, 1)
    parts = by_range(400, 2)
    searchers = [Searcher(build(vectors[rows], recipe=Recipe(lists=8), k=20).index, nprobe=2) for rows in parts]
    shards = Shards(searchers, parts)
    hits, found = shards.search(queries, 30), [one.search(queries, 30) for one in searchers]
    for query in range(5):
        rows = np.concatenate([found[0].rows[query], found[1].rows[query] + 200])
        scores = np.concatenate([found[0].scores[query], found[1].scores[query]])
        order = np.lexsort((rows, -scores))[:30]
        np.testing.assert_array_equal(hits.rows[query], rows[order])
        np.testing.assert_array_equal(hits.scores[query], scores[order])


def test_an_id_stays_in_its_shard_and_shards_are_about_equal() -> None:
    parts = by_hash(names(4_000), 8)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(4_000))
    assert min(map(len, parts)) > 400 and max(map(len, parts)) < 600
    fewer = by_hash(names(1_000), 8)
    assert all(set(few) <= set(many) for few, many in zip(fewer, parts))


def test_shards_that_do_not_make_up_one_index_are_refused(unit: Callable[..., Array]) -> None:
    vectors = unit(6, 8)
    with pytest.raises(ShardError, match=r"not 0\.\.5, each once"):
        assembled(vectors, [np.array([0, 1, 2]), np.array([2, 3, 4])], exact=True)
    with pytest.raises(ShardError, match="the rows rising"):
        assembled(vectors, [np.array([0, 2, 1]), np.array([3, 4, 5])], exact=True)
    for searchers, rows in (
        ([], []),
        ([Certified(vectors)], []),
        ([Certified(vectors[:, :4]), Certified(vectors)], [None, None]),
    ):
        with pytest.raises(ShardError, match="expected one length"):
            Shards(searchers, rows)
    with pytest.raises(ShardError, match="0 shards"):
        by_hash(["a"], 0)


def test_a_filter_of_another_index_and_a_failing_shard_give_no_answer(unit: Callable[..., Array]) -> None:
    vectors = unit(20, 8)
    shards = assembled(vectors, by_range(20, 2), exact=True)
    with pytest.raises(FilterError, match="made for another snapshot"):
        shards.search(unit(1, 8), 3, allow=RowSet.every(19))

    class Broken(Certified):
        def search(self, *_: object, **__: object) -> Hits:
            raise SearchError("gone")

    parts = by_range(20, 2)
    with pytest.raises(SearchError, match="gone"):
        Shards([kind(vectors[rows]) for kind, rows in zip((Certified, Broken), parts)], parts).search(unit(1, 8), 3)


def test_shards_are_asked_by_a_crew_of_as_many_threads_as_it_has_and_each_computes_with_one(unit: Callable[..., Array]) -> None:
    vectors, seen = unit(70, 8), []

    class Watched(Certified):
        def search(self, *given: Any, **named: Any) -> Hits:
            seen.append((threading.current_thread().name, faiss.omp_get_max_threads()))
            return super().search(*given, **named)

    parts, crew = by_range(70, 7), Crew(2)
    each = [Watched(vectors[rows], threads=1) for rows in parts]
    hits = Shards(each, parts, crew.each).search(vectors[:3], 9)
    np.testing.assert_array_equal(hits.rows, Certified(vectors, threads=1).search(vectors[:3], 9).rows)
    names = {name for name, _ in seen}
    assert len(seen) == 7 and len(names) <= 2 and all(name.startswith("scan") for name in names)
    assert {cores for _, cores in seen} == {1}
