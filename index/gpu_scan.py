"""Exact, certified top k on a GPU: the search of `index.certified` as two Triton kernels, and no matrix of scores.

1. A sample foretells a score that somewhat more than k permitted rows reach. 2. The scan multiplies codes, compares with that
score less the bound on the rounding, and appends the rows that can reach it to a list of each query; it reads sets of rows there.
3. Listed rows are scored in float32. When the list had room for all and k of them reach the score, the answer is proven. The k
best of a list that overflowed still give a true lower bound, and the bar is raised to it, or else the list is widened; where
neither helps, everything permitted is scored.

Scores are sums in float64 in the order of the dims, rounded once (`ordered_dot`): the same bits on every machine.
`index.exact.dot` sums in float32, and rows whose scores differ by less than its rounding may change places.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from index.certified import MOST, SAMPLE, SMALL, Proof
from index.certified_codes import BLOCK, Doubles
from index.filters import Allow, Filter, check_filters
from index.gpu_code import GpuAsked, GpuCodes, Held, code_on_device, coded_memory, gpu_reason, on_device, stays
from index.gpu_steps import Group, KnownSets, Launch, Steps, read
from index.hits import Hits, Rows, SearchError, Vectors, check_k, check_queries
from index.int8 import MAX_DIMS

if TYPE_CHECKING:
    import torch

QUERIES = 1_024
"""Queries scanned together."""
SLOTS = 1 << 25
"""Of all lists together: 128 MiB of rows and 256 of keys."""
SHARE = 128
"""One vector in so many is sampled."""
ROUNDS = 4
_SCORES = 1 << 27
"""Sampled scores held at a time, in bfloat16."""
_SET_BYTES = 1 << 30
"""Sets of rows that one scan reads, and that are kept for the next."""
_DIRECT = 1 << 20
"""Rows scored at a time where all are."""
_COARSE = 2.0**-7
"""What two roundings to bfloat16 can change."""


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes on the device: codes with their rows, the sample, float32 vectors (0 when they stay on the host), sets of rows that
    are kept (at most), and scratch."""

    codes: int
    sample: int
    vectors: int
    sets: int
    scratch: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.codes + self.sample + self.vectors + self.sets + self.scratch


