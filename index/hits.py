"""What a search is asked and what it answers, checked once for every way of searching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class SearchError(BrewlineError):
    """A search cannot be answered: the question does not fit the index."""


class QueryError(SearchError):
    """Query vectors have the wrong shape or dims, or hold NaN or infinity."""


class ExclusionError(SearchError):
    """The rows to leave out do not fit the index. No answer is given, for it would be an unfiltered one."""


class FilterIgnored(SearchError):
    """An index returned a row that it was told to leave out. The answer is withheld."""


@dataclass(frozen=True, slots=True)
class Hits:
    """The best rows of Q queries, best first: rows int64 [Q, K], scores float32 [Q, K], counts int32 [Q].

    Row q holds counts[q] hits, score descending and, at equal score, row ascending; the rest is padding (-1, -inf).
    """

    rows: Rows
    scores: Vectors
    counts: npt.NDArray[np.int32]

    @classmethod
    def empty(cls, queries: int, k: int) -> Hits:
        """Nothing but padding is returned, for the caller to fill."""
        return cls(
            np.full((queries, k), -1, np.int64),
            np.full((queries, k), -np.inf, np.float32),
            np.zeros(queries, np.int32),
        )

    def put(self, query: int, rows: Rows, scores: Vectors) -> None:
        """The best of these candidates (each row once, at most any number) become the hits of one query, in order."""
        order = np.lexsort((rows, -scores))[: self.rows.shape[1]]
        self.rows[query], self.scores[query] = -1, -np.inf
        self.rows[query, : len(order)] = rows[order]
        self.scores[query, : len(order)] = scores[order]
        self.counts[query] = len(order)


def check_queries(queries: npt.NDArray[Any], dims: int) -> Vectors:
    """The queries are returned as contiguous float32 [Q, D]. Raises QueryError on wrong shape, dims, dtype, NaN, infinity."""
    if queries.ndim != 2 or queries.shape[1] != dims or queries.dtype.kind != "f":
        raise QueryError(f"queries are {queries.dtype}{list(queries.shape)}, the index expects floats [Q, {dims}]")
    with np.errstate(over="ignore"):
        checked: Vectors = np.ascontiguousarray(queries, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(checked).all(axis=1))
    if bad.size:
        raise QueryError(f"query {bad[0]} holds NaN or infinity ({bad.size} of {len(checked)} do): refused, not ranked")
    return checked


def check_k(k: int) -> int:
    """`k` is returned. Raises SearchError unless it is at least 1."""
    if k < 1:
        raise SearchError(f"k is {k}, expected at least 1")
    return int(k)


def check_exclusions(exclude: Sequence[Rows] | None, queries: int, count: int) -> list[Rows]:
    """One sorted array of distinct rows per query is returned; -1 (an id that is not here) needs no exclusion.

    Raises ExclusionError when a row cannot be of this index: the list was made for another snapshot.
    """
    if exclude is None:
        return [np.zeros(0, np.int64)] * queries
    if len(exclude) != queries:
        raise ExclusionError(f"{len(exclude)} exclusion lists for {queries} queries: expected one each (it may be empty)")
    return [check_rows(np.asarray(rows), f"exclusions of query {query}", count) for query, rows in enumerate(exclude)]


def check_rows(rows: npt.NDArray[Any], what: str, count: int) -> Rows:
    """The distinct rows are returned, int64, rising, without -1. Raises ExclusionError, which names `what` they are."""
    if rows.size == 0:
        return np.zeros(0, np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ExclusionError(f"{what} are {rows.dtype}{list(rows.shape)}, expected integers [n]")
    if rows.min() < -1 or rows.max() >= count:
        raise ExclusionError(
            f"{what} span rows {rows.min()}..{rows.max()}, the index has rows 0..{count - 1}: they were made for another snapshot"
        )
    distinct: Rows = np.unique(rows.astype(np.int64))
    return distinct[distinct >= 0]
