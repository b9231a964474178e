"""One index over S shards: every shard is asked for k, and one merge makes the answers one.

Rows are those of the whole: each shard knows which of them its own rows are, rising, so ties stand in the order in which the
undivided index has them. Shards that are searched exactly (`Certified`) give the undivided exact index's answers bit for bit.
FAISS may give a score another last bit, and of rows that tie for the last place it keeps which it likes. Over IVF shards the
answer is the merge of what each of them finds.

Legend: S shards, N rows of the whole, n rows of one shard, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from weakref import WeakKeyDictionary

import numpy as np

from index.exact import best
from index.filters import Allow, Filter, RowSet, check_filters
from index.hits import Hits, Rows, SearchError, Vectors, check_k, check_queries
from index.ids import hash_ids
from index.kinds import as_recipe
from index.search import Search
from index.snapshot import Snapshot, place_of

Each = Callable[[Callable[[int], Hits], list[int]], Iterable[Hits]]
"""Asks the shards, by their places: answers come in the same order, and what a shard raises is raised."""


class ShardError(SearchError):
    """Shards do not make up one index: one is missing, stands twice, or is of another whole. Nothing is searched."""


def one_by_one(ask: Callable[[int], Hits], places: list[int]) -> Iterable[Hits]:
    """The shards are asked in the calling thread, one after the other."""
    return map(ask, places)


class Shards:
    """Answers top-k questions over all shards, in rows of the whole. Threads may share it.

    `each` says on which threads the shards are asked: as many at a time as it has.
    """

    def __init__(self, searchers: Sequence[Search], rows: Sequence[Rows], each: Each = one_by_one) -> None:
        """`rows` int64 [n], rising, are which rows of the whole each searcher's are.

        Raises ShardError unless these are 0..N-1, each once, and the shards' vectors equally long.
        """
        self._searchers, self._rows, self._each = list(searchers), list(rows), each
        if len({one.dims for one in searchers}) != 1 or len(searchers) != len(rows):
            raise ShardError(f"dims of the shards are {[one.dims for one in searchers]}, expected one length of {len(rows)}")
        self.dims, self.count = searchers[0].dims, sum(map(len, rows))
        for place, (searcher, own) in enumerate(zip(searchers, rows)):
            if len(own) != searcher.count or (np.diff(own) <= 0).any():
                raise ShardError(
                    f"shard {place} has {searcher.count} vectors and {len(own)} rows of the whole: expected as many of each, "
                    "the rows rising; divide the index again"
                )
        met = np.zeros(self.count, np.bool_)
        for own in self._rows:
            met[own[(own >= 0) & (own < self.count)]] = True
        if not met.all():  # as many as there are, so none stands twice
            raise ShardError(
                f"the shards' {self.count} rows are not 0..{self.count - 1}, each once: one is missing or twice here"
            )
        self._split: WeakKeyDictionary[RowSet, list[RowSet]] = WeakKeyDictionary()

    def search(self, queries: Vectors, k: int, exclude: Sequence[Rows] | None = None, *, allow: Allow = None) -> Hits:
        """The best k rows of each query [Q, D] are returned, of those that `allow` holds, without its excluded rows.

        `exclude` and `allow` are over the N rows of the whole. counts[q] is min(k, permitted rows of q), always. Raises
        QueryError, ExclusionError, FilterError and SearchError before anything is searched, and whatever a shard raises: an
        answer never lacks a shard.
        """
        k, queries = check_k(k), check_queries(queries, self.dims)
        filters = check_filters(exclude, allow, len(queries), self.count)
        sets = [None if one.allowed is None else self._own_sets(one.allowed) for one in filters]

        def ask(place: int) -> Hits:
            searcher, rows = self._searchers[place], self._rows[place]
            own = [None if one is None else one[place] for one in sets]
            return searcher.search(queries, min(k, max(1, len(rows))), _own_exclusions(rows, filters), allow=own)

        found = list(self._each(ask, list(range(len(self._rows)))))
        hits = Hits.empty(len(queries), k)
        for query in range(len(queries)):
            kept = [one.counts[query] for one in found]
            rows = [own[one.rows[query, :n]] for own, one, n in zip(self._rows, found, kept)]
            best(hits, query, np.concatenate(rows), np.concatenate([one.scores[query, :n] for one, n in zip(found, kept)]))
        return hits

    def _own_sets(self, allowed: RowSet) -> list[RowSet]:
        """What a set of rows of the whole is in each shard's own; remembered, as what is withdrawn by day asks in every request.

        Queries that share a set share the shard's too, which is then searched for all of them together.
        """
        made = self._split.get(allowed)
        if made is None:
            held = np.unpackbits(allowed.bits, count=allowed.count, bitorder="little").view(np.bool_)
            made = self._split[allowed] = [RowSet.where(held[rows]) for rows in self._rows]
        return made


def joined(snapshot: Snapshot, searchers: Sequence[Search], each: Each = one_by_one) -> Search:
    """What answers for a snapshot is returned, of one searcher for each of its shards: that one if it is not divided."""
    if not snapshot.manifest.shards:
        return searchers[0]
    return Shards(searchers, [shard.rows for shard in snapshot.shards], each)


def as_built(snapshot: Snapshot) -> Search:
    """What answers for a snapshot by the indexes that its night built is returned."""
    return joined(snapshot, [as_recipe(shard) for shard in snapshot.shards])


def by_hash(ids: Sequence[str], shards: int) -> list[Rows]:
    """The rows of each shard, rising, are returned; an id always goes to the same shard of as many."""
    if shards < 1:
        raise ShardError(f"{shards} shards: expected at least 1")
    at = hash_ids([one.encode("utf-8", "surrogatepass") for one in ids]) % np.uint64(shards)
    return [np.flatnonzero(at == shard) for shard in range(shards)]


def _own_exclusions(rows: Rows, filters: Sequence[Filter]) -> list[Rows]:
    return [place_of(rows, one.excluded)[1] for one in filters]
