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


@dataclass(frozen=True)
class PrefillShape:
    """P prefix tokens, N items of L tokens each."""

    prefix: int
    items: int
    length: int

    @property
    def item_rows(self) -> int:
        """N * L."""
        return self.items * self.length


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
    pairs = prefix + shape.item_rows * shape.prefix + shape.items * _causal(shape.length)
    return body.pair * ((body.layers - 1) * pairs + _read_pairs(shape))


def joint_operations(body: Body, shape: PrefillShape, block: int, *, warm: bool = False) -> int:
    """What `ranking.prefill.joint` multiplies: a prefix row meets its whole block of `block` rows, an item row its whole item."""
    firsts = range(0, 0 if warm else shape.prefix, block)
    prefix = sum((min(first + block, shape.prefix) - first) * min(first + block, shape.prefix) for first in firsts)
    pairs = prefix + shape.item_rows * (shape.prefix + shape.length)
    return body.pair * ((body.layers - 1) * pairs + _read_pairs(shape))


def lower_bound(body: Body, shape: PrefillShape) -> int:
    """The fewest operations that answer a request from nothing."""
    return linear_operations(body, shape) + attention_operations(body, shape)


def warm_lower_bound(body: Body, shape: PrefillShape) -> int:
    """The fewest operations that answer a request whose prefix is cached."""
    return linear_operations(body, shape, warm=True) + attention_operations(body, shape, warm=True)


def one_by_one(body: Body, shape: PrefillShape) -> int:
    """Operations of N full prompts through the plain model, whose last layer computes every row."""
    return shape.items * _whole(body, shape.prefix + shape.length, _causal(shape.prefix + shape.length))


def prefix_cached(body: Body, shape: PrefillShape) -> int:
    """Operations of the plain model with the prefix once and the items over its keys and values."""
    pairs = _causal(shape.prefix) + shape.item_rows * shape.prefix + shape.items * _causal(shape.length)
    return _whole(body, shape.prefix + shape.item_rows, pairs)


def _whole(body: Body, rows: int, pairs: int) -> int:
    return body.layers * (2 * rows * (body.keys + body.others) + body.pair * pairs)


def _causal(rows: int) -> int:
    return rows * (rows + 1) // 2


def _read_pairs(shape: PrefillShape) -> int:
    return shape.items * (shape.prefix + shape.length)
