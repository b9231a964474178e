"""Attention of the deterministic mode: plain products whose shapes depend on a request's prefix and an item's length alone.

For each head the scores against the prefix are one large product, those against the item itself a batch of small ones written
beside it, and one softmax over the joint row needs no merge. Blocks have a fixed number of items, the last one padded, and live
in one place in memory, so how many neighbours an item has can change no bit of its answer. About a tenth slower than torch's
blocked kernel, and its scores are rounded in the precision of the body (docs/prefill.md).

Legend: P prefix tokens, L tokens of an item, a queries of an item (L, or 1 where only its last row asks), H heads, G key heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ranking.prefill.attend import Bounds, equal_runs
from ranking.prefill.workspace import Workspace

PREFIX_ROWS = 64
"""Rows of one block of a prefix; they start at multiples of this from position 0."""

Pair = tuple[Tensor, Tensor]


class Steady:
    """`ranking.prefill.lean.Attention` on a CPU, in blocks of about `tile` rows whose shapes never change."""

    name = "cpu_steady"

    def __init__(self, tile: int) -> None:
        self._tile = tile
        self._space = Workspace()

    def prefix(self, q: Tensor, keys: Tensor, values: Tensor, start: int, rows: int, out: Tensor) -> None:
        """Rows [start, start + rows) of a prefix see all keys up to their own; `out` [.., H, D] holds the answer.

        `keys` and `values` [.., G, D] hold the rows before `start` too; all four hold finite values up to the next multiple of
        PREFIX_ROWS.
        """
        mask = _causal(PREFIX_ROWS, q)
        for first in range(0, rows, PREFIX_ROWS):
            asking, seen = slice(first, first + PREFIX_ROWS), start + first + PREFIX_ROWS
            for head in range(q.shape[1]):
                group = head * keys.shape[1] // q.shape[1]
                scores, weights = self._rows(PREFIX_ROWS, seen, q)
                _products(q[asking, head], keys[:seen, group], scores)
                scores[:, seen - PREFIX_ROWS :].add_(mask)
                torch.softmax(scores, -1, out=weights)
                torch.mm(weights, values[:seen, group], out=out[asking, head])

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
        """Each item's queries see the prefix of their request and their own item; `out` [queries, H, D] holds the answer.

        `queries` and `keys` int32: for each prefix the bounds of its items' queries and keys on the axes of q and of k, v. An
        item with as many queries as keys is causal; with fewer, its last rows ask and see all of it.
        """
        for prefix, cu_q, cu_k in zip(prefixes, queries, keys):
            for run in equal_runs(cu_q, cu_k):
                step = max(1, self._tile // run.queries)
                for first in range(0, run.segments, step):
                    count = min(step, run.segments - first)
                    a, b = run.first_q + first * run.queries, run.first_k + first * run.keys
                    asking, own = slice(a, a + count * run.queries), slice(b, b + count * run.keys)
                    self._block(q[asking], k[own], v[own], prefix, step, count, out[asking])

    def _block(self, q: Tensor, k: Tensor, v: Tensor, prefix: Pair, items: int, real: int, out: Tensor) -> None:
        """`items` items of equal shape, of which the first `real` are there and the others are padding."""
        queries, length, seen = len(q) // real, len(k) // real, len(prefix[0])
        q, k, v = (self._padded(name, x, items * len(x) // real) for name, x in (("q", q), ("k", k), ("v", v)))
        answer = self._space.take("out", tuple(q.shape), q.dtype, q.device)
        mask = _causal(length, q) if queries == length else q.new_zeros(1)
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores, weights = self._rows(items * queries, seen + length, q)
            asking, own_k = q[:, head], k[:, group].view(items, length, -1)
            _products(asking, prefix[0][:, group], scores[:, :seen])
            own = torch.baddbmm(mask, asking.view(items, queries, -1), own_k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
            scores.view(items, queries, -1)[:, :, seen:].copy_(own)
            torch.softmax(scores, -1, out=weights)
            found = answer[:, head]
            torch.mm(weights[:, :seen], prefix[1][:, group], out=found)
            mine = torch.bmm(weights.view(items, queries, -1)[:, :, seen:], v[:, group].view(items, length, -1))
            found.view(items, queries, -1).add_(mine)
        out.copy_(answer[: len(out)])

    def _padded(self, name: str, rows: Tensor, count: int) -> Tensor:
        """The rows at the head of a block of `count`: one place in memory and one shape, whatever came before."""
        block = self._space.take(name, (count, *rows.shape[1:]), rows.dtype, rows.device)
        block[: len(rows)] = rows
        block[len(rows) :] = 0
        return block

    def _rows(self, rows: int, columns: int, like: Tensor) -> Pair:
        shape = (rows, columns)
        return (
            self._space.take("scores", shape, like.dtype, like.device),
            self._space.take("weights", shape, like.dtype, like.device),
        )


def _products(asking: Tensor, keys: Tensor, out: Tensor) -> None:
    """Scaled scores [rows, keys] stand in `out`."""
    torch.addmm(out, asking, keys.t(), beta=0, alpha=asking.shape[-1] ** -0.5, out=out)


def _causal(size: int, like: Tensor) -> Tensor:
    """[size, size]: minus infinity where a row would see what comes after it."""
    return torch.full((size, size), float("-inf"), dtype=like.dtype, device=like.device).triu(1)
