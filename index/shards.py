"""One logical index over S shards: every shard is a whole snapshot, is asked for k, and one merge makes the answers one.

Rows are those of the whole: each shard knows which of them its own rows are, rising, so ties stand in the order in which the
undivided index has them. Shards that are searched exactly (`Certified`) give the undivided exact index's answers bit for bit.
FAISS may give a score another last bit, and of rows that tie for the last place it keeps which it likes. Over IVF shards the
answer is the merge of what each of them finds.

Legend: S shards, N rows of the whole, n rows of one shard, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from index.build import build
from index.certified import Certified
from index.exact import best
from index.filters import Allow, Filter, RowSet, check_filters
from index.hits import Hits, Rows, SearchError, Vectors, check_k, check_queries
from index.ids import Ids, hash_ids
from index.search import Searcher
from index.serving import Search
from index.snapshot import Snapshot
from index.writer import SnapshotWriter

ROWS_PART = "shard.rows"
"""Which rows of the whole a shard's rows are: little-endian int64 [n], rising."""
PLACE_FACT, WHOLE_FACT = "shard", "shard_of"
"""Facts of a shard's manifest: its place among how many ("0/4"), and the name of the snapshot that was divided."""


class ShardError(SearchError):
    """Shards do not make up one index: one is missing, stands twice, or is of another whole. Nothing is searched."""


@dataclass(frozen=True, eq=False)
class Shard:
    """A searcher over n rows, which rows of the whole these are (int64 [n], rising), and their ids."""

    searcher: Search
    rows: Rows
    ids: Ids


class Shards:
    """Answers top-k questions over all shards, in rows of the whole. Holds no state between calls: threads may share it.

    `threads` of its own ask that many shards at a time; FAISS shares out a batch over the processor's cores by itself.
    """

    def __init__(self, shards: Sequence[Shard], *, threads: int = 1) -> None:
        """Raises ShardError unless the shards' rows are 0..N-1, each once, and their vectors equally long."""
        self._shards = list(shards)
        if not shards or len({shard.searcher.dims for shard in shards}) != 1:
            raise ShardError(f"dims of the shards are {[shard.searcher.dims for shard in shards]}, expected one length")
        self.dims, self.count = shards[0].searcher.dims, sum(len(shard.rows) for shard in shards)
        for place, shard in enumerate(shards):
            if not len(shard.rows) == shard.searcher.count == len(shard.ids) or (np.diff(shard.rows) <= 0).any():
                raise ShardError(
                    f"shard {place} has {shard.searcher.count} vectors, {len(shard.ids)} ids and {len(shard.rows)} rows of the "
                    "whole: expected as many of each, the rows rising; divide the index again"
                )
        if not np.array_equal(np.sort(np.concatenate([shard.rows for shard in shards])), np.arange(self.count)):
            raise ShardError(
                f"the shards' {self.count} rows are not 0..{self.count - 1}, each once: one is missing or twice here"
            )
        self._pool = ThreadPoolExecutor(threads, "shard") if threads > 1 else None

    @classmethod
    def open(
        cls, paths: Sequence[Path], *, fingerprint: str | None = None, exact: bool = False, verify: bool = True, threads: int = 1
    ) -> Shards:
        """The shards in these snapshot folders are one index, searched as they were built, or exactly.

        Raises ShardError if they are not all shards of one whole, and what `Snapshot.open` raises.
        """
        snapshots = [Snapshot.open(path, verify=verify, fingerprint=fingerprint) for path in paths]
        _check_whole(snapshots)
        return cls(
            [
                Shard(Certified(one.vectors) if exact else Searcher.of(one), np.fromfile(one.part(ROWS_PART), "<i8"), one.ids)
                for one in snapshots
            ],
            threads=threads,
        )

    def search(self, queries: Vectors, k: int, exclude: Sequence[Rows] | None = None, *, allow: Allow = None) -> Hits:
        """The best k rows of each query [Q, D] are returned, of those that `allow` holds, without its excluded rows.

        `exclude` and `allow` are over the N rows of the whole. counts[q] is min(k, permitted rows of q), always. Raises
        QueryError, ExclusionError, FilterError and SearchError before anything is searched, and whatever a shard raises: an
        answer never lacks a shard.
        """
        k, queries = check_k(k), check_queries(queries, self.dims)
        filters = check_filters(exclude, allow, len(queries), self.count)

        def ask(shard: Shard) -> Hits:
            return shard.searcher.search(
                queries, min(k, max(1, len(shard.rows))), _own_exclusions(shard, filters), allow=_own_sets(shard, filters)
            )

        found = list((self._pool.map if self._pool else map)(ask, self._shards))
        hits = Hits.empty(len(queries), k)
        for query in range(len(queries)):
            kept = [one.counts[query] for one in found]
            rows = [shard.rows[one.rows[query, :n]] for shard, one, n in zip(self._shards, found, kept)]
            best(hits, query, np.concatenate(rows), np.concatenate([one.scores[query, :n] for one, n in zip(found, kept)]))
        return hits

    def ids(self, rows: Rows) -> list[str]:
        """The ids of these rows of the whole are returned in their order. Raises IndexError for a row outside [0, N)."""
        wanted = np.asarray(rows, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.count):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} asked, the shards have rows 0..{self.count - 1}")
        found = [""] * len(wanted)
        for shard in self._shards:
            here, own = _own_rows(shard, wanted)
            for place, item_id in zip(np.flatnonzero(here).tolist(), shard.ids.many(own)):
                found[place] = item_id
        return found

    def rows(self, ids: Sequence[str]) -> Rows:
        """The row of the whole of each id is returned, int64 [len(ids)]; -1 for an id that no shard has."""
        found = np.full(len(ids), -1, np.int64)
        for shard in self._shards:
            own = shard.ids.rows(ids)
            found[own >= 0] = shard.rows[own[own >= 0]]
        return found


