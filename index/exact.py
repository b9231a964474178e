"""Exact search in numpy: the honest twin that every index is measured against.

It sees every vector, keeps ties in a defined order, and holds at most one block of scores at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from index.hits import Hits, Rows, SearchError, Vectors, check_exclusions, check_k, check_queries

_BLOCK_SCORES = 1 << 24
"""Scores held at a time: 64 MiB of float32."""


def exact_search(
    vectors: Vectors, queries: Vectors, k: int, exclude: Sequence[Rows] | None = None, *, block_rows: int | None = None
) -> Hits:
    """The true top k by inner product of every query is returned, without its excluded rows.

    vectors [N, D] (a mapped file will do), queries [Q, D], exclude one array of rows per query. Order: score descending, then
    row ascending. Scores are float32 dot products; their last bit may depend on the block's shape, as BLAS chooses.
    Raises QueryError, ExclusionError, and SearchError for k < 1 or vectors that hold NaN or infinity.
    """
    k = check_k(k)
    count = len(vectors)
    queries = check_queries(queries, vectors.shape[1])
    excluded = check_exclusions(exclude, len(queries), count)
    hits = Hits.empty(len(queries), k)
    step = block_rows or max(1024, _BLOCK_SCORES // max(1, len(queries)))
    for start in range(0, count, step):
        _merge_block(hits, vectors[start : start + step], start, queries, excluded)
    return hits


def _merge_block(hits: Hits, block: Vectors, start: int, queries: Vectors, excluded: list[Rows]) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        scores = queries @ np.asarray(block, dtype=np.float32).T
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores).all(axis=0))[0]) + start
        raise SearchError(f"vector {bad} gives a score that is NaN or infinite: the vectors are damaged, build them again")
    for query, left_out in enumerate(excluded):
        first, last = np.searchsorted(left_out, (start, start + len(block)))
        scores[query, left_out[first:last] - start] = -np.inf
        _merge(hits, query, scores[query], start)


def _merge(hits: Hits, query: int, scores: Vectors, start: int) -> None:
    """Later rows lose ties against earlier ones, so only a strictly better score can enter a full list."""
    k, kept = hits.rows.shape[1], int(hits.counts[query])
    threshold = hits.scores[query, k - 1]
    entering = np.flatnonzero(scores > threshold)
    if entering.size > k:
        bar = np.partition(scores[entering], entering.size - k)[entering.size - k]
        above, at = entering[scores[entering] > bar], entering[scores[entering] == bar]
        entering = np.concatenate([above, at[: k - above.size]])
    if entering.size:
        rows = np.concatenate([hits.rows[query, :kept], entering + start])
        hits.put(query, rows, np.concatenate([hits.scores[query, :kept], scores[entering]]))


def overlap(vectors: Vectors, queries: Vectors, found: Hits, truth: Hits, tolerance: float = 1e-5) -> Vectors:
    """The recall of `found` against `truth` is returned, one float32 in [0, 1] per query (1 where nothing is true).

    A found row counts when its own inner product, computed again here, reaches the last true score minus `tolerance`: equal
    items may stand for each other, and an index over other vectors cannot fool the measure with the scores it claims.
    """
    shares = np.ones(len(queries), np.float32)
    for query in range(len(queries)):
        wanted = int(truth.counts[query])
        if wanted:
            rows = np.unique(found.rows[query, : found.counts[query]])
            scores = np.asarray(vectors[rows], dtype=np.float32) @ queries[query]
            right = int(np.count_nonzero(scores >= truth.scores[query, wanted - 1] - tolerance))
            shares[query] = min(right, wanted) / wanted
    return shares
