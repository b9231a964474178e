"""How the layer loop asks for attention, and the way that works with every backend: two calls, prefix and self, and a merge.

Legend: H query heads, G key heads, D dims of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ranking.prefill.attend import Attend, Bounds, blend

ROWS = 2_048
"""Rows of a block on a CPU. Fewer waste matrix products, more fall out of the cache between two steps."""

Pair = tuple[Tensor, Tensor]


class Attention(Protocol):
    """Both halves of one layer's attention, answers written into `out`."""

    @property
    def name(self) -> str:
        """The backend's name."""

    def prefix(self, q: Tensor, keys: Tensor, values: Tensor, start: int, rows: int, out: Tensor) -> None:
        """`rows` rows of a prefix from `start` on see every key up to their own."""

    def items(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefixes: Sequence[Pair],
        queries: Sequence[Bounds],
        keys: Sequence[Bounds],
        out: Tensor,
    ) -> None:
        """Each item's queries see their request's prefix and the item itself (causally, if it asks from every row)."""


class Cascade:
    """Two calls of an `attend` backend, prefix and self, merged by log-sum-exp."""

    def __init__(self, name: str, attend: Attend) -> None:
        self.name, self._attend = name, attend

    def prefix(self, q: Tensor, keys: Tensor, values: Tensor, start: int, rows: int, out: Tensor) -> None:
        """See Attention."""
        own = np.array([0, rows], np.int32)
        found, sums = self._attend(q[:rows], keys[start : start + rows], values[start : start + rows], own, own, True)
        if start:
            seen = self._attend(q[:rows], keys[:start], values[:start], own, np.array([0, start], np.int32), False)
            found = blend(*seen, found, sums)
        out[:rows] = found

    def items(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefixes: Sequence[Pair],
        queries: Sequence[Bounds],
        keys: Sequence[Bounds],
        out: Tensor,
    ) -> None:
        """See Attention."""
        cu_q = np.concatenate([queries[0][:1], *(part[1:] for part in queries)])
        cu_k = np.concatenate([keys[0][:1], *(part[1:] for part in keys)])
        own, sums = self._attend(q, k, v, cu_q, cu_k, len(q) == len(k) and bool((np.diff(cu_q) == np.diff(cu_k)).all()))
        if q.device.type != "cpu":
            cross_q = np.array([0, *(part[-1] for part in queries)], np.int32)
            cross_k = np.cumsum([0, *(len(pair[0]) for pair in prefixes)], dtype=np.int32)
            all_k, all_v = prefixes[0] if len(prefixes) == 1 else map(torch.cat, zip(*prefixes))
            out.copy_(blend(*self._attend(q, all_k, all_v, cross_q, cross_k, False), own, sums))
            return
        # On a CPU the merge is done while a block is in the cache; over all rows at once it costs as much as the products.
        for (prefix_k, prefix_v), part in zip(prefixes, queries):
            for first in range(int(part[0]), int(part[-1]), ROWS):
                some = slice(first, min(first + ROWS, int(part[-1])))
                rows, seen = np.array([0, some.stop - first], np.int32), np.array([0, len(prefix_k)], np.int32)
                found = self._attend(q[some], prefix_k, prefix_v, rows, seen, False)
                out[some] = blend(*found, own[some], sums[some])
