from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from index.centres import find_centres, upper_tail
from index.exact import dot, exact_search, overlap
from index.hits import SearchError
from index.lists import ListError, ListSearcher, choose_lists

Floats = npt.NDArray[np.float32]


def clustered(count: int, dims: int, seed: int) -> Floats:
    centres = np.random.default_rng(0).standard_normal((30, dims))
    rng = np.random.default_rng(seed)
    made = centres[rng.integers(0, 30, count)] + 0.7 * rng.standard_normal((count, dims))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> Floats:
    return clustered(12_000, 24, 1)


@pytest.fixture(scope="module")
def searcher(vectors: Floats) -> ListSearcher:
    return ListSearcher(vectors, lists=60, threads=1)


def test_more_reach_is_more_recall_and_all_of_it_is_exact(vectors: Floats, searcher: ListSearcher) -> None:
    queries = clustered(20, 24, 2)
    truth = exact_search(vectors, queries, 300)
    recalls = [overlap(vectors, queries, searcher.search(queries, 300, reach=r), truth).mean() for r in (0.3, 0.7, 0.95, 1.0)]
    assert recalls == sorted(recalls) and recalls[0] < recalls[2] and recalls[2] > 0.95 and recalls[3] > 0.9995


@pytest.mark.parametrize("asked", [1, 4, 5, 300])
def test_a_batch_answers_as_its_queries_do(searcher: ListSearcher, asked: int) -> None:
    queries = clustered(asked, 24, 3)
    together = searcher.search(queries, 50, reach=0.9)
    for query in range(0, asked, 37):
        alone = searcher.search(queries[query : query + 1], 50, reach=0.9)
        assert (alone.rows[0] == together.rows[query]).all() and (alone.scores[0] == together.scores[query]).all()


@pytest.mark.parametrize("k", [1, 100, 20_000])
@pytest.mark.parametrize("asked", [2, 6])
def test_counts_exclusions_order_and_scores(vectors: Floats, searcher: ListSearcher, k: int, asked: int) -> None:
    rng = np.random.default_rng(4)
    queries = clustered(asked, 24, 5)
    sizes = [0, 500, 11_990, 12_000, 3, 40][:asked]
    exclude = [rng.permutation(12_000)[:size] for size in sizes]
    hits = searcher.search(queries, k, exclude, reach=0.05)
    for query, left_out in enumerate(exclude):
        count = int(hits.counts[query])
        rows = hits.rows[query, :count]
        assert count == min(k, 12_000 - len(left_out)) and not np.isin(rows, left_out).any() and len(set(rows.tolist())) == count
        assert (hits.scores[query, :count] == dot(vectors[rows], queries[query])).all()
        assert (np.lexsort((rows, -hits.scores[query, :count])) == np.arange(count)).all()
        assert (hits.rows[query, count:] == -1).all()


def test_expected_parts_add_up_to_k(vectors: Floats) -> None:
    centres, nearest = find_centres(vectors, 40, 0)
    expected = centres.expected(clustered(10, 24, 6), 300)
    assert np.allclose(expected.sum(axis=1), 300, rtol=0.1)
    assert (np.bincount(nearest, minlength=40) == centres.sizes).all()
    from math import erfc

    for z in (-3.0, 0.0, 1.0, 2.5):
        assert abs(float(upper_tail(np.array([z], np.float32))[0]) - erfc(z / 2**0.5) / 2) < 5e-4


def test_the_same_seed_gives_the_same_lists(vectors: Floats) -> None:
    one, other = (ListSearcher(vectors[:3_000], lists=10, seed=7, threads=1) for _ in range(2))
    asked = clustered(3, 24, 8)
    assert (one.search(asked, 30, reach=0.5).rows == other.search(asked, 30, reach=0.5).rows).all()


@pytest.mark.parametrize("count", [0, 1, 40])
def test_few_vectors(count: int) -> None:
    found = ListSearcher(clustered(count, 8, 9), threads=1).search(np.ones((2, 8), np.float32), 5)
    assert (found.counts == min(count, 5)).all()


def test_what_is_refused(vectors: Floats, searcher: ListSearcher) -> None:
    with pytest.raises(ListError, match="13000 lists"):
        ListSearcher(vectors, lists=13_000)
    with pytest.raises(SearchError, match="reach is 0"):
        searcher.search(vectors[:1], 5, reach=0)
    with pytest.raises(SearchError, match="NaN"):
        ListSearcher(np.full((100, 4), np.nan, np.float32))
    assert choose_lists(1_000_000) == 2048 and choose_lists(0) == 1
