"""Exact search in numpy: the honest twin that every index is measured against.

It sees every vector, keeps ties in a defined order, and holds at most one block of scores at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from index.hits import Hits, Rows, SearchError, Vectors, check_exclusions, check_k, check_queries

_BLOCK_SCORES = 1 << 24
"""Scores held at a time: 64 MiB of float32."""
_SCORED_ROWS = 1 << 16


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


def dot(vectors: Vectors, query: Vectors, rows: Rows | None = None) -> Vectors:
    """The scores float32 [n] of a query [D] with all vectors [N, D], or with these rows of them (all of 0..N-1), are returned.

    As `dots`.
    """
    return dots(vectors, query[None], np.arange(len(vectors))[None] if rows is None else rows[None])[0]


def dots(vectors: Vectors, queries: Vectors, rows: Rows) -> Vectors:
    """The scores float32 [Q, n] of each query [Q, D] with its own rows [Q, n] of vectors [N, D] are returned, -inf for row -1.

    Each is summed in one order that depends on D alone: equal vectors have equal scores wherever they stand, which matrix
    products do not promise. FAISS reads the rows in place, at a quarter of what gathering costs; its threads share the
    queries. Raises SearchError for scores that are NaN or infinite.
    """
    import faiss as typed

    faiss: Any = typed
    wanted = np.ascontiguousarray(rows, np.int64)
    if vectors.dtype != np.float32 or not vectors.flags.c_contiguous:
        chosen, places = np.unique(wanted[wanted >= 0], return_inverse=True)
        vectors = np.ascontiguousarray(vectors[chosen], dtype=np.float32)
        wanted = wanted.copy()
        wanted[wanted >= 0] = places
    asked, scores = np.ascontiguousarray(queries, np.float32), np.empty(wanted.shape, np.float32)
    pointers = [faiss.swig_ptr(array) for array in (scores, asked, vectors, wanted)]
    # More threads than queries have nothing to do but to spin on for milliseconds, on cores that others want.
    with at_most_threads(faiss, len(asked)):
        faiss.fvec_inner_products_by_idx(*pointers, vectors.shape[1], len(asked), wanted.shape[1])
    if not (np.isfinite(scores) | (wanted < 0)).all():
        raise SearchError("a vector gives a score that is NaN or infinite: the vectors are damaged, build them again")
    return scores


@contextmanager
def at_most_threads(faiss: Any, most: int) -> Iterator[None]:
    """FAISS uses at most so many threads, and one at least, for what the calling thread asks of it meanwhile."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(max(1, min(before, most)))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def best(hits: Hits, query: int, rows: Rows, scores: Vectors) -> None:
    """The best of these candidates become the hits of one query, as `Hits.put` does it, at a twentieth of its time.

    Rows are below 2**32: score and row are sorted as one number, the score's bits made to fall where the score rises.
    """
    bits = (scores + np.float32(0)).view(np.uint32)
    keys = _turned(bits).astype(np.uint64) << np.uint64(32) | rows.astype(np.uint64)
    keys.sort()
    kept = keys[: hits.rows.shape[1]]
    hits.rows[query, len(kept) :], hits.scores[query, len(kept) :] = -1, -np.inf
    hits.rows[query, : len(kept)] = kept & np.uint64(0xFFFFFFFF)
    hits.scores[query, : len(kept)] = _turned((kept >> np.uint64(32)).astype(np.uint32)).view(np.float32)
    hits.counts[query] = len(kept)


def _turned(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The bits of a score as a number that falls where the score rises; and back, it undoes itself."""
    # All ones where the sign is 0, else 0: it turns the other 31.
    turned: npt.NDArray[np.uint32] = bits ^ ((bits >> np.uint32(31)) - np.uint32(1) & np.uint32(0x7FFFFFFF))
    return turned


def exhaustive(vectors: Vectors, query: Vectors, permitted: Rows | None, hits: Hits, place: int) -> None:
    """The hits of one query [D] stand at `place`: every vector is scored by `dot`, or of the permitted rows (rising) each."""
    k, count = hits.rows.shape[1], len(vectors) if permitted is None else len(permitted)
    rows, scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for start in range(0, count, _SCORED_ROWS):
        stop = min(start + _SCORED_ROWS, count)
        here = np.arange(start, stop) if permitted is None else permitted[start:stop]
        rows, scores = np.concatenate([rows, here]), np.concatenate([scores, dot(vectors, query, here)])
        if rows.size > k:
            # Rows rise, so of those that share the last score the first are kept by a stable cut.
            bar = np.partition(scores, rows.size - k)[rows.size - k]
            kept = np.flatnonzero(scores > bar)
            ties = np.flatnonzero(scores == bar)[: k - kept.size]
            kept = np.sort(np.concatenate([kept, ties]))
            rows, scores = rows[kept], scores[kept]
    best(hits, place, rows, scores)


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
