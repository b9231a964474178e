"""Search in a FAISS index with filters that hold by construction and answers that are never short.

Three ways lead to the same answer, and the number of forbidden and of permitted rows chooses:

  over-fetch   at most k forbidden: k + |forbidden| for the whole batch at once, then drop the forbidden; k are left
  gather       few permitted: their vectors are scored one by one, which is exact whatever the index
  select       else: FAISS is told which rows count (one call for all queries that share a set)

Measured on one core, N = 200,000, D = 64, k = 2,000, milliseconds a query, gather / select / over-fetch. Flat: 2 % permitted
0.3 / 2.0 / -, 5 % 1.8 / 2.2 / 33, 20 % 13 / 11 / 23, 90 % 60 / 16 / 15. IVF512 visiting all lists: 2 % 0.3 / 2.1, 5 % 1.8 / 5.9,
20 % 13 / 14. IVF512 visiting 16: select is faster from 5 % on, but finds fewer than k where fewer are in those lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from index.exact import exact_search
from index.filters import Allow, Filter, RowSet, check_filters
from index.hits import FilterIgnored, Hits, QueryError, Rows, SearchError, Vectors, check_k, check_queries
from index.snapshot import Shard, Snapshot

__all__ = ["Hits", "QueryError", "Search", "SearchError", "Searcher"]

_GATHER_SHARE = 20
"""Of the rows that a search would visit, one in so many costs as much to gather as all cost to select from."""
_GATHER_ROWS = 200_000
"""Never gather more: at 128 dims a copy of 100 MB for one query."""


class Search(Protocol):
    """What answers top-k questions over N rows of D dims: see `Searcher.search`."""

    @property
    def count(self) -> int: ...

    @property
    def dims(self) -> int: ...

    def search(
        self, queries: Vectors, k: int, exclude: Sequence[Rows] | None = None, *, allow: Allow = None
    ) -> Hits: ...  # fmt: skip


class Searcher:
    """Answers top-k questions over one index. Holds no state between calls: threads may share it.

    `nprobe` is how many inverted lists an IVF index visits (0: the index is Flat and visits everything). `vectors` [N, D] are
    the rows themselves, for answers from few permitted rows; without them FAISS selects those too.
    """

    def __init__(self, index: Any, *, nprobe: int = 0, vectors: Vectors | None = None) -> None:
        import faiss

        self._faiss: Any = faiss
        self._index = index
        self._vectors = vectors
        self._lists = int(index.nlist) if isinstance(index, faiss.IndexIVF) else 0
        if nprobe < 0 or nprobe > max(self._lists, 0) or (self._lists and nprobe == 0):
            raise SearchError(f"nprobe is {nprobe}, expected 1..{self._lists} (0 for a Flat index, which has no lists)")
        self.nprobe = nprobe
        self.count, self.dims = int(index.ntotal), int(index.d)
        if vectors is not None and vectors.shape != (self.count, self.dims):
            raise SearchError(f"vectors are {list(vectors.shape)}, the index holds {[self.count, self.dims]}: not the same rows")

    @classmethod
    def of(cls, built: Snapshot | Shard) -> Searcher:
        """A searcher over one index is returned, visiting as many lists as its build found to be enough.

        Raises SnapshotError for a divided snapshot, which has more: see `index.shards.as_built`.
        """
        facts, index = built.manifest, built.index
        # Vectors in fewer bits than float32 would all be decoded into memory first.
        mapped = built.vectors if facts.dtype == "float32" else None
        return cls(index, nprobe=int(facts.build.get("nprobe", 0)), vectors=mapped)

    def search(
        self,
        queries: Vectors,
        k: int,
        exclude: Sequence[Rows] | None = None,
        *,
        nprobe: int | None = None,
        allow: RowSet | Sequence[RowSet | None] | None = None,
    ) -> Hits:
        """The best k rows of each query [Q, D] are returned: of those that `allow` holds, without its excluded rows.

        counts[q] is min(k, permitted rows of q), always: where the visited lists hold fewer, more lists are visited. Raises
        QueryError, ExclusionError, FilterError and SearchError before anything is searched, FilterIgnored rather than a
        forbidden row.
        """
        k = check_k(k)
        queries = check_queries(queries, self.dims)
        filters = check_filters(exclude, allow, len(queries), self.count)
        visited = self.nprobe if nprobe is None else nprobe
        if self._lists and not 1 <= visited <= self._lists:
            raise SearchError(f"nprobe is {visited}, expected 1..{self._lists}")
        hits = Hits.empty(len(queries), k)
        wanted = np.array([min(k, one.permitted) for one in filters], np.int64)
        open_queries = np.flatnonzero(wanted > 0)
        while open_queries.size:
            self._answer(hits, open_queries.tolist(), queries, filters, visited)
            if visited >= self._lists:
                break
            open_queries = open_queries[hits.counts[open_queries] < wanted[open_queries]]
            visited = min(2 * visited, self._lists)
        _require_permitted(hits, filters)
        return hits

    def _answer(self, hits: Hits, asked: list[int], queries: Vectors, filters: list[Filter], nprobe: int) -> None:
        """The hits of the asked queries are replaced by those that `nprobe` lists hold."""
        k = hits.rows.shape[1]
        few = [query for query in asked if self.count - filters[query].permitted <= k]
        if few:
            depth = k + max(self.count - filters[query].permitted for query in few)
            for query, rows, scores in self._fetch(queries, few, depth, nprobe):
                good = filters[query].permits(rows)
                hits.put(query, rows[good], scores[good])
        sharing: dict[int, list[int]] = {}
        for query in sorted(set(asked) - set(few)):
            if self._vectors is not None and filters[query].permitted <= self._worth_gathering(k, nprobe):
                hits.put(query, *_gathered(self._vectors, filters[query].set().rows(), queries[query : query + 1], k))
            else:
                alone = filters[query].excluded.size or filters[query].allowed is None
                sharing.setdefault(-query - 1 if alone else id(filters[query].allowed), []).append(query)
        for together in sharing.values():
            permitted = filters[together[0]].set()
            for query, rows, scores in self._fetch(queries, together, k, nprobe, permitted):
                hits.put(query, rows[rows >= 0], scores[rows >= 0])

    def _worth_gathering(self, k: int, nprobe: int) -> int:
        """Up to so many permitted rows are gathered. With hardly more than k of them a search would visit everything anyway."""
        visited = self.count * nprobe // self._lists if self._lists else self.count
        return min(max(2 * k, visited // _GATHER_SHARE), _GATHER_ROWS)

    def _fetch(
        self, queries: Vectors, asked: list[int], depth: int, nprobe: int, permitted: RowSet | None = None
    ) -> list[tuple[int, Rows, Vectors]]:
        settings: dict[str, Any] = {} if permitted is None else {"sel": self._faiss.IDSelectorBitmap(permitted.bits)}
        parameters: Any
        if self._lists:
            parameters = self._faiss.SearchParametersIVF(nprobe=nprobe, **settings)
        else:
            parameters = self._faiss.SearchParameters(**settings)
        scores, rows = self._index.search(queries[asked], min(depth, self.count), params=parameters)
        return list(zip(asked, rows, scores))


def _gathered(vectors: Vectors, rows: Rows, query: Vectors, k: int) -> tuple[Rows, Vectors]:
    found = exact_search(np.asarray(vectors[rows], np.float32), query, k)
    kept = int(found.counts[0])
    return rows[found.rows[0, :kept]], found.scores[0, :kept]


def _require_permitted(hits: Hits, filters: list[Filter]) -> None:
    """Looked at once more, whatever way was taken: some builds of FAISS (GPU without cuVS) ignore a selector in silence."""
    for query, one in enumerate(filters):
        rows = hits.rows[query, : hits.counts[query]]
        forbidden = int(np.count_nonzero(~one.permits(rows)))
        if forbidden:
            raise FilterIgnored(
                f"the index returned {forbidden} rows for query {query} that it was told to leave out; the answer is withheld: "
                "this build of FAISS ignores selectors (faiss-gpu without cuVS does), search on the CPU"
            )


def one_core_here() -> None:
    """FAISS uses one core for what the calling thread asks of it; other threads keep theirs."""
    import faiss

    faiss.omp_set_num_threads(1)