def predicted(count: int, dims: int, *, codes: GpuCodes = "int8", on_host: bool = False) -> GpuMemory:
    """The device memory of a `GpuExact` over `count` vectors is returned before anything is built.

    Scratch is the larger of what a full batch of queries takes and what sorting the vectors takes at the start.
    """
    sample = min(count, max(SAMPLE, count // SHARE)) * (2 * dims + 8)
    vectors = 0 if on_host else 4 * count * dims
    sets = min(_SET_BYTES, QUERIES * -(-count // 8))
    scratch = max(
        28 * SLOTS + 4 * _SCORES + sets, 40 * count
    )  # a scan reads its sets side by side: copies of those that are kept
    return GpuMemory(coded_memory(count, dims, codes), sample, vectors, sets, scratch)


def ordered_dot(vectors: Vectors, query: Vectors) -> Vectors:
    """The scores float32 [n] of a query [D] with vectors [n, D], as the kernel computes them, are returned: its twin in numpy."""
    total = np.zeros(len(vectors))
    for numbers, asked in zip(np.asarray(vectors, np.float64).T, query.astype(np.float64)):
        total += numbers * asked
    scores: Vectors = total.astype(np.float32) + np.float32(0)
    return scores


class GpuExact:
    """Exact search over vectors [N, D] by a scan of their codes on a device; threads may share it.

    float32 vectors lie on the device (4 N D bytes beside N D of int8 codes; 64 GB for 100,000,000 x 128), or with `on_host` where
    they are: a mapped file will do, and each survivor crosses the bus. `device` "cpu" runs in Triton's interpreter alone.
    """

    def __init__(
        self,
        vectors: Vectors | torch.Tensor,
        *,
        device: str = "cuda",
        codes: GpuCodes = "int8",
        on_host: bool = False,
        seed: int = 0,
        launch: Launch | None = None,
    ) -> None:
        """Raises SearchError where the device cannot do it or has not the memory, for NaN or infinity, and too many dims."""
        import torch

        reason = gpu_reason(torch.device(device).type)
        if reason:
            raise SearchError(f"no search on {device}: {reason}")
        self.count, self.dims = (int(size) for size in vectors.shape)
        if self.dims > MAX_DIMS or self.count >= 2**31 - BLOCK:
            raise SearchError(f"vectors are {[self.count, self.dims]}: a GPU searches below 2**31 of up to {MAX_DIMS} dims")
        self.device, self.kind = torch.empty(0, device=device).device, codes  # "cuda" becomes the one in use, "cuda:0"
        self.memory = predicted(self.count, self.dims, codes=codes, on_host=on_host)
        self._check_memory(self.memory.vectors if stays(vectors, self.device) else 0, on_host)
        with self._current():
            away = vectors.cpu().numpy() if on_host and isinstance(vectors, torch.Tensor) else vectors
            held = Held(away if on_host else on_device(away, self.device), self.device)
            self.steps = Steps(held, code_on_device(held, codes), launch or Launch())
            size = min(self.count, max(SAMPLE, self.count // SHARE))
            self._sampled: Rows = np.sort(np.random.default_rng(seed).choice(self.count, size, replace=False, shuffle=False))
            self._sampled_here = torch.from_numpy(self._sampled).to(self.device)
            sample = held.take(self._sampled_here)
            self._scale = max(float(sample.abs().max()), float(np.finfo(np.float32).tiny)) if size else 1.0
            self._sample = (sample / self._scale).bfloat16()
        self._sets = KnownSets(self.device, self.memory.sets)

    @property
    def bytes(self) -> int:
        """Device memory of what is kept between searches."""
        return self.memory.codes + self.memory.sample + self.memory.vectors + self._sets.bytes

    def search(self, queries: Vectors, k: int, exclude: Sequence[Rows] | None = None, *, allow: Allow = None) -> Hits:
        """The true top k of every query [Q, D] is returned, as `Certified.search` does, by scores of `ordered_dot`."""
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
        step = max(1, min(QUERIES, SLOTS // self._capacity(k), 8 * _SET_BYTES // max(1, self.count)))
        with self._current():
            for start in range(0, len(queries), step):
                part = slice(start, start + step)
                asked = GpuAsked.of(queries[part], self.device, self.kind)
                group = Group.of(asked, filters[part], self._sampled, self._sets)
                some = Hits(hits.rows[part], hits.scores[part], hits.counts[part])
                self._answer(group, some, Proof(proof.scored[part], proof.rounds[part]))
        return hits, proof

    def _answer(self, group: Group, hits: Hits, proof: Proof) -> None:
        """The hits and proofs of a group, views of the whole, are filled."""
        k, capacity = hits.rows.shape[1], self._capacity(hits.rows.shape[1])
        permitted = np.array([one.permitted for one in group.filters], np.int64)
        left = permitted > 0
        asked = np.flatnonzero((4 * np.minimum(permitted, k) < permitted) & (permitted > SMALL))
        bars = self._foretell(group, asked, permitted[asked], k)
        asked, bars = asked[np.isfinite(bars)], bars[np.isfinite(bars)]
        for _ in range(ROUNDS):
            if not asked.size:
                break
            rows, scores, seen = self._round(group, asked, bars, capacity, k)
            last, whole = scores[:, -1].astype(np.float64), seen <= capacity
            proof.scored[asked] += np.minimum(seen, capacity)
            proof.rounds[asked] += 1
            proven = whole & (last >= bars)
            done = asked[proven]
            hits.rows[done], hits.scores[done], hits.counts[done], left[done] = rows[proven], scores[proven], k, False
            stuck = ~whole & (last <= bars)
            going = ~proven & np.isfinite(last) & ~(stuck & (seen > SLOTS // len(asked)))
            capacity = max(capacity, int(seen[stuck & going].max(initial=0)))
            asked, bars = asked[going], np.where(stuck, bars, last)[going]
        for query in np.flatnonzero(left).tolist():
            self._score_all(group, query, hits)
            proof.scored[query], proof.rounds[query] = permitted[query], 0
        if not (np.isfinite(hits.scores) | (hits.rows < 0)).all():
            raise SearchError("a vector gives a score that is infinite: the vectors are damaged, build them again")

    def _round(
        self, group: Group, asked: Rows, bars: Doubles, capacity: int, k: int
    ) -> tuple[Rows, Vectors, npt.NDArray[np.int32]]:
        """The k best [A, k] of what a scan lists for the asked queries, and how many it found for each, room or not."""
        import torch

        places = torch.from_numpy(asked).to(self.device)
        found, counts = self.steps.survivors(group, places, torch.from_numpy(bars).to(self.device), capacity)
        seen: npt.NDArray[np.int32] = counts.cpu().numpy()
        found = group.permitted(found[:, : max(k, min(capacity, int(seen.max())))], places)
        keys = self.steps.keys(found, group.asked.vectors[places])
        return *read(torch.topk(keys, k).values), seen

    def _foretell(self, group: Group, asked: Rows, permitted: Rows, k: int) -> Doubles:
        """A score [A] per asked query that, but for one in some hundreds, k rows or more reach; -inf where none is known."""
        import torch

        bars = np.full(len(asked), -np.inf)
        step = max(1, _SCORES // max(1, len(self._sampled)))
        for start in range(0, len(asked), step):
            some = torch.from_numpy(asked[start : start + step]).to(self.device)
            scale = group.asked.vectors[some].abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            seen = (group.asked.vectors[some] / scale).bfloat16() @ self._sample.T
            held = self._drop(group, some, seen)
            expected = k * held / permitted[start : start + step]
            rank = np.ceil(expected + 3 * np.sqrt(expected) + 1).astype(np.int64)
            known = rank <= held
            if known.any():
                best = torch.topk(seen, int(rank[known].max())).values.double() * scale.double() * self._scale
                at = torch.from_numpy(np.where(known, rank, 1) - 1).to(self.device)
                here = best.gather(1, at[:, None])[:, 0].cpu().numpy()
                bars[start : start + step] = np.where(known, here - np.abs(here) * _COARSE, -np.inf)
        return bars

    def _drop(self, group: Group, asked: torch.Tensor, seen: torch.Tensor) -> Rows:
        """Sampled scores [A, S] of rows that are not permitted become -inf; how many are left [A] is returned."""
        import torch

        if group.bits is not None and group.which is not None:
            packed = group.bits[:, self._sampled_here >> 3] >> (self._sampled_here & 7).to(torch.uint8)
            own = group.which[asked].long()
            seen.masked_fill_((own >= 0)[:, None] & ((packed & 1) == 0)[own.clamp(min=0)], -torch.inf)
        if group.marked is not None:
            place = torch.full((len(group.filters),), -1, device=self.device)
            place[asked] = torch.arange(len(asked), device=self.device)
            query, at = place[group.marked[0]], group.marked[1]
            seen[query[query >= 0], at[query >= 0]] = -torch.inf
        if group.bits is None and group.marked is None:
            return np.full(len(asked), len(self._sampled))
        held: Rows = (seen > -torch.inf).sum(1).cpu().numpy()
        return held

    def _score_all(self, group: Group, query: int, hits: Hits) -> None:
        """The hits of one query are the best of everything it permits."""
        import torch

        one: Filter = group.filters[query]
        rows = None if one.permitted == self.count else one.set().rows()
        best = torch.empty(1, 0, dtype=torch.int64, device=self.device)
        for start in range(0, one.permitted, _DIRECT):
            stop = min(start + _DIRECT, one.permitted)
            here = np.arange(start, stop) if rows is None else rows[start:stop]
            these = torch.from_numpy(here.astype(np.int32)[None]).to(self.device)
            keys = self.steps.keys(these, group.asked.vectors[query][None])
            together = torch.cat([best, keys], 1)
            best = torch.topk(together, min(hits.rows.shape[1], together.shape[1])).values
        found, scores = read(best)
        count = found.shape[1]
        hits.rows[query, :count], hits.scores[query, :count], hits.counts[query] = found[0], scores[0], count

    @staticmethod
    def _capacity(k: int) -> int:
        """The slots of one query's list at first."""
        return min(SLOTS, 1 << (MOST * k + BLOCK - 1).bit_length())

    def _current(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _check_memory(self, there: int, on_host: bool) -> None:
        """Raises SearchError where less is free than is predicted, of which `there` bytes are taken already."""
        import torch

        if self.device.type != "cuda":
            return
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)  # torch's own, free for us
        free, needed = torch.cuda.mem_get_info(self.device)[0] + kept, self.memory.total - there
        if needed > free:
            away = "" if on_host else f"; {(needed + there - self.memory.vectors) / 2**30:.1f} with on_host=True"
            size = f"{self.count:,} x {self.dims} need {needed / 2**30:.1f} GiB"
            raise SearchError(f"{size} of {self.device}, which has {free / 2**30:.1f} free{away}")
