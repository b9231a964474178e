"""One moment of a snapshot with today's changes over it: what a request sees from beginning to end, whatever is written then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from index.changes import Changes
from index.exact import exact_search
from index.filters import Allow, Filter, FilterError, RowSet, check_filters
from index.hits import Hits, Rows, Vectors, check_exclusions, check_k, check_queries
from index.search import Search
from index.serving import Serving, exact_twin
from index.shadow import Shadow
from index.snapshot import Snapshot

_ALIVE = np.iinfo(np.int64).max
_FIRST_ROWS = 1_024
_TIE = 1e-5
"""A row that scores so little less than the last true one stands for it: equal items, and sums in another order."""


@dataclass(frozen=True, eq=False)
class LiveView:
    """The snapshot's N rows and the n live rows behind them, as of `position` of the log. Never changes; costs nothing to keep.

    `hidden` are the snapshot's rows that were replaced or withdrawn; `stale` are items whose new record came with another
    encoder's vector: they keep their row of the snapshot, if any, until they are put in again with this encoder's. `shadow`
    compares some of the answers with the exact ones.
    """

    snapshot: Snapshot
    serving: Serving
    shadow: Shadow | None
    position: int
    hidden: RowSet
    stale: dict[str, bytes]
    _vectors: Vectors
    _died: Rows
    _ids: list[str]
    _records: list[bytes]
    _latest: dict[str, int]
    _previous: list[int]

    @property
    def searcher(self) -> Search:
        """What answers for the snapshot's rows."""
        return self.serving.searcher

    @property
    def first_live(self) -> int:
        """N, the row of the first live item."""
        return self.hidden.count

    @property
    def count(self) -> int:
        """N + n: every row is below."""
        return self.hidden.count + len(self._vectors)

    @cached_property
    def alive(self) -> RowSet:
        """The live rows that hold at this moment, of n."""
        return RowSet.where(self._died > self.position)

    @property
    def items(self) -> int:
        """How many items can be answered."""
        return self.hidden.count - self.hidden.size + self.alive.size

    def rows(self, ids: Sequence[str]) -> Rows:
        """The row of each id at this moment is returned, -1 for one that is not here or was withdrawn."""
        rows = self.snapshot.ids.rows(ids)
        here = np.flatnonzero(rows >= 0)
        rows[here[self.hidden.has(rows[here])]] = -1
        for place, one in enumerate(ids if self._latest else ()):
            live = self._latest.get(one, -1)
            while live >= len(self._vectors):  # put in since this moment
                live = self._previous[live]
            if live >= 0 and self._died[live] > self.position:
                rows[place] = self.first_live + live
        return rows

    def ids(self, rows: Rows | Sequence[int]) -> list[str]:
        """The ids of these rows are returned in their order. Raises IndexError for a row that is not here."""
        found, split = np.asarray(rows, np.int64), self.first_live
        if found.size and found.max() >= self.count:
            raise IndexError(f"row {found.max()} asked, this moment has rows 0..{self.count - 1}")
        if not self._ids or not (found >= split).any():
            return self.snapshot.ids.many(found)
        older = iter(self.snapshot.ids.many(found[found < split]))
        return [next(older) if row < split else self._ids[row - split] for row in found.tolist()]

    def record(self, row: int) -> bytes | None:
        """The record that came with a live row is returned; None for a row of the snapshot, whose parts hold it."""
        return self._records[row - self.first_live] if row >= self.first_live else None

    def vector(self, row: int) -> Vectors:
        """The vector of a row is returned, float32 [D]."""
        if row < self.first_live:
            return self.snapshot.vectors_at(np.array([row]))[0]
        found: Vectors = self._vectors[row - self.first_live]
        return found

    def search(
        self,
        queries: Vectors,
        k: int,
        exclude: Sequence[Rows] | None = None,
        *,
        allow: Allow = None,
        allow_live: Allow = None,
    ) -> Hits:
        """The best k rows of each query [Q, D] are returned, of what holds at this moment: see `Searcher.search`.

        `exclude` are rows of either kind; `allow` is over the N rows of the snapshot, `allow_live` over the n live ones. Raises
        FilterError when only one of them is given while there are live rows: nobody judged the others.
        """
        k, queries = check_k(k), check_queries(queries, self.searcher.dims)
        asked, live_count, split = len(queries), len(self._vectors), self.first_live
        if live_count and (allow is None) != (allow_live is None):
            raise FilterError(
                f"a filter judges only one of the snapshot's {split} rows and the {live_count} live ones: give both"
            )
        excluded = check_exclusions(exclude, asked, self.count)
        older = check_filters([rows[rows < split] for rows in excluded], allow, asked, split)
        newer = check_filters([rows[rows >= split] - split for rows in excluded], allow_live, asked, live_count)
        hits = self.searcher.search(queries, k, [one.excluded for one in older], allow=self._visible(older))
        if self.alive.size:
            found = exact_search(self._vectors, queries, k, [self._left_out(one) for one in newer])
            for query in range(asked):
                _merge(hits, found, query, split)
        place = None if self.shadow is None else self.shadow.pick(asked)
        if self.shadow is not None and place is not None:
            found_rows = hits.rows[place, : hits.counts[place]].copy()
            question = (queries[place : place + 1].copy(), k, older[place], newer[place])
            self.shadow.offer(partial(self._recall, found_rows, *question))
        return hits

    def _recall(self, rows: Rows, query: Vectors, k: int, older: Filter, newer: Filter) -> float:
        """The share of the exact answer to a query [1, D] that these rows are."""
        twin = replace(self, serving=Serving(exact_twin(self.snapshot), False, "the exact twin"), shadow=None)
        excluded = np.concatenate([older.excluded, newer.excluded + self.first_live])
        true = twin.search(query, k, [excluded], allow=[older.allowed], allow_live=[newer.allowed])
        wanted = int(true.counts[0])
        if not wanted:
            return 1.0
        others = rows[~np.isin(rows, true.rows[0, :wanted])]
        ties = sum(float(self.vector(row) @ query[0]) >= true.scores[0, wanted - 1] - _TIE for row in others.tolist())
        return min(rows.size - others.size + ties, wanted) / wanted

    def _visible(self, filters: list[Filter]) -> Allow:
        """Equal sets stay one object, so that the searcher answers their queries together."""
        if not self.hidden.size:
            return [one.allowed for one in filters]
        made: dict[int, RowSet] = {}
        for one in filters:
            if id(one.allowed) not in made:
                made[id(one.allowed)] = self._shown if one.allowed is None else one.allowed - self.hidden
        return [made[id(one.allowed)] for one in filters]

    @cached_property
    def _shown(self) -> RowSet:
        return ~self.hidden

    def _left_out(self, one: Filter) -> Rows:
        return (~(one.set() & self.alive)).rows()


