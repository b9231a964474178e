"""Many shards answer as one index does: the same rows, ties and filters, k whenever k exist, and never without a shard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.build import Recipe, build
from index.certified import Certified
from index.filters import FilterError, RowSet
from index.hits import Hits, SearchError
from index.ids import Ids
from index.search import Searcher
from index.shards import Shard, ShardError, Shards, by_hash, by_range, write_shards
from index.snapshot import Snapshot

Array = npt.NDArray[np.float32]


def grid(rng: np.random.Generator, count: int) -> Array:
    """Vectors of few whole numbers: many ties, and sums that are exact in any order."""
    return rng.integers(-2, 3, (count, 6)).astype(np.float32)


def names(count: int) -> list[str]:
    return [f"item-{row}" for row in range(count)]


def assembled(vectors: Array, parts: list[npt.NDArray[np.int64]], exact: bool, threads: int = 1) -> Shards:
    def searcher(rows: npt.NDArray[np.int64]) -> Searcher | Certified:
        return Certified(vectors[rows]) if exact else Searcher(build(vectors[rows], recipe=Recipe(), k=5).index)

    ids = names(len(vectors))
    return Shards([Shard(searcher(rows), rows, Ids.of([ids[row] for row in rows])) for rows in parts], threads=threads)


def true_top(vectors: Array, query: Array, k: int, permitted: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    rows = np.flatnonzero(permitted)
    return rows[np.lexsort((rows, -(vectors[rows] @ query)))][:k]


def same(found: Hits, wanted: Hits) -> None:
    for name in ("rows", "scores", "counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


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


def test_written_shards_are_the_undivided_exact_index_bit_for_bit(
    make_snapshot: Callable[..., Snapshot], unit: Callable[..., Array], tmp_path: Path
) -> None:
    vectors, queries = unit(300, 24), unit(9, 24, 1)
    vectors[200:220] = vectors[40:60]  # ties across shards
    whole = make_snapshot(vectors=vectors)
    wanted = Certified(whole.vectors).search(queries, 120)
    for parts in (by_hash(list(whole.ids), 4), by_range(300, 3)):
        paths = write_shards(whole, parts, tmp_path / f"{len(parts)}")
        shards = Shards.open(paths[::-1], fingerprint="encoder-one", exact=True)
        same(shards.search(queries, 120), wanted)
        assert shards.ids(wanted.rows[0]) == whole.ids.many(wanted.rows[0])
        np.testing.assert_array_equal(shards.rows(["item-299", "no such item", "item-7"]), [299, -1, 7])
        approximate = Shards.open(paths).search(queries, 120)
        np.testing.assert_array_equal(approximate.rows, Searcher.of(whole).search(queries, 120).rows)


def test_over_ivf_the_answer_is_the_merge_of_what_the_shards_find(unit: Callable[..., Array]) -> None:
    vectors, queries = unit(400, 8), unit(5, 8, 1)
    parts = by_range(400, 2)
    searchers = [Searcher(build(vectors[rows], recipe=Recipe(lists=8), k=20).index, nprobe=2) for rows in parts]
    ids = names(400)
    shards = Shards([Shard(one, rows, Ids.of([ids[row] for row in rows])) for one, rows in zip(searchers, parts)])
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


def test_shards_that_do_not_make_up_one_index_are_refused(
    make_snapshot: Callable[..., Snapshot], tmp_path: Path, unit: Callable[..., Array]
) -> None:
    whole = make_snapshot(40)
    paths, others = (write_shards(whole, by_range(40, n), tmp_path / str(n)) for n in (3, 2))
    for wrong in (paths[:2], [*paths[:2], paths[1]], [*paths[:2], others[1]], [whole.path], []):
        with pytest.raises(ShardError, match=r"expected (all shards of one|one length)"):
            Shards.open(wrong)
    vectors = unit(6, 8)
    with pytest.raises(ShardError, match=r"not 0\.\.5, each once"):
        assembled(vectors, [np.array([0, 1, 2]), np.array([2, 3, 4])], exact=True)
    with pytest.raises(ShardError, match="the rows rising"):
        assembled(vectors, [np.array([0, 2, 1]), np.array([3, 4, 5])], exact=True)
    with pytest.raises(ShardError, match="0 shards"):
        by_range(4, 0)


def test_a_filter_of_another_index_and_a_failing_shard_give_no_answer(unit: Callable[..., Array]) -> None:
    vectors = unit(20, 8)
    shards = assembled(vectors, by_range(20, 2), exact=True)
    with pytest.raises(FilterError, match="made for another snapshot"):
        shards.search(unit(1, 8), 3, allow=RowSet.every(19))
    with pytest.raises(IndexError, match=r"rows 0\.\.19"):
        shards.ids(np.array([20]))

    class Broken(Certified):
        def search(self, *_: object, **__: object) -> Hits:
            raise SearchError("gone")

    ids = names(20)
    kinds = zip((Certified, Broken), by_range(20, 2))
    parts = [Shard(kind(vectors[rows]), rows, Ids.of(ids[rows[0] : rows[-1] + 1])) for kind, rows in kinds]
    with pytest.raises(SearchError, match="gone"):
        Shards(parts).search(unit(1, 8), 3)
