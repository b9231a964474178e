"""Approximate top k: a short list by 2 bits a number, then true scores.

At k = 2,000 a search of inverted lists is bound by what it reads and by how it keeps the best: FAISS holds them in a heap or a
reservoir. Here the score that k vectors will reach is foretold from the products with the centres alone; FAISS's fast scan of
4-bit codes (two numbers each, of what is left of a vector beside its centre) returns whatever exceeds it, no heap, and only this
short list is scored in float32. How far below the foretold score the bar must lie is measured when the index is built.

A lone query is read by as many threads of FAISS's own: it goes in as GROUPS questions, each for the lists of one group. Centres
hold one number more, +1 or -1 by group, and a question the same number times more than its product with any centre can be, so
that the lists of its own group are the nearest. What this adds to its scores is made to end at the same radius for every
question, so a batch with a bar for each is one call too. Questions have length 1, whatever the query's: else one long query would
cost the others of its batch their precision. Fast scan: André, Kermarrec, Le Scouarnec 2017; FAISS.

Legend: N vectors of D numbers, L lists, Q queries, A of them asked together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from index.exact import at_most_threads, best, dots, exhaustive
from index.filters import Allow, Filter, check_filters
from index.hits import Hits, Rows, SearchError, Vectors, check_k, check_queries
from index.looks import Looks
from index.recipe import GROUPS, Recipe

RANK = 2
"""Times as many centres as k vectors fill lists: the product of the last of them lies a fixed way from the k-th best score."""
KEPT = 0.995
"""Of the true best that a visit meets, this part is to come into the short list."""
GATHERED = 16_384
"""So many permitted rows are scored, all of them, as quickly as a short list is found."""
_ASKED, _HELD = 64, 2_000_000
"""Queries that go to FAISS together, and rows that are about to come back: they are held until they are scored."""
_READ = 3
"""Lists are read that hold so many times as many vectors as are asked for, if `nprobe` are fewer: else nothing can come of it."""
_WIDER, _LOWER = 4, 0.05
"""Where a list came out too short, so many times as many are read, the bar lower by its margin or this much, then everything."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """Queries [Q, D], their lengths float64 [Q], the same of length 1 (those of length 0 stay so), and their filters."""

    queries: Vectors
    lengths: npt.NDArray[np.float64]
    units: Vectors
    filters: list[Filter]

    @classmethod
    def of(cls, queries: Vectors, filters: list[Filter]) -> Self:
        lengths = np.linalg.norm(queries.astype(np.float64), axis=1)
        return cls(queries, lengths, (queries / np.where(lengths > 0, lengths, 1)[:, None]).astype(np.float32), filters)


class ShortLists:
    """Answers top-k questions over vectors [N, D] float32 (a mapped file will do) by an index of `filled`. Threads may share it.

    `nprobe` is how many lists a query visits, more where these cannot hold what it asks for; recall follows from it by
    measurement only (`brewline index tune`, the night).
    """

    def __init__(
        self, index: Any, vectors: Vectors, *, nprobe: int, margins: Mapping[int, float], threads: int | None = None
    ) -> None:
        """`threads`: at most so many of FAISS's are asked for (None: as many as it has).

        Raises SearchError for an nprobe outside 1..L, margins for no depth or one below 1, and an index not of these vectors.
        """
        import faiss as typed

        self._faiss: Any = typed
        self.count, self.dims = vectors.shape
        self._index, self.lists, self._threads = index, int(index.nlist), threads
        if not margins or min(margins) < 1:
            raise SearchError(f"margins for the depths {sorted(margins)}: expected some, each of 1 or more")
        self._depths: Vectors = np.log(np.array(sorted(margins), np.float32))
        self._margins: Vectors = np.array([margins[depth] for depth in sorted(margins)], np.float32)
        self._width = Recipe(self.lists, short=True).width(self.dims)
        if (int(index.ntotal), int(index.d)) != (self.count, self._width):
            raise SearchError(
                f"the short list holds {index.ntotal} x {index.d}, expected {self.count} x {self._width} for these vectors: "
                "build it again"
            )
        self.vectors: Vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self.nprobe = self._checked(nprobe)
        self.looks = Looks()
        index.implem = 10  # one question's lists one after the other: the only way of FAISS's that takes a radius for many lists
        centres: Vectors = index.quantizer.reconstruct_n(0, self.lists)[:, : self.dims]
        self._signs: Vectors = np.tile(np.float32(1 - 2 * np.arange(GROUPS)), _ASKED)
        self._longest = float(np.linalg.norm(centres, axis=1).max()) + float(np.finfo(np.float32).tiny)

    def search(
        self, queries: Vectors, k: int, exclude: Sequence[Rows] | None = None, *, allow: Allow = None, nprobe: int | None = None
    ) -> Hits:
        """About the best k rows of each query [Q, D] are returned, of those that `allow` holds, without its excluded rows.

        Scores are true. counts[q] is min(k, permitted rows of q), always: where the short list is too short, everything is
        scored. Raises QueryError, ExclusionError, FilterError, and SearchError for an nprobe outside 1..L or k below 1.
        """
        k = check_k(k)
        queries = check_queries(queries, self.dims)
        filters = check_filters(exclude, allow, len(queries), self.count)
        visited = self.nprobe if nprobe is None else self._checked(nprobe)
        hits = Hits.empty(len(queries), k)
        all_asked = _Asked.of(queries, filters)
        some = [query for query, one in enumerate(filters) if one.permitted]
        short = [query for query in some if all_asked.lengths[query] and self._pays(filters[query], k)]
        everything = sorted(set(some) - set(short))
        questions = GROUPS * len(short)
        with at_most_threads(self._faiss, min(questions, self._threads or questions)):
            again = self._answer(hits, short, all_asked, visited, again=False)
            failed = self._answer(hits, again, all_asked, min(self.lists, _WIDER * visited), again=True)
        everything += failed
        self.looks.note(len(short) - len(again), len(again) - len(failed), len(everything))
        for query in everything:
            one = filters[query]
            exhaustive(self.vectors, queries[query], None if one.permitted == self.count else one.set().rows(), hits, query)
        return hits

    def needed(self, query: Vectors, depths: Sequence[int]) -> list[float] | None:
        """The margins with which a query's short list would hold all but 1 - KEPT of the so many best; None if it meets too few.

        An item that asks does not count as what it finds: members' queries are no items.
        """
        unit = query[None] / np.float32(max(float(np.linalg.norm(query)), 1e-12))
        _, scores, rows = self._scan(unit, np.array([-np.inf], np.float32), self.nprobe, low=True)
        true = dots(self.vectors, unit, rows[None])[0]
        order = np.argsort(-true)
        order = order[np.count_nonzero(true > 1 - 1e-5) :]
        if len(order) < depths[-1]:
            return None
        lasts = [float(np.quantile(scores[order[:depth]], 1 - KEPT)) for depth in depths]
        foretold = self._foretold(np.repeat(unit, len(depths), axis=0), depths)
        return [first - last for first, last in zip(foretold.tolist(), lasts)]

    def _pays(self, one: Filter, k: int) -> bool:
        depth = self._depth(one, k)
        return 4 * depth < self.count and one.permitted > max(GATHERED, 3 * depth)

    def _depth(self, one: Filter, k: int) -> int:
        """So deep among all rows lie the best k of those that are permitted, if permission has nothing to do with the score.

        Rows that are excluded one by one are what a member knows: they may all lie at the top.
        """
        allowed = self.count if one.allowed is None else one.allowed.size
        return -(-min(k, one.permitted) * self.count // max(1, allowed)) + len(one.excluded)

    def _answer(self, hits: Hits, places: list[int], asked: _Asked, probes: int, *, again: bool) -> list[int]:
        """The hits of the queries at these places are filled; those that stayed short are returned."""
        still: list[int] = []
        alike: dict[int, list[int]] = {}
        depths = {query: self._depth(asked.filters[query], hits.rows.shape[1]) for query in places}
        for query, depth in depths.items():
            allowed = asked.filters[query].allowed
            share = 1.0 if allowed is None else allowed.size / self.count
            visited = math.ceil(max(probes / share, _READ * depth * self.lists / self.count))
            alike.setdefault(min(self.lists, visited), []).append(query)
        for visited, members in alike.items():
            step = max(1, min(_ASKED, _HELD // (4 * max(depths[query] for query in members))))
            for start in range(0, len(members), step):
                some = members[start : start + step]
                still += self._together(hits, some, [depths[query] for query in some], asked, visited, again)
        return still

    def _together(self, hits: Hits, places: list[int], depths: list[int], asked: _Asked, probes: int, again: bool) -> list[int]:
        margins = np.interp(np.log(depths), self._depths, self._margins).astype(np.float32)
        if again:
            margins += np.maximum(np.abs(margins), np.float32(_LOWER))
        units, still = asked.units[places], []
        bars = self._foretold(units, depths) - margins
        edges, _, rows = self._scan(units, bars, probes, low=again)
        scores = self._scored(asked.queries[places], edges, rows)
        for place, query in enumerate(places):
            part = slice(edges[GROUPS * place], edges[GROUPS * (place + 1)])
            own, true, one = rows[part], scores[part], asked.filters[query]
            if one.permitted < self.count:
                good = one.permits(own)
                own, true = own[good], true[good]
            best(hits, query, own, true)
            wanted = min(hits.rows.shape[1], one.permitted)
            # Below the bar only what codes took for better than it is came through: as good ones were left out.
            if len(own) < wanted or hits.scores[query, wanted - 1] < bars[place] * asked.lengths[query]:
                still.append(query)
        return still

    def _foretold(self, queries: Vectors, depths: Sequence[int]) -> Vectors:
        """A score [A] that lies a fixed way from the last of the so many best of each query [A, D]."""
        ranks = [min(self.lists, max(1, -(-RANK * depth * self.lists // self.count))) for depth in depths]
        products, _ = self._index.quantizer.search(wide(queries, self._width), max(ranks))
        found: Vectors = products[np.arange(len(queries)), np.array(ranks) - 1]
        return found

    def _scan(self, units: Vectors, bars: Vectors, probes: int, *, low: bool = False) -> tuple[Rows, Vectors, Rows]:
        """What exceeds each query's bar in the lists that it visits: those of query a at edges[GROUPS a : GROUPS (a + 1)].

        Edges, scores by codes, rows. With `low` bars may lie anywhere: FAISS counts from the lowest score that codes can have,
        and answers nonsense to a bar below it.
        """
        visited, marked = -(-min(probes, self.lists) // GROUPS), self.dims
        asked = np.zeros((len(units), GROUPS, self._width), np.float32)
        asked[:, :, :marked] = units[:, None]
        questions: Vectors = asked.reshape(-1, self._width)
        signs, each = self._signs[: len(questions)], np.repeat(bars, GROUPS)
        # A list of another group must lie further away than any product with a centre can: twice the mark is the way between.
        far = 4 * self._longest
        if low:
            questions[:, marked] = far * signs
            each = np.maximum(each, self._lowest(questions, visited) - far)
        radius = far + float(np.abs(each).max())
        marks = radius - each
        questions[:, marked] = marks * signs
        found, scores, rows = self._index.range_search(questions, radius, params=self._faiss.SearchParametersIVF(nprobe=visited))
        edges = found.astype(np.int64)
        return edges, scores - np.repeat(marks, np.diff(edges)) if low else scores, rows

    def _lowest(self, questions: Vectors, visited: int) -> Vectors:
        """A score below any that codes can have in the lists that these questions visit."""
        pairs = self._faiss.vector_to_array(self._index.pq.centroids).reshape(self._width // 2, 16, 2)
        least = np.einsum("apd,pcd->apc", questions.reshape(len(questions), -1, 2), pairs).min(axis=2).sum(axis=1)
        products, _ = self._index.quantizer.search(questions, visited)
        lowest: Vectors = products[:, -1] + least
        return lowest

    def _scored(self, queries: Vectors, edges: Rows, rows: Rows) -> Vectors:
        """The true scores of what a scan returned, side by side as it stands there."""
        if len(queries) == 1:
            table = np.full((GROUPS, -(-len(rows) // GROUPS)), -1, np.int64)
            table.reshape(-1)[: len(rows)] = rows
            return dots(self.vectors, np.repeat(queries, GROUPS, axis=0), table).reshape(-1)[: len(rows)]
        lengths = np.diff(edges[::GROUPS])
        there = np.arange(lengths.max(initial=0)) < lengths[:, None]
        table = np.full(there.shape, -1, np.int64)
        table[there] = rows
        found: Vectors = dots(self.vectors, queries, table)[there]
        return found

    def _checked(self, nprobe: int) -> int:
        if not 1 <= nprobe <= self.lists:
            raise SearchError(f"nprobe is {nprobe}, expected 1..{self.lists}: the lists that a query visits")
        return nprobe


def wide(vectors: Vectors, width: int) -> Vectors:
    """The vectors [N, D] with zeros behind them, [N, width]."""
    found = np.zeros((len(vectors), width), np.float32)
    found[:, : vectors.shape[1]] = vectors
    return found
