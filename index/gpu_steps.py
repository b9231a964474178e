"""The steps of a search on a GPU: scan, score, select. What they are for, and in which order, is `index.gpu_scan`'s."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from index.certified_codes import BLOCK
from index.filters import Filter, RowSet
from index.gpu_code import GpuAsked, GpuCoded, Held
from index.hits import Rows, Vectors

if TYPE_CHECKING:
    import torch

_STAGED = 128 << 10
"""Bytes of codes in flight in one program; A100, H100 and H200 have 163 KiB or more for it, smaller cards need a `Launch`."""
_WIDEST = 64
"""Queries of a program; with 128 its products do not fit the registers (sm_90, Triton 3.7.1: 192 to 264 bytes spilled)."""
_CHUNK = 128
"""Numbers of a code that are multiplied at a time."""
_GATHERED = 1 << 29
"""Bytes of vectors brought from host memory at a time."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernels are cut: codes of a tile, queries of a program (0: by their number), warps and stages (0: by these)."""

    tile: int = 128
    asked: int = 0
    warps: int = 0
    stages: int = 0
    scored: int = 128

    def of(self, queries: int, width: int, code_bytes: int) -> Launch:
        """The launch with every 0 replaced, for so many queries and codes of `width` numbers, is returned."""
        asked = self.asked or min(_WIDEST, max(16, 1 << (queries - 1).bit_length()))
        stage = width * code_bytes * (self.tile + asked)
        return Launch(
            self.tile,
            asked,
            self.warps or 4,
            self.stages or max(1, min(4, _STAGED // stage)),
            self.scored,
        )


class KnownSets:
    """Bits of row sets on a device, least recently used out first, within bytes and while a set lives; threads may share it."""

    def __init__(self, device: torch.device, most: int) -> None:
        self._device, self._most, self._lock = device, most, threading.RLock()
        self._held: WeakKeyDictionary[RowSet, torch.Tensor] = WeakKeyDictionary()

    @property
    def bytes(self) -> int:
        """Device memory of what is kept."""
        with self._lock:
            return sum(bits.numel() for bits in self._held.values())

    def bits(self, one: RowSet) -> torch.Tensor:
        """The bits uint8 [bytes] of a set are returned, copied if they were not there."""
        import torch

        with self._lock:
            bits = self._held.pop(one, None)
            if bits is None:
                while self.bytes + one.bits.nbytes > self._most and (oldest := next(iter(self._held), None)) is not None:
                    del self._held[oldest]
                bits = torch.from_numpy(one.bits.copy()).to(self._device)
            self._held[one] = bits
            return bits


@dataclass(frozen=True, slots=True)
class Group:
    """Queries that are scanned together, with their filters on the device.

    bits uint8 [S, bytes], which int32 [Q] (its set, -1: every row), both None where no query has a set; excluded int64 [n]
    rising: query << 32 | row; marked int64 [2, m]: (query, place in the sample) of what is excluded.
    """

    asked: GpuAsked
    filters: list[Filter]
    bits: torch.Tensor | None
    which: torch.Tensor | None
    excluded: torch.Tensor | None
    marked: torch.Tensor | None

    @classmethod
    def of(cls, asked: GpuAsked, filters: list[Filter], sampled: Rows, known: KnownSets) -> Group:
        """The filters are brought to the queries' device; sets that are `known` are there already."""
        import torch

        device = asked.vectors.device
        sets = list(dict.fromkeys(one.allowed for one in filters if one.allowed is not None))
        number = {one: at for at, one in enumerate(sets)}
        named = np.array([-1 if one.allowed is None else number[one.allowed] for one in filters], np.int32)
        bits = torch.stack([known.bits(one) for one in sets]) if sets else None
        which = torch.from_numpy(named).to(device) if sets else None
        query = np.repeat(np.arange(len(filters)), [len(one.excluded) for one in filters])
        if not query.size:
            return cls(asked, filters, bits, which, None, None)
        rows = np.concatenate([one.excluded for one in filters])
        at = np.minimum(np.searchsorted(sampled, rows), len(sampled) - 1)
        marked = np.stack([query, at])[:, sampled[at] == rows]
        return cls(asked, filters, bits, which, *(torch.from_numpy(x).to(device) for x in (query << 32 | rows, marked)))

    def permitted(self, found: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """The rows [A, W] found for these queries are returned, excluded ones as -1."""
        import torch

        if self.excluded is None:
            return found
        keys = asked[:, None] << 32 | found.clamp(min=0).long()
        at = torch.searchsorted(self.excluded, keys).clamp(max=len(self.excluded) - 1)
        return found.masked_fill(self.excluded[at] == keys, -1)


@dataclass(frozen=True, slots=True)
class Steps:
    """The kernels over one set of coded vectors."""

    held: Held
    coded: GpuCoded
    launch: Launch

    def survivors(
        self, group: Group, asked: torch.Tensor, bars: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows int32 [A, capacity] (-1 where none) of which each can reach its query's bar, and how many can, int32 [A].

        asked int64 [A]; bars float64 [A]. Where more can than `capacity`, any of them are there.
        """
        import torch

        from index.gpu_kernels import scan

        width, blocks = self.coded.codes.shape[1], self.coded.facts.shape[1]
        cut = self.launch.of(len(asked), width, self.coded.codes.element_size())
        groups = -(-len(asked) // cut.asked)
        wide, device = groups * cut.asked, bars.device
        queries = torch.zeros(wide, width, dtype=self.coded.codes.dtype, device=device)
        queries[: len(asked)] = group.asked.codes[asked]
        which = torch.full((wide,), -1, dtype=torch.int32, device=device)
        if group.which is not None:
            which[: len(asked)] = group.which[asked]
        found = torch.full(
            (len(asked), capacity), -1, dtype=torch.int32, device=device
        )  # what fills up the last group finds none
        counts = torch.zeros(wide, dtype=torch.int32, device=device)
        bits = which if group.bits is None else group.bits  # without sets nothing is read there
        scan[(blocks * groups,)](
            self.coded.codes,
            self.coded.rows,
            queries,
            group.asked.wishes(asked, bars, wide),
            self.coded.facts,
            bits,
            which,
            found,
            counts,
            len(self.held.vectors),
            blocks,
            groups,
            capacity,
            bits.shape[-1],
            DIMS=width,
            CHUNK=min(_CHUNK, width & -width),
            BLOCK=BLOCK,
            TILE=cut.tile,
            ASKED=cut.asked,
            WHOLE=self.coded.codes.dtype == torch.int8,
            FILTERED=group.bits is not None,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
        return found, counts[: len(asked)]

    def keys(self, rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """The keys int64 [A, W] of these rows int32 [A, W] (-1: none) for queries float32 [A, D] are returned, see `read`."""
        import torch

        if isinstance(self.held.vectors, torch.Tensor):
            return self._keys(self.held.vectors, rows, rows, queries)
        most = max(1, _GATHERED // (4 * queries.shape[1]))
        columns = max(1, min(most, rows.shape[1]))
        parts = []
        for some, asking in zip(rows.split(most // columns), queries.split(most // columns)):
            parts.append(torch.cat([self._gathered(part, asking) for part in some.split(columns, 1)], 1))
        return torch.cat(parts)

    def _gathered(self, rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """`keys` of rows whose vectors are brought to the device all at once."""
        real = rows >= 0
        places = (real.flatten().cumsum(0) - 1).clamp(min=0).int().view_as(rows)
        return self._keys(self.held.take(rows[real].long()), places, rows, queries)

    def _keys(self, vectors: torch.Tensor, places: torch.Tensor, rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        import torch

        from index.gpu_kernels import score

        rows, places = rows.contiguous(), places.contiguous()
        asked, width = rows.shape
        keys = torch.empty(asked, width, dtype=torch.int64, device=rows.device)
        groups = -(-width // self.launch.scored)
        if keys.numel():
            score[(asked * groups,)](
                vectors,
                places,
                rows,
                queries.contiguous(),
                keys,
                width,
                groups,
                DIMS=vectors.shape[1],
                ROWS=self.launch.scored,
            )
        return keys


def read(keys: torch.Tensor) -> tuple[Rows, Vectors]:
    """The rows and float32 scores of keys int64 [A, K] are returned, -1 and -inf where there is none."""
    import torch

    none = keys == torch.iinfo(torch.int64).min
    turned = (keys >> 32).int()
    scores = (turned ^ (turned >> 31 & 0x7FFFFFFF)).view(torch.float32).masked_fill(none, -torch.inf)
    rows = (0x7FFFFFFF - (keys & 0xFFFFFFFF)).masked_fill(none, -1)
    return rows.cpu().numpy(), scores.cpu().numpy()