def by_hash(ids: Sequence[str], shards: int) -> list[Rows]:
    """The rows of each shard, rising, are returned; an id always goes to the same shard of as many."""
    at = hash_ids([one.encode("utf-8", "surrogatepass") for one in ids]) % np.uint64(_some(shards))
    return [np.flatnonzero(at == shard) for shard in range(shards)]


def by_range(count: int, shards: int) -> list[Rows]:
    """0..count-1 in runs of nearly equal length, one per shard, are returned."""
    return np.array_split(np.arange(count, dtype=np.int64), _some(shards))


def write_shards(snapshot: Snapshot, parts: Sequence[Rows], folder: Path) -> list[Path]:
    """A snapshot per part, of these rows of the snapshot, is in the stores `folder`/0, 1, ...; their folders are returned.

    Each has an index of its own. Opaque parts are not divided: rows of the whole are still theirs.
    """
    ids, found = list(snapshot.ids), []
    facts = snapshot.manifest
    for place, rows in enumerate(parts):
        built = build(np.ascontiguousarray(snapshot.vectors[rows], np.float32), codes=facts.dtype)
        extra = {PLACE_FACT: f"{place}/{len(parts)}", WHOLE_FACT: snapshot.name}
        store = folder / str(place)
        with SnapshotWriter(store, fingerprint=facts.fingerprint, as_of=facts.as_of, extra=extra) as writer:
            writer.vectors(np.ascontiguousarray(snapshot.vectors[rows], np.float32), facts.dtype)
            writer.ids([ids[row] for row in rows.tolist()])
            writer.index(built.index, recipe=str(built.recipe), facts=built.facts, recall=built.recall)
            writer.part(ROWS_PART, rows.astype("<i8").tobytes())
        found.append(writer.path)
    return found


def _check_whole(snapshots: Sequence[Snapshot]) -> None:
    """Raises ShardError unless these are all shards of one whole, each once, whatever their order."""
    extras = [one.manifest.extra for one in snapshots]
    places = sorted(extra.get(PLACE_FACT, "no shard") for extra in extras)
    wholes = {extra.get(WHOLE_FACT, "") for extra in extras}
    if places != sorted(f"{place}/{len(snapshots)}" for place in range(len(snapshots))) or len(wholes) != 1:
        raise ShardError(
            f"the snapshots are shards {', '.join(places)} of {', '.join(sorted(wholes))}: expected all shards of one, each once"
        )


def _own_rows(shard: Shard, rows: Rows) -> tuple[np.ndarray, Rows]:
    """Which of these rows of the whole are the shard's (bool), and what rows they are there."""
    if not len(shard.rows):
        return np.zeros(len(rows), np.bool_), np.zeros(0, np.int64)
    at = np.minimum(np.searchsorted(shard.rows, rows), len(shard.rows) - 1)
    here = shard.rows[at] == rows
    return here, at[here]


def _own_exclusions(shard: Shard, filters: Sequence[Filter]) -> list[Rows]:
    return [_own_rows(shard, one.excluded)[1] for one in filters]


def _own_sets(shard: Shard, filters: Sequence[Filter]) -> list[RowSet | None]:
    """Queries that share a set of allowed rows share the shard's too: it is searched for all of them together."""
    made: dict[int, RowSet] = {}
    for one in filters:
        if one.allowed is not None and id(one.allowed) not in made:
            made[id(one.allowed)] = RowSet.where(one.allowed.has(shard.rows))
    return [None if one.allowed is None else made[id(one.allowed)] for one in filters]


def _some(shards: int) -> int:
    if shards < 1:
        raise ShardError(f"{shards} shards: expected at least 1")
    return shards