def _merge(hits: Hits, found: Hits, query: int, split: int) -> None:
    kept, more = int(hits.counts[query]), int(found.counts[query])
    rows = np.concatenate([hits.rows[query, :kept], found.rows[query, :more] + split])
    hits.put(query, rows, np.concatenate([hits.scores[query, :kept], found.scores[query, :more]]))


class LiveTable:
    """Grows by changes, one writer at a time, and shows the latest moment as `view`. Earlier views stay right.

    Rows are only added, and a row that ends notes the position at which it did: a view is a length and a position.
    """

    def __init__(self, snapshot: Snapshot, position: int, shadow: Shadow | None = None) -> None:
        self._snapshot, self._serving, self._shadow = snapshot, Serving.of(snapshot), shadow
        self._hidden = RowSet.of(np.zeros(0, np.int64), snapshot.manifest.count)
        self._stale: dict[str, bytes] = {}
        self._vectors = np.zeros((_FIRST_ROWS, snapshot.manifest.dims), np.float32)
        self._died = np.full(_FIRST_ROWS, _ALIVE, np.int64)
        self._ids: list[str] = []
        self._records: list[bytes] = []
        self._latest: dict[str, int] = {}
        self._previous: list[int] = []
        self._gone: list[Rows] = []
        self._position = position
        self.view = self._show()

    def take(self, batches: Sequence[tuple[int, str, Changes]]) -> None:
        """Batches (position, fingerprint of the vectors, changes) hold, all at once for whoever takes the view after this."""
        for position, fingerprint, changes in batches:
            self._position = position
            if fingerprint == self._snapshot.manifest.fingerprint:
                self._end((*changes.ids, *changes.withdrawn))
                self._add(changes)
            else:
                self._end(changes.withdrawn)
                self._stale = {**self._stale, **dict(zip(changes.ids, changes.records))}
        if batches:
            self.view = self._show()

    def _end(self, ids: Sequence[str]) -> None:
        """What these ids meant until now ends at this position."""
        rows = self._snapshot.ids.rows(ids)
        self._gone.append(rows[rows >= 0])
        for one in ids:
            live = self._latest.get(one, -1)
            if live >= 0 and self._died[live] == _ALIVE:
                self._died[live] = self._position
        if self._stale:
            self._stale = {one: record for one, record in self._stale.items() if one not in ids}

    def _add(self, changes: Changes) -> None:
        start, end = len(self._ids), len(self._ids) + len(changes.ids)
        if end > len(self._died):
            room = max(end, 2 * len(self._died)) - len(self._died)
            self._vectors = np.concatenate([self._vectors, np.zeros((room, self._vectors.shape[1]), np.float32)])
            self._died = np.concatenate([self._died, np.full(room, _ALIVE, np.int64)])
        self._vectors[start:end] = changes.vectors
        self._records += changes.records
        for row, one in enumerate(changes.ids, start):
            self._previous.append(self._latest.get(one, -1))
            self._ids.append(one)
            self._latest[one] = row

    def _show(self) -> LiveView:
        if self._gone:
            self._hidden = self._hidden.plus(np.concatenate(self._gone))
            self._gone = []
        count = len(self._ids)
        return LiveView(
            self._snapshot,
            self._serving,
            self._shadow,
            self._position,
            self._hidden,
            self._stale,
            self._vectors[:count],
            self._died[:count],
            self._ids,
            self._records,
            self._latest,
            self._previous,
        )
