"""Approximate top k for single queries: a short list by 4 bits a number, then true scores.

At k = 2,000 a search of inverted lists is bound by what it reads and by how it keeps the best: FAISS holds them in a heap or a
reservoir. Here a score that k vectors will reach is foretold from the products with the centres alone; FAISS's fast scan of 4-bit
codes returns whatever exceeds it (no heap), and only this short list is scored in float32. How far below the foretold score the
bar must lie is measured when the lists are built. Fast scan: André, Kermarrec, Le Scouarnec 2017; FAISS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from index.centres import TRAINING_ROWS, Progress, trained
from index.certified import within
from index.exact import best, dot, exhaustive
from index.hits import Hits, Rows, SearchError, Vectors, check_exclusions, check_k, check_queries
from index.int8 import Crew, encode, fastest_way, products, scale_of
from index.lists import ListError, require_finite

FEWEST_ROWS = 20_000
"""With fewer, scoring everything is quicker than to train for it."""
RANK = 2
"""Times as many centres as k vectors fill lists: the product of the last of them lies a fixed way from the k-th best score."""
KEPT = 0.995
"""Of the true best that a visit meets, this part is to come into the short list."""
TRIED, TRIED_K = 24, 2_000
"""Queries by which the bar of the short list is set, and the k of them."""
_BLOCK_ROWS = 65_536


def choose_short_lists(count: int) -> int:
    """A number of lists for `count` vectors is returned: about 4 sqrt(N), at least 39 vectors each."""
    return max(1, min(int(2 ** round(np.log2(4 * max(count, 1) ** 0.5))), count // 39))


class ShortLists:
    """Answers top-k questions over vectors [N, D] that stay where they are, with N * D / 2 more bytes. Threads may share it.

    `probes` is how many lists a query visits; recall follows from it by measurement only (`brewline index tune`).
    """

    def __init__(
        self,
        vectors: Vectors,
        *,
        lists: int | None = None,
        probes: int | None = None,
        queries: Vectors | None = None,
        seed: int = 0,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Raises ListError for too many lists or too few vectors, SearchError for NaN and infinity."""
        self.count, self.dims = vectors.shape
        wanted = choose_short_lists(self.count) if lists is None else lists
        if self.count < FEWEST_ROWS or not 1 <= wanted <= self.count:
            raise ListError(f"{wanted} lists for {self.count} vectors: expected 1..N lists for at least {FEWEST_ROWS} vectors")
        require_finite(vectors)
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self._crew, self._way = Crew(threads), fastest_way(self.dims)
        self._index = self._filled(trained(self.vectors, wanted, seed), seed, progress)
        self.lists = wanted
        self.probes = probes or max(1, wanted // 16)
        middles = self._middles()
        self._scale = scale_of(middles)
        self._codes = encode(middles, self._scale)
        some = np.random.default_rng(seed).choice(self.count, TRIED, replace=False)
        self._margin = self._tried(self.vectors[some] if queries is None else check_queries(queries, self.dims)[:TRIED])

    def _filled(self, centres: Vectors, seed: int, progress: Progress | None) -> Any:
        """A FAISS index of 4-bit codes of what is left of each vector beside its centre."""
        import faiss as typed

        faiss: Any = typed
        lists, dims = centres.shape
        nearest: Any = faiss.IndexFlatL2(dims)
        nearest.add(centres)
        index: Any = faiss.IndexIVFPQFastScan(nearest, dims, lists, dims, 4, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.seed = seed
        chosen = np.random.default_rng(seed).choice(self.count, min(self.count, max(20_000, TRAINING_ROWS * 1024)), replace=False)
        index.train(self.vectors[np.sort(chosen)])
        for start in range(0, self.count, _BLOCK_ROWS):
            block = self.vectors[start : start + _BLOCK_ROWS]
            index.add(block)
            if progress is not None:
                progress(min(start + _BLOCK_ROWS, self.count), self.count)
        # Vectors go to the nearest centre; a query adds its product with the centre to that with the codes.
        self._quantizer = faiss.IndexFlatIP(dims)
        self._quantizer.add(centres)
        index.quantizer, index.own_fields, index.implem = self._quantizer, False, 10
        return index

    def _middles(self) -> Vectors:
        """The means [L, D] of the vectors of each list."""
        import faiss as typed

        faiss: Any = typed
        means = np.zeros((self.lists, self.dims), np.float32)
        for place in range(self.lists):
            size = self._index.invlists.list_size(place)
            if size:
                rows = faiss.rev_swig_ptr(self._index.invlists.get_ids(place), size)
                means[place] = self.vectors[rows].mean(axis=0)
        return means

    def _tried(self, queries: Vectors) -> float:
        """How far below the foretold score the bar must lie, for queries of length 1: what the best of these queries need."""
        k, needs = min(TRIED_K, self.count // 8), []
        for query in queries[:, None]:
            visited, foretold = self._plan(query, k, max(1, self.lists // 8))
            scores, rows = self._scan(query, visited, -1e30)
            true = dot(self.vectors, query[0], rows)
            last = np.partition(true, len(true) - k)[len(true) - k] if len(true) > k else -np.inf
            needs.append((foretold - np.quantile(scores[true >= last], 1 - KEPT)) / max(float(np.linalg.norm(query)), 1e-12))
        return float(np.quantile(needs, 0.75))

    @property
    def bytes(self) -> int:
        """Memory of everything but the vectors themselves."""
        return int(self.count * (self._index.pq.code_size + 8) + self.lists * self.dims * 4 + self._codes.nbytes)

    def search(self, queries: Vectors, k: int, exclude: Sequence[Rows] | None = None, *, probes: int | None = None) -> Hits:
        """About the best k rows of each query [Q, D] are returned, without its excluded rows, with their true scores.

        counts[q] is min(k, N - distinct excluded rows of q), always: where the short list is too short, everything is scored.
        Raises QueryError, ExclusionError, and SearchError for probes outside 1..lists or k below 1.
        """
        k = check_k(k)
        queries = check_queries(queries, self.dims)
        excluded = check_exclusions(exclude, len(queries), self.count)
        probes = self.probes if probes is None else probes
        if not 1 <= probes <= self.lists:
            raise SearchError(f"probes is {probes}, expected 1..{self.lists}: the lists that a query visits")
        hits = Hits.empty(len(queries), k)
        for query, left_out in enumerate(excluded):
            self._answer(hits, query, queries[query : query + 1], left_out, probes)
        return hits

    def _answer(self, hits: Hits, place: int, query: Vectors, left_out: Rows, probes: int) -> None:
        wanted = min(hits.rows.shape[1], self.count - len(left_out))
        if wanted <= 0:
            return
        depth = wanted + len(left_out)
        if 4 * depth < self.count:
            visited, foretold = self._plan(query, depth, probes)
            for lower in (0.0, 3.0):
                bar = foretold - (self._margin + lower * abs(self._margin)) * float(np.linalg.norm(query))
                rows, scores = self._listed(query, visited, bar)
                if left_out.size and rows.size:
                    kept = ~within(rows, left_out)
                    rows, scores = rows[kept], scores[kept]
                if len(rows) >= wanted:
                    best(hits, place, rows, scores)
                    return
        permitted = np.delete(np.arange(self.count), left_out) if left_out.size else None
        exhaustive(self.vectors, query[0], permitted, hits, place)

    def _plan(self, query: Vectors, k: int, probes: int) -> tuple[Rows, float]:
        """The lists that a query [1, D] visits, and a score that lies a fixed way from its k-th best."""
        scale = scale_of(query)
        sums = np.empty((1, self.lists), np.int32)
        products(encode(query, scale), self._codes, sums, self._way)
        near = np.argpartition(sums[0], self.lists - probes)[self.lists - probes :]
        rank = min(self.lists, -(-RANK * k * self.lists // self.count))
        middle = np.partition(sums[0], self.lists - rank)[self.lists - rank]
        return near, float(middle) * scale * self._scale

    def _listed(self, query: Vectors, visited: Rows, bar: float) -> tuple[Rows, Vectors]:
        """The short list with its true scores: lists are dealt out to the threads, each its share of the near ones."""

        def read(part: Rows) -> tuple[Rows, Vectors]:
            rows = self._scan(query, part, bar)[1]
            return rows, dot(self.vectors, query[0], rows)

        threads = self._crew.threads
        if threads == 1:
            return read(visited)
        read_all = self._crew.beside(read, [visited[first::threads] for first in range(min(threads, len(visited)))])
        return np.concatenate([rows for rows, _ in read_all]), np.concatenate([scores for _, scores in read_all])

    def _scan(self, query: Vectors, visited: Rows, bar: float) -> tuple[Vectors, Rows]:
        import faiss as typed

        faiss: Any = typed
        chosen: npt.NDArray[np.uint8] = np.zeros(self.lists, bool).view(np.uint8)
        chosen[visited] = 1
        selector = faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))
        parameters = faiss.SearchParametersIVF(nprobe=len(visited), quantizer_params=faiss.SearchParameters(sel=selector))
        _, scores, rows = self._index.range_search(query, bar, params=parameters)
        return scores, rows
