"""Exact top k by a scan of int8 codes, with a proof for every answer that nothing was missed.

1. A sample of the vectors foretells a score that about 1.5 k vectors reach. 2. Whatever can reach it by its int8 product and the
bound on the rounding (`index.certified_codes`) survives. 3. Survivors are scored in float32. When k of them reach the foretold
score the answer is proven: all others lie below it. When not, the score found is the next bar, or everything is scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from index.certified_codes import BLOCK, Asked, Coded, Doubles, code
from index.certified_scan import Survivors, scan
from index.exact import best, dot, exact_search, exhaustive
from index.filters import Allow, Filter, check_filters
from index.hits import Hits, Rows, Vectors, check_k, check_queries
from index.int8 import MAX_DIMS, Crew, Way, encode, fastest_way, products, scale_of
from index.looks import Looks

QUERIES = 256
"""Queries scanned together."""
SAMPLE = 16_384
SMALL = 8 * BLOCK
"""Up to here scoring everything is quicker than to prove that it is not needed."""
PAYS = 256
"""From so many queries on it pays to code the vectors for them alone."""
ROUNDS = 3
FEW = 10
"""When fewer than one row in so many is permitted, they are scored at once: a scan would keep mostly others."""
MOST = 8
"""Survivors per answer from which on scoring everything is as good."""


@dataclass(frozen=True, slots=True)
class Proof:
    """How Q answers were proven, int64 [Q] each: `scored` vectors in float32, `rounds` of scanning, 0 where all were scored."""

    scored: Rows
    rounds: Rows


class Certified:
    """Exact search over vectors [N, D] that stay where they are (a mapped file will do), with N * D more bytes of codes.

    Threads may share it. `threads` are its own (default: as many as torch uses), unless it is lent a `crew`.
    """

    def __init__(self, vectors: Vectors, *, threads: int | None = None, seed: int = 0, crew: Crew | None = None) -> None:
        """Reads all vectors twice. Raises SearchError for NaN, infinity or too many dims."""
        self.vectors = vectors
        self.count, self.dims = vectors.shape
        self.coded: Coded = code(vectors)
        chosen = np.random.default_rng(seed).choice(self.count, min(self.count, max(SAMPLE, self.count // 64)), replace=False)
        self._sampled = np.sort(chosen)
        sample = np.asarray(vectors[self._sampled], dtype=np.float32)
        self._step = scale_of(sample)
        self._sample = encode(sample, self._step)
        self._way: Way = fastest_way(self.dims)
        self._crew = crew or Crew(threads)
        self.looks = Looks()

    @property
    def bytes(self) -> int:
        """Memory of everything but the vectors themselves."""
        return self.coded.bytes + self._sample.nbytes + self._sampled.nbytes

    def search(self, queries: Vectors, k: int, exclude: Sequence[Rows] | None = None, *, allow: Allow = None) -> Hits:
        """The true top k of every query [Q, D] is returned, of the rows that `allow` holds, without its excluded ones.

        It is what `exact_search` defines, and counts[q] is min(k, permitted rows of q). Raises as `prove`.
        """
        return self.prove(queries, k, exclude, allow=allow)[0]

    def prove(
        self, queries: Vectors, k: int, exclude: Sequence[Rows] | None = None, *, allow: Allow = None
    ) -> tuple[Hits, Proof]:
        """The same answer is returned with how it was proven. Raises QueryError, ExclusionError, FilterError, SearchError."""
        k = check_k(k)
        queries = check_queries(queries, self.dims)
        filters = check_filters(exclude, allow, len(queries), self.count)
        hits = Hits.empty(len(queries), k)
        proof = Proof(np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64))
        for start in range(0, len(queries), QUERIES):
            self._answer(np.arange(start, min(start + QUERIES, len(queries))), queries, filters, hits, proof)
        rounds, scored = proof.rounds, proof.scored
        self.looks.note(int((rounds == 1).sum()), int((rounds > 1).sum()), int(((rounds == 0) & (scored > 0)).sum()))
        return hits, proof

    def _answer(self, asked: Rows, queries: Vectors, filters: list[Filter], hits: Hits, proof: Proof) -> None:
        """The hits and proofs of the asked queries are filled."""
        permitted = np.array([filters[query].permitted for query in asked], np.int64)
        worth = (4 * np.minimum(permitted, hits.rows.shape[1]) < permitted) & (FEW * permitted > self.count)
        open_ones = asked[worth] if self.count > SMALL else asked[:0]
        everything = asked[(permitted > 0) & ~worth] if self.count > SMALL else asked[permitted > 0]
        bars = self._foretell(queries, open_ones, filters, hits.rows.shape[1])
        for _ in range(ROUNDS):
            if not open_ones.size:
                break
            proven, bars = self._round(open_ones, bars, queries, filters, hits, proof)
            everything = np.concatenate([everything, open_ones[~proven & np.isinf(bars)]])
            still = ~proven & np.isfinite(bars)
            open_ones, bars = open_ones[still], bars[still]
        for query in np.concatenate([everything, open_ones]).tolist():
            one = filters[query]
            rows = None if one.permitted == self.count else one.set().rows()
            exhaustive(self.vectors, queries[query], rows, hits, query)
            proof.scored[query], proof.rounds[query] = one.permitted, 0

    def _foretell(self, queries: Vectors, asked: Rows, filters: list[Filter], k: int) -> Doubles:
        """A score [A] per asked query that, but for one in some hundreds, k vectors or more reach."""
        scales = [scale_of(query) for query in queries[asked]]
        sums = np.empty((len(asked), len(self._sample)), np.int32)
        if len(asked):
            codes = np.concatenate([encode(queries[query][None], scale) for query, scale in zip(asked, scales)])
            self._crew.apart(lambda: products(codes, self._sample, sums, self._way))
        bars = np.empty(len(asked))
        for place, query in enumerate(asked.tolist()):
            seen, one = sums[place], filters[query]
            if one.permitted < self.count:
                seen = seen[one.permits(self._sampled)]
            expected = k * seen.size / one.permitted
            rank = math.ceil(expected + 3 * math.sqrt(expected) + 1)
            step = scales[place] * self._step
            bars[place] = np.partition(seen, seen.size - rank)[seen.size - rank] * step if rank <= seen.size else -np.inf
        return bars

    def _round(
        self, asked: Rows, bars: Doubles, queries: Vectors, filters: list[Filter], hits: Hits, proof: Proof
    ) -> tuple[npt.NDArray[np.bool_], Doubles]:
        """Whether each asked query is proven, and its next bar: -inf where nothing but scoring everything is left."""
        coded = Asked.of(queries[asked], self.coded)
        most = MOST * hits.rows.shape[1] + 8 * BLOCK
        found = scan(self.coded, coded.codes, coded.bars(bars, self.coded), most, self._crew, self._way)

        def settle(place: int) -> float:
            query = int(asked[place])
            candidates = self._candidates(place, coded, found, filters[query])
            k = min(hits.rows.shape[1], filters[query].permitted)
            if candidates is None or candidates[0].size < k:
                return -np.inf
            rows, scores = self._score(queries[query], *candidates, k)
            best(hits, query, rows, scores)
            proof.scored[query] += rows.size
            proof.rounds[query] += 1
            return float(hits.scores[query, k - 1])

        last = np.array(self._crew.each(settle, list(range(len(asked)))))
        return last >= np.maximum(bars, np.finfo(np.float64).min), last

    def _candidates(self, place: int, asked: Asked, found: Survivors, one: Filter) -> tuple[Rows, Doubles, Doubles] | None:
        """The rows that survived for one query, their scores by codes and the highest they can have; None if it was crowded."""
        if found.crowded[place]:
            return None
        part = slice(int(found.edges[place]), int(found.edges[place + 1]))
        places = found.places[part]
        rows, blocks = self.coded.rows[places], places // BLOCK
        scores = found.products[part] * (asked.scales[place] * self.coded.scales[blocks])
        highest = scores + asked.errors[place, blocks]
        good = one.permits(rows)
        return (rows, scores, highest) if good.all() else (rows[good], scores[good], highest[good])

    def _score(self, query: Vectors, rows: Rows, scores: Doubles, highest: Doubles, k: int) -> tuple[Rows, Vectors]:
        """Rows and float32 scores, the true k best among them: the best by codes, and all that can reach the last of them."""
        first = np.argpartition(scores, rows.size - k)[rows.size - k :]
        known = dot(self.vectors, query, rows[first])
        rest = highest >= known.min()
        rest[first] = False
        others = rows[rest]
        return np.concatenate([rows[first], others]), np.concatenate([known, dot(self.vectors, query, others)])


def truth(vectors: Vectors, queries: Vectors, k: int) -> Hits:
    """The true top k of the queries is returned, by whichever exact way is quicker for so many queries.

    To code the vectors costs about what it saves over 120 to 300 queries (one core, 50,000 to 1,000,000 x 128, k = 2,000).
    """
    if len(queries) >= PAYS and len(vectors) > SMALL and vectors.shape[1] <= MAX_DIMS and fastest_way(vectors.shape[1]) == "int8":
        return Certified(vectors).search(queries, k)
    return exact_search(vectors, queries, k)


def within(rows: Rows, members: Rows) -> npt.NDArray[np.bool_]:
    """Which rows are among the members (sorted, not none) is returned."""
    at = np.minimum(np.searchsorted(members, rows), members.size - 1)
    found: npt.NDArray[np.bool_] = members[at] == rows
    return found
