"""Approximate top k: a short list by 2 bits a number, then true scores.

At k = 2,000 a search of inverted lists is bound by what it reads and by how it keeps the best: FAISS holds them in a heap or a
reservoir. Here the score that k vectors will reach is foretold from the products with the centres alone; FAISS's fast scan of
4-bit codes (two numbers each, of what is left of a vector beside its centre) returns whatever exceeds it, no heap, and only this
short list is scored in float32. How far below the foretold score the bar must lie is measured when the index is built.

A lone query is read by several threads of FAISS's own, which wait for it awake: it goes in as GROUPS questions, each for the
lists of one group. Centres hold one number more, +1 or -1 by group, and a question the same number times more than any product
can be, so that lists of its own group are the nearest. What this adds to its scores is made to end at the same radius for every
question, so a batch with a bar for each is one call too. Fast scan: André, Kermarrec, Le Scouarnec 2017; FAISS.

Legend: N vectors of D numbers, L lists, Q queries, A of them asked together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from index.centres import TRAINING_ROWS, trained
from index.exact import best, dots, exhaustive
from index.filters import Allow, Filter, check_filters
from index.hits import Hits, Rows, SearchError, Vectors, check_k, check_queries
from index.recipe import BuildError, Recipe

Progress = Callable[[int, int], None]
GROUPS = 2
"""More would be quicker for a lone query on a machine that has nothing else to do, and each costs .1 ms of processor time."""
RANK = 2
"""Times as many centres as k vectors fill lists: the product of the last of them lies a fixed way from the k-th best score."""
KEPT = 0.995
"""Of the true best that a visit meets, this part is to come into the short list."""
TRIED, DEPTHS = 24, (1, 10, 100, 300, 500, 700, 1_000, 1_400, 2_000, 5_000, 10_000)
"""Queries by which the bar of the short list is set, and how deep each looks: between these it is interpolated."""
_FEW, _LONG = 300, 1_400
GATHERED = 16_384
"""So many permitted rows are scored, all of them, as quickly as a short list is found."""
FEWEST_ROWS = 1_024
_ASKED = 64
"""Queries that go to FAISS together: what it returns is held until it is scored."""
_READ = 3
"""Lists are read that hold so many times as many vectors as are asked for, if `nprobe` are fewer: else nothing can come of it."""
_WIDER, _LOWER = 4, 0.5
"""Where a list came out too short, so many times as many are read, the bar lower by so much of the greatest margin, then all."""
_BLOCK_ROWS = 65_536


def filled(vectors: Vectors, lists: int, seed: int, progress: Progress | None = None) -> Any:
    """A FAISS index of the codes of vectors [N, D], row i under id i, is returned; the same for the same seed.

    It takes vectors of `Recipe.width` numbers, of which `ShortLists` knows. Raises BuildError for too few vectors.
    """
    import faiss as typed

    faiss: Any = typed
    count, dims = vectors.shape
    if count < max(FEWEST_ROWS, lists):
        raise BuildError(
            f"a short list of {lists} lists needs at least {max(FEWEST_ROWS, lists)} vectors, there are {count}: use Flat"
        )
    width = Recipe(lists, short=True).width(dims)
    centres = _wide(trained(vectors, lists, seed), width)
    # Of length 1, so that the nearest centre of a vector of length 1 is the one with the largest product: it finds itself.
    centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    nearest = faiss.IndexFlatL2(width)
    nearest.add(centres)
    index: Any = faiss.IndexIVFPQFastScan(nearest, width, lists, width // 2, 4, faiss.METRIC_INNER_PRODUCT)
    index.by_residual, index.pq.cp.seed = True, seed
    chosen = np.random.default_rng(seed).choice(count, min(count, TRAINING_ROWS * 1024), replace=False)
    index.train(_wide(vectors[np.sort(chosen)], width))
    for start in range(0, count, _BLOCK_ROWS):
        index.add(_wide(vectors[start : start + _BLOCK_ROWS], width))
        if progress is not None:
            progress(min(start + _BLOCK_ROWS, count), count)
    # Vectors went to the nearest centre; a query goes by its product, and by group. FAISS owns it, as if it had been read.
    centres[:, dims] = 1 - 2 * (np.arange(lists) % GROUPS)
    by_product = faiss.IndexFlatIP(width)
    by_product.add(centres)
    index.quantizer, index.own_fields = by_product, True
    by_product.this.disown()
    return index


def margins_of(index: Any, vectors: Vectors, queries: Vectors) -> dict[int, float]:
    """How far below the foretold score the bar must lie for queries of length 1, by depth: what the first TRIED need.

    What most of them need where a list is long, what hardly any exceeds where one miss is much, and the best may end between
    one list and the next.
    """
    lists = ShortLists(index, vectors, nprobe=max(1, int(index.nlist) // 8), margins={1: 0.0})
    depths = [depth for depth in DEPTHS if depth == 1 or 8 * depth <= len(vectors)]
    needed = np.array([lists.needed(query, depths) for query in check_queries(queries, lists.dims)[:TRIED]])
    three_of_four, nine_of_ten = np.quantile(needed, (0.75, 0.9), axis=0)
    hardly_any = needed.mean(axis=0) + 3 * needed.std(axis=0)
    by_depth = [hardly_any if depth < _FEW else nine_of_ten if depth < _LONG else three_of_four for depth in depths]
    return {depth: float(margins[at]) for at, (depth, margins) in enumerate(zip(depths, by_depth))}


class ShortLists:
    """Answers top-k questions over vectors [N, D] float32 (a mapped file will do) by an index of `filled`. Threads may share it.

    `nprobe` is how many lists a query visits, more where these cannot hold what it asks for; recall follows from it by
    measurement only (`brewline index tune`, the night).
    """

    def __init__(self, index: Any, vectors: Vectors, *, nprobe: int, margins: Mapping[int, float]) -> None:
        """Raises SearchError for an nprobe outside 1..L and an index that is not of these vectors."""
        import faiss as typed

        self._faiss: Any = typed
        self.count, self.dims = vectors.shape
        self._index, self.lists = index, int(index.nlist)
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
        asked = [query for query, one in enumerate(filters) if one.permitted]
        short = [query for query in asked if self._pays(filters[query], k)]
        everything = [query for query in asked if not self._pays(filters[query], k)]
        for lists, lower in ((visited, 0.0), (min(self.lists, _WIDER * visited), _LOWER)):
            short = self._answer(hits, short, queries, filters, lists, lower)
        for query in sorted(everything + short):
            one = filters[query]
            exhaustive(self.vectors, queries[query], None if one.permitted == self.count else one.set().rows(), hits, query)
        return hits

    def needed(self, query: Vectors, depths: Sequence[int]) -> list[float]:
        """The margins with which a query's short list would hold all but 1 - KEPT of the so many best that it meets."""
        asked, length = query[None], max(float(np.linalg.norm(query)), 1e-12)
        _, scores, rows = self._scan(asked, np.array([-np.inf], np.float32), self.nprobe, low=True)
        true = dots(self.vectors, asked, rows[None])[0]
        order = np.argsort(-true)
        lasts = [float(np.quantile(scores[order[:depth]], 1 - KEPT)) for depth in depths]
        foretold = self._foretold(np.repeat(asked, len(depths), axis=0), depths)
        return [(first - last) / length for first, last in zip(foretold.tolist(), lasts)]

    def _pays(self, one: Filter, k: int) -> bool:
        return 4 * self._depth(one, k) < self.count and one.permitted > max(GATHERED, 2 * k)

    def _depth(self, one: Filter, k: int) -> int:
        """So deep among all rows lie the best k of those that are permitted, if permission has nothing to do with the score.

        Rows that are excluded one by one are what a member knows: they may all lie at the top.
        """
        allowed = self.count if one.allowed is None else one.allowed.size
        return -(-min(k, one.permitted) * self.count // max(1, allowed)) + len(one.excluded)

    def _answer(
        self, hits: Hits, asked: list[int], queries: Vectors, filters: list[Filter], probes: int, lower: float
    ) -> list[int]:
        """The hits of the asked queries are filled; those that stayed short are returned."""
        k, still = hits.rows.shape[1], []
        alike: dict[int, list[int]] = {}
        for query in asked:
            allowed = filters[query].allowed
            share = 1.0 if allowed is None else allowed.size / self.count
            least = _READ * self._depth(filters[query], k) * self.lists / self.count
            alike.setdefault(min(self.lists, math.ceil(max(probes / share, least))), []).append(query)
        for visited, members in alike.items():
            for start in range(0, len(members), _ASKED):
                together = members[start : start + _ASKED]
                still += self._together(hits, together, queries[together], filters, visited, lower, k)
        return still

    def _together(
        self, hits: Hits, asked: list[int], queries: Vectors, filters: list[Filter], probes: int, lower: float, k: int
    ) -> list[int]:
        depths = [self._depth(filters[query], k) for query in asked]
        margins = np.interp(np.log(depths), self._depths, self._margins) + lower * float(np.abs(self._margins).max())
        bars = self._foretold(queries, depths) - (margins * np.linalg.norm(queries, axis=1)).astype(np.float32)
        edges, _, rows = self._scan(queries, bars, probes, low=lower > 0)
        scores = self._scored(queries, edges, rows)
        still = []
        for place, query in enumerate(asked):
            part = slice(edges[GROUPS * place], edges[GROUPS * (place + 1)])
            own, true, one = rows[part], scores[part], filters[query]
            if one.permitted < self.count:
                good = one.permits(own)
                own, true = own[good], true[good]
            best(hits, query, own, true)
            wanted = min(k, one.permitted)
            # Below the bar only what codes took for better than it is came through: as good ones were left out.
            if len(own) < wanted or hits.scores[query, wanted - 1] < bars[place]:
                still.append(query)
        return still

    def _foretold(self, queries: Vectors, depths: Sequence[int]) -> Vectors:
        """A score [A] that lies a fixed way from the last of the so many best of each query [A, D]."""
        ranks = [min(self.lists, max(1, -(-RANK * depth * self.lists // self.count))) for depth in depths]
        products, _ = self._index.quantizer.search(_wide(queries, self._width), max(ranks))
        found: Vectors = products[np.arange(len(queries)), np.array(ranks) - 1]
        return found

    def _scan(self, queries: Vectors, bars: Vectors, probes: int, *, low: bool = False) -> tuple[Rows, Vectors, Rows]:
        """What exceeds each query's bar in the lists that it visits: those of query a at edges[GROUPS a : GROUPS (a + 1)].

        Edges, scores by codes, rows. With `low` bars may lie anywhere: FAISS counts from the lowest score that codes can have,
        and answers nonsense to a bar below it.
        """
        visited, marked = -(-min(probes, self.lists) // GROUPS), self.dims
        asked = np.zeros((len(queries), GROUPS, self._width), np.float32)
        asked[:, :, :marked] = queries[:, None]
        wide: Vectors = asked.reshape(-1, self._width)
        signs, each = self._signs[: len(wide)], np.repeat(bars, GROUPS)
        # A list of another group must lie further away than any product can: twice the mark is the way between them.
        far = 4 * float(np.linalg.norm(queries, axis=1).max()) * self._longest
        if low:
            wide[:, marked] = far * signs
            each = np.maximum(each, self._lowest(wide, visited) - far)
        radius = far + float(np.abs(each).max())
        marks = radius - each
        wide[:, marked] = marks * signs
        found, scores, rows = self._index.range_search(wide, radius, params=self._faiss.SearchParametersIVF(nprobe=visited))
        edges = found.astype(np.int64)
        return edges, scores - np.repeat(marks, np.diff(edges)) if low else scores, rows

    def _lowest(self, wide: Vectors, visited: int) -> Vectors:
        """A score below any that codes can have in the lists that these questions visit."""
        pairs = self._faiss.vector_to_array(self._index.pq.centroids).reshape(self._width // 2, 16, 2)
        least = np.einsum("apd,pcd->apc", wide.reshape(len(wide), -1, 2), pairs).min(axis=2).sum(axis=1)
        products, _ = self._index.quantizer.search(wide, visited)
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


def _wide(vectors: Vectors, width: int) -> Vectors:
    """The vectors [N, D] with zeros behind them, [N, width]."""
    found = np.zeros((len(vectors), width), np.float32)
    found[:, : vectors.shape[1]] = vectors
    return found
