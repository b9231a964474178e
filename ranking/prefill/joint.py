"""Attention on a CPU as plain matrix products: one softmax over a query's prefix and its own item together.

For each head the scores against the prefix are one large product, those against the item itself a batch of small ones written
beside it, and one softmax over the joint row makes the merge by log-sum-exp unnecessary. A block of rows passes through one
reused buffer, so memory does not grow with the number of items. In float32 on a CPU without bf16 matrix units this takes two
thirds of the time of torch's blocked kernel (docs/log.md).

With `tile` every product has a shape that depends on the request's prefix length and the item's length alone, never on how
many neighbours there are: that is the attention of the deterministic mode.

Legend: P prefix tokens, L tokens of an item, a queries of an item (L, or 1 where only its last row asks), H heads, G key heads.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ranking.prefill.attend import Bounds, Run, equal_runs
from ranking.prefill.workspace import Workspace

SCORES = 1_600_000
"""Scores of one block: a few megabytes in the last-level cache, and enough rows for the products to run at full speed."""
LONG = 4 * SCORES
"""Scores of one item from which on its rows pass in several blocks."""
FEW_ROWS = 512
"""Items of different lengths share a product, other items masked, up to so many rows: below, calls cost more than the waste."""
PREFIX_ROWS = 256
STEADY_ROWS = 64
"""Rows of one block of a prefix; the deterministic mode starts them at multiples of this from position 0."""

Pair = tuple[Tensor, Tensor]


class Joint:
    """`ranking.prefill.lean.Attention` on the CPU. `tile`: rows of a block whose shapes never change (deterministic)."""

    name = "cpu_joint"

    def __init__(self, tile: int | None = None) -> None:
        self._tile = tile
        self._space = Workspace()

    def prefix(self, q: Tensor, keys: Tensor, values: Tensor, start: int, rows: int, out: Tensor) -> None:
        """Rows [start, start + rows) of a prefix see all keys up to their own; `out` [rows, H, D] holds the answer.

        `keys` and `values` [.., G, D] hold the rows before `start` too, and with `tile` finite values up to the next multiple of
        STEADY_ROWS.
        """
        step = PREFIX_ROWS if self._tile is None else STEADY_ROWS
        for first in range(0, rows, step):
            count = step if self._tile else min(step, rows - first)
            seen = start + first + count
            mask = _causal(count, q)
            for head in range(q.shape[1]):
                group = head * keys.shape[1] // q.shape[1]
                scores, weights = self._rows(count, seen, q)
                _products(q[first : first + count, head], keys[:seen, group], scores)
                scores[:, seen - count :].add_(mask)
                torch.softmax(scores, -1, out=weights)
                torch.mm(weights, values[:seen, group], out=out[first : first + count, head])

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
        for pair, cu_q, cu_k in zip(prefixes, queries, keys):
            for runs in _gathered(equal_runs(cu_q, cu_k), 0 if self._tile else FEW_ROWS):
                if len(runs) > 1:
                    asking, own = _span(runs)
                    mask = _own_item(tuple((run.segments, run.queries, run.keys) for run in runs), q.dtype)
                    self._mixed(q[asking], k[own], v[own], *pair, mask, out[asking])
                else:
                    self._run(runs[0], q, k, v, pair, out)

    def _run(self, run: Run, q: Tensor, k: Tensor, v: Tensor, prefix: Pair, out: Tensor) -> None:
        """Items of one length, as many at a time as fit a block."""
        long = self._tile is None and run.queries * (len(prefix[0]) + run.keys) > LONG
        step = 1 if long else self._items_per_block(len(prefix[0]), run.queries, run.keys)
        for first in range(0, run.segments, step):
            count = min(step, run.segments - first)
            a, b = run.first_q + first * run.queries, run.first_k + first * run.keys
            asking, own = slice(a, a + count * run.queries), slice(b, b + count * run.keys)
            if long:
                self._long(q[asking], k[own], v[own], *prefix, out[asking])
            else:
                self._block(q[asking], k[own], v[own], *prefix, step if self._tile else count, count, out[asking])

    def _items_per_block(self, prefix: int, queries: int, length: int) -> int:
        if self._tile is not None:
            return max(1, self._tile // queries)
        return max(1, SCORES // ((prefix + length) * queries))

    def _block(
        self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, items: int, real: int, out: Tensor
    ) -> None:
        """`items` items of equal shape, of which the first `real` are there and the others are padding."""
        queries, length, seen = len(q) // real, len(k) // real, len(prefix_k)
        answer = out
        if self._tile is not None:
            q, k, v = (self._padded(name, x, items * len(x) // real) for name, x in (("q", q), ("k", k), ("v", v)))
            answer = self._space.take("out", tuple(q.shape), q.dtype, q.device)
        mask = _causal(length, q)[length - queries :] if queries == length else q.new_zeros(1)
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores, weights = self._rows(items * queries, seen + length, q)
            asking, own_k = q[:, head], k[:, group].view(items, length, -1)
            _products(asking, prefix_k[:, group], scores[:, :seen])
            own = torch.baddbmm(mask, asking.view(items, queries, -1), own_k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
            scores.view(items, queries, -1)[:, :, seen:].copy_(own)
            torch.softmax(scores, -1, out=weights)
            found = answer[:, head]
            torch.mm(weights[:, :seen], prefix_v[:, group], out=found)
            mine = torch.bmm(weights.view(items, queries, -1)[:, :, seen:], v[:, group].view(items, length, -1))
            found.view(items, queries, -1).add_(mine)
        if answer is not out:
            out.copy_(answer[: len(out)])

    def _long(self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor) -> None:
        """One item with as many queries as keys whose scores would not fit a block: its rows pass in several."""
        step = max(1, SCORES // (len(prefix_k) + len(k)))
        for first in range(0, len(q), step):
            last = min(first + step, len(q))
            mask = torch.cat([q.new_zeros(last - first, first), _causal(last - first, q)], 1)
            self._mixed(q[first:last], k[:last], v[:last], prefix_k, prefix_v, mask, out[first:last])

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, mask: Tensor, out: Tensor) -> None:
        """Few rows of items of many lengths: one product against all of them, other items' scores masked away."""
        seen = len(prefix_k)
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores, weights = self._rows(len(q), seen + len(k), q)
            _products(q[:, head], prefix_k[:, group], scores[:, :seen])
            own = scores[:, seen:]
            _products(q[:, head], k[:, group], own)
            own.add_(mask)
            torch.softmax(scores, -1, out=weights)
            found = out[:, head]
            torch.mm(weights[:, :seen], prefix_v[:, group], out=found)
            torch.addmm(found, weights[:, seen:], v[:, group], out=found)

    def _padded(self, name: str, rows: Tensor, count: int) -> Tensor:
        """The rows at the head of a fresh block of `count`: one place in memory and one shape, whatever came before."""
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


