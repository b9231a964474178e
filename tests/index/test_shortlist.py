from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from index.bench import made_items, made_queries
from index.exact import exact_search, overlap
from index.hits import SearchError
from index.lists import ListError
from index.shortlist import ShortLists, choose_short_lists

Floats = npt.NDArray[np.float32]
COUNT, DIMS = 24_000, 24


@pytest.fixture(scope="module")
def vectors() -> Floats:
    return made_items(COUNT, DIMS)


@pytest.fixture(scope="module")
def short(vectors: Floats) -> ShortLists:
    return ShortLists(vectors, lists=128, threads=1)


def test_more_lists_find_more_and_most_is_found(vectors: Floats, short: ShortLists) -> None:
    queries = made_queries(20, DIMS, 0)
    true = exact_search(vectors, queries, 500)
    recalls = [overlap(vectors, queries, short.search(queries, 500, probes=p), true).mean() for p in (4, 16, 64, 128)]
    assert recalls == sorted(recalls) and recalls[0] < 0.9 * recalls[3] and recalls[3] > 0.97


@pytest.mark.parametrize("k", [1, 200, 30_000])
def test_counts_exclusions_order_and_scores(vectors: Floats, short: ShortLists, k: int) -> None:
    rng = np.random.default_rng(4)
    queries = made_queries(5, DIMS, 1)
    exclude = [rng.permutation(COUNT)[:size] for size in (0, 500, COUNT - 3, COUNT, 4_000)]
    hits = short.search(queries, k, exclude, probes=2)
    for query, left_out in enumerate(exclude):
        count = int(hits.counts[query])
        rows, scores = hits.rows[query, :count], hits.scores[query, :count]
        assert count == min(k, COUNT - len(left_out)) and not np.isin(rows, left_out).any() and len(set(rows.tolist())) == count
        assert np.allclose(scores, vectors[rows] @ queries[query], atol=1e-5)
        assert (np.lexsort((rows, -scores)) == np.arange(count)).all() and (hits.rows[query, count:] == -1).all()


def test_threads_share_a_query_without_changing_its_answer(vectors: Floats, short: ShortLists) -> None:
    two = ShortLists(vectors, lists=128, threads=2)
    asked = made_queries(4, DIMS, 0)
    assert (two.search(asked, 300, probes=20).rows == short.search(asked, 300, probes=20).rows).all()


def test_what_is_refused(vectors: Floats, short: ShortLists) -> None:
    with pytest.raises(ListError, match="30000 lists"):
        ShortLists(vectors, lists=30_000)
    with pytest.raises(ListError, match="at least 20000"):
        ShortLists(vectors[:100])
    for probes in (0, 129):
        with pytest.raises(SearchError, match=r"expected 1\.\.128"):
            short.search(vectors[:1], 5, probes=probes)
    broken = vectors.copy()
    broken[23_999, 3] = np.nan
    with pytest.raises(SearchError, match="NaN"):
        ShortLists(broken, lists=8)
    assert choose_short_lists(1_000_000) == 4096 and choose_short_lists(100) == 2
