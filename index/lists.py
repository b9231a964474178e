"""Approximate top k over int8 lists, with a recall to ask for instead of a number of lists to visit.

Every list is expected to hold some of a query's best k (`index.centres`); lists are visited by how dense they are in them, until
their expected parts add up to the wished share. A query that lies apart from all centres visits more, one within a cluster less.
At equal mean recall it reads as much as a fixed number of lists does (1,000,000 x 128 of `index.bench`, 4,096 lists, recall .95
and .97: within 3 %): what it gives is a share to ask for instead of a number. What is read is multiplied as int8, the best by
codes are scored in float32. Made for batches, which read each list once; `index.shortlist` is quicker for one query.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from index.centres import Centres, Progress, find_centres
from index.certified import within
from index.errors import BrewlineError
from index.exact import best, dot
from index.hits import Hits, Rows, SearchError, Vectors, check_exclusions, check_k, check_queries
from index.int8 import Bytes, Crew, Sums, code_dims, encode, fastest_way, runs_product, scale_of, views

QUERIES = 256
ALONE = 4
"""Up to this many queries each visits its lists on its own; more share the reading of a list."""
PAD = 32
"""Lists are filled up to a multiple of this: torch prepares a product anew for every new number of rows."""
_BLOCK_ROWS = 65_536
SLACK = 2.0
"""Deviations of the rounding below the k-th best score by codes, down to which vectors are scored in float32."""


class ListError(BrewlineError):
    """Lists cannot be made from these vectors."""


def choose_lists(count: int) -> int:
    """A number of lists for `count` vectors is returned: about 2 sqrt(N), none below 64 vectors each."""
    return max(1, min(int(2 ** round(math.log2(max(1.0, 2 * math.sqrt(count))))), count // 64))


def require_finite(vectors: Vectors) -> None:
    """All numbers of the vectors are finite. Raises SearchError."""
    for start in range(0, len(vectors), _BLOCK_ROWS):
        if not np.isfinite(vectors[start : start + _BLOCK_ROWS]).all():
            raise SearchError(f"a vector from {start} on holds NaN or infinity: the vectors are damaged, build them again")


class ListSearcher:
    """Answers top-k questions over vectors [N, D] that stay where they are, with N * D more bytes. Threads may share it.

    `reach` is the expected share of the true best k, in (0, 1]; 1 visits everything.
    """

    def __init__(
        self,
        vectors: Vectors,
        *,
        lists: int | None = None,
        reach: float = 0.97,
        seed: int = 0,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Raises ListError for more lists than vectors, SearchError for NaN and infinity."""
        self.count, self.dims = vectors.shape
        wanted = choose_lists(self.count) if lists is None else lists
        if not 1 <= wanted <= max(1, self.count):
            raise ListError(f"{wanted} lists for {self.count} vectors: expected 1..{self.count}")
        self.vectors, self.reach = vectors, reach
        require_finite(vectors)
        self._crew, self._way = Crew(threads), fastest_way(self.dims)
        self.centres: Centres | None = None
        if self.count:
            self.centres, nearest = find_centres(vectors, wanted, seed, progress)
            self._lay_out(nearest, wanted)

    def _lay_out(self, nearest: Rows, lists: int) -> None:
        """Codes stand list after list; each list has one step."""
        sizes = np.bincount(nearest, minlength=lists)
        widths = -(-sizes // PAD) * PAD
        self._edges: Rows = np.concatenate([[0], np.cumsum(widths)])
        self._widths, self._filling = widths, widths - sizes
        self._codes: Bytes = np.zeros((int(self._edges[-1]), code_dims(self.dims)), np.int8)
        self._rows: npt.NDArray[np.int64] = np.full(len(self._codes), -1, np.int64)
        self._scales: Vectors = np.zeros(lists, np.float32)
        self._longest = 0.0
        order, starts = np.argsort(nearest, kind="stable"), np.concatenate([[0], np.cumsum(sizes)])
        for place in range(lists):
            rows, at = order[starts[place] : starts[place + 1]], int(self._edges[place])
            numbers = np.asarray(self.vectors[rows], dtype=np.float32)
            self._scales[place] = scale_of(numbers)
            self._codes[at : at + len(rows)] = encode(numbers, float(self._scales[place]))
            self._rows[at : at + len(rows)] = rows
            self._longest = max(self._longest, float(np.linalg.norm(numbers, axis=1).max(initial=0)))
        self._runs: list[Any] = views(self._codes, self._edges.tolist(), self._way)

    @property
    def bytes(self) -> int:
        """Memory of everything but the vectors themselves."""
        if self.centres is None:
            return 0
        return int(self._codes.nbytes + self._rows.nbytes + self.centres.centres.nbytes + 5 * 8 * len(self._widths))

    def search(self, queries: Vectors, k: int, exclude: Sequence[Rows] | None = None, *, reach: float | None = None) -> Hits:
        """About the best k rows of each query [Q, D] are returned, without its excluded rows, with their true scores.

        counts[q] is min(k, N - distinct excluded rows of q), always: where the visited lists hold fewer, more are visited.
        Raises QueryError, ExclusionError, and SearchError for a reach outside (0, 1] or k below 1.
        """
        k = check_k(k)
        queries = check_queries(queries, self.dims)
        excluded = check_exclusions(exclude, len(queries), self.count)
        reach = self.reach if reach is None else reach
        if not 0 < reach <= 1:
            raise SearchError(f"reach is {reach}, expected above 0 and at most 1: the share of the best that is to be found")
        hits = Hits.empty(len(queries), k)
        for start in range(0, len(queries), QUERIES):
            asked = [q for q in range(start, min(start + QUERIES, len(queries))) if self.count > len(excluded[q])]
            if asked:
                self._answer(asked, queries, excluded, hits, reach)
        return hits

    def _answer(self, asked: list[int], queries: Vectors, excluded: list[Rows], hits: Hits, reach: float) -> None:
        """The hits of the asked queries are filled; those that stayed short visit all lists."""
        k = hits.rows.shape[1]
        visits = self._visits(queries[asked], k, [len(excluded[query]) for query in asked], reach)
        scales = np.array([scale_of(queries[query]) for query in asked])
        codes = np.concatenate([encode(queries[query][None], scale) for query, scale in zip(asked, scales.tolist())])
        if len(asked) <= ALONE:
            sums = [self._alone(codes[place : place + 1], visits[place]) for place in range(len(asked))]
        else:
            sums = self._together(codes, visits)

        def settle(place: int) -> None:
            query = asked[place]
            self._settle(hits, query, queries[query], float(scales[place]), sums[place], visits[place], excluded[query])

        self._crew.each(settle, list(range(len(asked))))
        short = [query for query in asked if hits.counts[query] < min(k, self.count - len(excluded[query]))]
        if short and reach < 1:
            self._answer(short, queries, excluded, hits, 1.0)

    def _visits(self, queries: Vectors, k: int, left_out: list[int], reach: float) -> list[Rows]:
        """The lists that each query visits, rising: the densest, until the expected parts of the best k reach the share."""
        assert self.centres is not None
        if reach == 1:
            return [np.arange(len(self._widths))] * len(queries)
        expected = self.centres.expected(queries, k)
        density = expected / np.maximum(self.centres.sizes, 1)
        visits = []
        for parts, order, more in zip(expected, np.argsort(-density, axis=1), left_out):
            gathered = np.cumsum(parts[order])
            held = np.cumsum(self.centres.sizes[order])
            enough = max(np.searchsorted(gathered, reach * gathered[-1]), np.searchsorted(held, min(k + more, self.count)))
            visits.append(np.sort(order[: int(enough) + 1]))
        return visits

    def _alone(self, code: Bytes, visits: Rows) -> Sums:
        """The products of one query [1, D] with its lists, side by side."""
        widths = self._widths[visits]
        out = np.empty((1, int(widths.sum())), np.int32)
        runs_product(code, [self._runs[place] for place in visits.tolist()], widths.tolist(), out, self._way)
        return out[0]

    def _together(self, codes: Bytes, visits: list[Rows]) -> list[Sums]:
        """The same for many queries: each list is read once, by all that visit it."""
        places = np.concatenate(visits)
        asking = np.repeat(np.arange(len(visits)), [len(one) for one in visits])
        order = np.argsort(places, kind="stable")
        lists, starts = np.unique(places[order], return_index=True)
        groups = np.split(asking[order], starts[1:])

        def read(at: int) -> Sums:
            place = int(lists[at])
            out = np.empty((len(groups[at]), int(self._widths[place])), np.int32)
            runs_product(codes[groups[at]], [self._runs[place]], [out.shape[1]], out, self._way)
            return out

        read_all = self._crew.each(lambda share: [read(at) for at in share], self._crew.shares(len(lists)))
        parts: list[list[Sums]] = [[] for _ in visits]
        for group, out in zip(groups, itertools.chain.from_iterable(read_all)):
            for row, query in zip(out, group.tolist()):
                parts[query].append(row)
        return [np.concatenate(part) for part in parts]

    def _settle(self, hits: Hits, query: int, vector: Vectors, scale: float, sums: Sums, visits: Rows, left_out: Rows) -> None:
        """The hits of one query are the best of what it read."""
        widths = self._widths[visits]
        steps = np.repeat(self._scales[visits] * np.float32(scale), widths)
        scores: Vectors = np.multiply(sums, steps, out=steps, casting="unsafe", dtype=np.float32)
        filling, ends = self._filling[visits], np.cumsum(widths)
        scores[np.repeat(ends - np.cumsum(filling), filling) + np.arange(filling.sum())] = -np.inf
        depth = min(hits.rows.shape[1] + len(left_out), len(scores))
        length = float(np.linalg.norm(vector))
        lost = math.hypot(float(self._scales[visits].max()) * length, scale * self._longest) / math.sqrt(12)
        bar = np.partition(scores, len(scores) - depth)[len(scores) - depth] - SLACK * lost
        flat = np.flatnonzero(scores >= bar)
        at = np.searchsorted(ends, flat, side="right")
        rows = self._rows[flat + (self._edges[visits + 1] - ends)[at]]
        good = rows >= 0
        if left_out.size:
            good &= ~within(rows, left_out)
        rows = rows[good]
        best(hits, query, rows, dot(self.vectors, vector, rows))