def _gathered(runs: Iterable[Run], few: int) -> Iterator[list[Run]]:
    """The runs, neighbours of together at most `few` keys in one list."""
    waiting: list[Run] = []
    rows = 0
    for run in runs:
        size = run.segments * run.keys
        if waiting and rows + size > few:
            yield waiting
            waiting, rows = [], 0
        waiting.append(run)
        rows += size
    if waiting:
        yield waiting


def _span(runs: Sequence[Run]) -> tuple[slice, slice]:
    """The query rows and the key rows of consecutive runs."""
    last = runs[-1]
    asking = slice(runs[0].first_q, last.first_q + last.segments * last.queries)
    return asking, slice(runs[0].first_k, last.first_k + last.segments * last.keys)


@functools.lru_cache(maxsize=64)
def _own_item(runs: tuple[tuple[int, int, int], ...], dtype: torch.dtype) -> Tensor:
    """[queries, keys] of runs of (items, queries, keys): minus infinity where a query would see another item, or what comes
    after it in its own. Kept, because every layer of a pass asks for the same."""
    asking = np.concatenate([np.full(items, queries) for items, queries, _ in runs])
    held = np.concatenate([np.full(items, keys) for items, _, keys in runs])
    numbers = np.arange(len(held))
    place = np.arange(held.sum()) - np.repeat(np.cumsum(held) - held, held)
    reach = np.arange(asking.sum()) - np.repeat(np.cumsum(asking) - asking, asking) + np.repeat(held - asking, asking)
    seen = (np.repeat(numbers, asking)[:, None] == np.repeat(numbers, held)) & (place <= reach[:, None])
    return torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf))).to(dtype)


def _products(asking: Tensor, keys: Tensor, out: Tensor) -> None:
    """Scaled scores [rows, keys] stand in `out`."""
    torch.addmm(out, asking, keys.t(), beta=0, alpha=asking.shape[-1] ** -0.5, out=out)


def _causal(size: int, like: Tensor) -> Tensor:
    """[size, size]: minus infinity where a row would see what comes after it."""
    return torch.full((size, size), float("-inf"), dtype=like.dtype, device=like.device).triu(1)


def split_bounds(bounds: Bounds, items: Sequence[int]) -> list[Bounds]:
    """The bounds of each request's items, on the same axis. `items` counts the items of each request."""
    edges = np.cumsum([0, *items]).tolist()
    return [bounds[first : last + 1] for first, last in itertools.pairwise(edges)]
