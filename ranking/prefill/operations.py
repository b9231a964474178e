"""How many operations a request needs at least, and how many each way of scoring it spends: closed forms, no torch.

A multiplication with its addition counts as two operations. Only matrix products are counted: norms, rotations, softmax, biases
and the label rows (2 * N * hidden * labels) are not.

A row costs `keys` weights for k and v and `others` for q, o and the MLP; a pair of
a query and a key costs 4 * H * D, half for the score and half for the mixture. The last layer needs k and v of all rows, and
everything else only in the N rows where a score is read.

Legend: P prefix tokens, N items, L tokens of an item, H query heads, D dims of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Lengths = Literal["equal", "mixed"]


@dataclass(frozen=True)
class PrefillShape:
    """P prefix tokens, N items of L tokens each ("equal"), or spread evenly from L/2 to 3L/2 with the mean L ("mixed")."""

    prefix: int
    items: int
    length: int
    lengths: Lengths = "equal"

    @property
    def item_rows(self) -> int:
        """N * L."""
        return self.items * self.length

    @property
    def item_lengths(self) -> tuple[int, ...]:
        """Tokens of each of the N items; their sum is N * L whatever the lengths."""
        if self.lengths == "equal":
            return (self.length,) * self.items
        pairs, half = self.items // 2, self.length // 2
        apart = [round(half * (pairs - place) / pairs) for place in range(pairs)]
        middle = (self.length,) * (self.items % 2)
        return (*(self.length - more for more in apart), *middle, *(self.length + more for more in reversed(apart)))

    @property
    def own_pairs(self) -> int:
        """Pairs of a query and a key inside the items, none of them looking ahead."""
        return self.items * _causal(self.length) if self.lengths == "equal" else sum(map(_causal, self.item_lengths))


@dataclass(frozen=True)
class Body:
    """The shape of the layers between embedding and head."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    dims: int

    @property
    def keys(self) -> int:
        """Weights of one layer's key and value projections."""
        return 2 * self.hidden * self.kv_heads * self.dims

    @property
    def others(self) -> int:
        """Weights of one layer's query and output projections and its MLP."""
        return 2 * self.hidden * self.heads * self.dims + 3 * self.hidden * self.mlp

    @property
    def pair(self) -> int:
        """Operations of one layer's attention for one query and one key."""
        return 4 * self.heads * self.dims


def linear_operations(body: Body, shape: PrefillShape, *, warm: bool = False) -> int:
    """Operations of the linear layers, each row once and the last layer only where it is read; `warm`: the prefix is cached."""
    rows = shape.item_rows + (0 if warm else shape.prefix)
    everywhere = body.layers * rows * body.keys + (body.layers - 1) * rows * body.others
    return 2 * (everywhere + shape.items * body.others)


def attention_operations(body: Body, shape: PrefillShape, *, warm: bool = False) -> int:
    """Operations of attention when no query meets a key that it must not see; `warm`: the prefix is cached."""
    prefix = 0 if warm else _causal(shape.prefix)
    pairs = prefix + shape.item_rows * shape.prefix + shape.own_pairs
    last = shape.items * shape.prefix + shape.item_rows
    return body.pair * ((body.layers - 1) * pairs + last)


def lower_bound(body: Body, shape: PrefillShape) -> int:
    """The fewest operations that answer a request from nothing."""
    return linear_operations(body, shape) + attention_operations(body, shape)


def warm_lower_bound(body: Body, shape: PrefillShape) -> int:
    """The fewest operations that answer a request whose prefix is cached."""
    return linear_operations(body, shape, warm=True) + attention_operations(body, shape, warm=True)


def one_by_one(body: Body, shape: PrefillShape) -> int:
    """Operations of N full prompts through the plain model, whose last layer computes every row."""
    pairs = shape.items * _causal(shape.prefix) + shape.item_rows * shape.prefix + shape.own_pairs
    return _whole(body, shape.items * shape.prefix + shape.item_rows, pairs)


def prefix_cached(body: Body, shape: PrefillShape) -> int:
    """Operations of the plain model with the prefix once and the items over its keys and values."""
    pairs = _causal(shape.prefix) + shape.item_rows * shape.prefix + shape.own_pairs
    return _whole(body, shape.prefix + shape.item_rows, pairs)


def packed_dense(body: Body, shape: PrefillShape) -> int:
    """Operations of the plain model on one packed sequence under a mask, which hides scores but saves none."""
    rows = shape.prefix + shape.item_rows
    return _whole(body, rows, rows * rows)


def _whole(body: Body, rows: int, pairs: int) -> int:
    return body.layers * (2 * rows * (body.keys + body.others) + body.pair * pairs)


def _causal(rows: int) -> int:
    return rows * (rows + 1) // 2
