"""The fast layer loop: prefixes become keys and values once, items pass in blocks of rows through reused buffers.

Everything between two attentions concerns one row alone, so it is done block by block while the block is in the cache: output
projection, MLP, and the next layer's norm, projections and rotation. The last layer computes keys and values for all rows, and
everything else only where a score is read. The plain twin is `ranking.prefill.llama.Layers`, which calls the modules.

Legend: T packed rows, P prefix tokens, n items, H query heads, G key heads, D dims of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from ranking.prefill import int8
from ranking.prefill.attend import Bounds
from ranking.prefill.cache import Keys
from ranking.prefill.cascade import ROWS, Attention, Pair
from ranking.prefill.float8 import Scaled
from ranking.prefill.plan import Chunk
from ranking.prefill.weights import Block, Product, Weights, into
from ranking.prefill.workspace import Workspace

ROWS_ELSEWHERE = 32_768
"""On a GPU a block bounds memory only: each one costs its launches."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Entries:
    """History entries that do not see each other: int32 bounds of their rows, and how many tokens of the prefix all see."""

    bounds: Bounds
    seen: int


@dataclass(frozen=True)
class Packed:
    """Items packed for the layers: x [T, hidden], cos and sin [T, 1, D], int64 rows of the items' last tokens (`count` of them
    real), how many of the T rows are real, and for each request the bounds of its items' rows and of their last tokens."""

    x: Tensor
    angles: Pair
    last: Tensor
    rows: int
    count: int
    bounds: Sequence[Bounds]
    ends: Sequence[Bounds]


class Lean:
    """The layer loop over plain weights. `tile`: every block has exactly that many rows, the last one padded (deterministic)."""

    def __init__(self, weights: Weights, attention: Attention, tile: int | None = None) -> None:
        self.weights, self.attention, self._tile = weights, attention, tile
        self._space = Workspace()

    @property
    def bytes(self) -> int:
        """Bytes of the buffers, those of int8 layers among them."""
        value = self.weights.blocks[0].v
        return self._space.bytes + (value.space.bytes if isinstance(value, int8.Int8) else 0)

    def capacity(self, rows: int) -> int:
        """The rows that must be allocated for a prefix of `rows` tokens."""
        return rows if self._tile is None else rows + self._tile

    def extend(self, tokens: Ints, prefix: Keys, entries: Entries | None = None) -> None:
        """The keys and values of `tokens` int64 [t] follow those that `prefix` holds.

        With `entries` the tokens are history entries that see the beginning of the prefix and themselves, not each other.
        """
        start, rows = prefix.length, len(tokens)
        x = self.embed(tokens, None)
        # Padding repeats the last position: a later one could change what some rotary scalings do to all.
        angles = self.angles(np.minimum(np.arange(start, start + len(x)), start + rows - 1))
        self.fill(x, angles, prefix, start, rows, entries)
        prefix.length = start + rows

    def fill(self, x: Tensor, angles: Pair, prefix: Keys, start: int, rows: int, entries: Entries | None = None) -> None:
        """Keys and values of the rows `x` stand in `prefix` from `start` on, of which `rows` ask; nothing leaves the device."""
        cos, sin = angles
        q, mixed = self._heads("q", len(x), self.weights.heads), self._heads("mixed", len(x), self.weights.heads)
        layers = self.weights.blocks
        for number, layer in enumerate(layers):
            keys, values = prefix.layer(number)
            last = number == len(layers) - 1
            for some in self._blocks(len(x)):
                if number:
                    self._close(layers[number - 1], x[some], mixed[some])
                there = slice(start + some.start, start + some.stop)
                self._open(layer, x[some], cos[some], sin[some], None if last else q[some], keys[there], values[there])
            if last:
                continue
            if entries is None:
                self.attention.prefix(q, keys, values, start, rows, mixed)
            else:
                new, known = slice(start, start + rows), [(keys[: entries.seen], values[: entries.seen])]
                self.attention.items(q[:rows], keys[new], values[new], known, [entries.bounds], [entries.bounds], mixed[:rows])

    def read(self, chunk: Chunk, prefixes: Sequence[Keys], vectors: Tensor | None) -> Tensor:
        """Returns the hidden state [n, hidden] after the last norm at each item's last token.

        `prefixes` are those of the chunk's pieces, in their order; `vectors` [V, hidden] stand behind the token ids -1, -2, ...
        """
        x, count = self.embed(chunk.tokens, vectors), len(chunk.last)
        last = torch.zeros(self._padded(count), dtype=torch.int64)
        last[:count] = torch.from_numpy(chunk.last)
        items = [piece.items for piece in chunk.pieces]
        bounds = split_bounds(chunk.item_bounds, items)
        ends = split_bounds(np.arange(count + 1, dtype=np.int32), items)
        angles = self.angles(chunk.positions, len(x))
        return self.through(Packed(x, angles, last.to(x.device), len(chunk.tokens), count, bounds, ends), prefixes)

    def through(self, packed: Packed, prefixes: Sequence[Keys]) -> Tensor:
        """Returns what `read` does; `packed.x` is overwritten, and nothing leaves the device."""
        layers, kv_heads = self.weights.blocks, self.weights.kv_heads
        x, (cos, sin), rows = packed.x, packed.angles, packed.rows
        q, mixed = self._heads("q", len(x), self.weights.heads), self._heads("mixed", len(x), self.weights.heads)
        k, v = self._heads("k", len(x), kv_heads), self._heads("v", len(x), kv_heads)
        for number, layer in enumerate(layers):
            last = number == len(layers) - 1
            for some in self._blocks(len(x)):
                if number:
                    self._close(layers[number - 1], x[some], mixed[some])
                self._open(layer, x[some], cos[some], sin[some], None if last else q[some], k[some], v[some])
            pairs = [prefix.pair(number) for prefix in prefixes]
            if not last:
                self.attention.items(q[:rows], k[:rows], v[:rows], pairs, packed.bounds, packed.bounds, mixed[:rows])
        return self._finish(packed, k[:rows], v[:rows], pairs)

    def _finish(self, packed: Packed, k: Tensor, v: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """The last layer where it is read: one query, one MLP row and one norm for each item."""
        layer, count, last, rows = self.weights.blocks[-1], packed.count, packed.last, len(packed.last)
        x, cos, sin = packed.x[last], packed.angles[0][last], packed.angles[1][last]
        q, mixed = self._heads("last.q", rows, self.weights.heads), self._heads("last.mixed", rows, self.weights.heads)
        for some in self._blocks(rows):
            h = self._norm("h", x[some], layer.before)
            self._turn(layer.q, h, cos[some], sin[some], layer.q_gain, q[some])
        self.attention.items(q[:count], k, v, pairs, packed.ends, packed.bounds, mixed[:count])
        for some in self._blocks(rows):
            self._close(layer, x[some], mixed[some])
        return torch.cat([self._norm("h", x[some], self.weights.norm).clone() for some in self._blocks(rows)])[:count]

    def _open(self, layer: Block, x: Tensor, cos: Tensor, sin: Tensor, q: Tensor | None, k: Tensor, v: Tensor) -> None:
        """Norm, projections and rotation of a block of rows; without `q` only keys and values are made."""
        h = layer.v.ready(self._norm("h", x, layer.before))
        if q is None or layer.q_gain is not None:
            if q is not None:
                self._turn(layer.q, h, cos, sin, layer.q_gain, q)
            self._turn(layer.k, h, cos, sin, layer.k_gain, k)
        else:
            both = self._take("qk", len(x), q.shape[1] + k.shape[1], self.weights.dims)
            into(layer.qk, h, both.flatten(1))
            _rotate(both[:, : q.shape[1]], cos, sin, q)
            _rotate(both[:, q.shape[1] :], cos, sin, k)
        layer.v.into(h, v.flatten(1))

    def _turn(self, layer: Product, h: Tensor | Scaled, cos: Tensor, sin: Tensor, gain: Tensor | None, out: Tensor) -> None:
        """One projection, normed by head where the model does that, rotated into `out`."""
        made = self._take("qk", len(out), *out.shape[1:])
        layer.into(h, made.flatten(1))
        if gain is not None:
            made = functional.rms_norm(made, gain.shape, gain, self.weights.epsilon)
        _rotate(made, cos, sin, out)

    def _close(self, layer: Block, x: Tensor, mixed: Tensor) -> None:
        """Output projection and MLP of a block of rows, added to the residual `x` in place."""
        layer.o.onto(mixed.flatten(1), x)
        h = self._norm("h", x, layer.after)
        width = self.weights.mlp
        both = self._take("mlp", len(x), 2 * width)
        into(layer.gate_up, h, both)
        gate = functional.silu(both[:, :width], inplace=True).mul_(both[:, width:])
        layer.down.onto(gate, x)

    def _norm(self, name: str, x: Tensor, gain: Tensor) -> Tensor:
        """RMSNorm, its sum of squares in float32."""
        out = self._take(name, *x.shape)
        wide = x if x.dtype == torch.float32 else self._wide("wide", *x.shape).copy_(x)
        scale = self._wide("scale", len(x), 1)
        torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=scale)
        scale.square_().div_(x.shape[1]).add_(self.weights.epsilon).rsqrt_()
        if wide is x:
            torch.mul(x, scale, out=out)
        else:
            out.copy_(wide.mul_(scale))
        return out.mul_(gain)

    def _wide(self, name: str, *shape: int) -> Tensor:
        return self._space.take(name, shape, torch.float32, self.weights.embedding.device)

    def embed(self, tokens: Ints, vectors: Tensor | None) -> Tensor:
        """The embeddings of T tokens in a buffer of `_padded(T)` rows, the surplus zero."""
        x = self._take("x", self._padded(len(tokens)), self.weights.hidden)
        ids = torch.from_numpy(np.maximum(tokens, 0)).to(x.device)
        torch.index_select(self.weights.embedding, 0, ids, out=x[: len(tokens)])
        if vectors is not None and len(given := np.flatnonzero(tokens < 0)):
            rows = torch.from_numpy(-1 - tokens[given]).to(x.device)
            x[torch.from_numpy(given).to(x.device)] = vectors[rows].to(x.dtype)
        x[len(tokens) :] = 0
        return x

    def angles(self, positions: Ints, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, D] of T positions."""
        padded = np.zeros(rows or len(positions), np.int64)
        padded[: len(positions)] = positions
        device = self.weights.embedding.device
        cos, sin = self.weights.rotary(self.weights.embedding[:0], torch.from_numpy(padded).to(device)[None])
        return cos[0, :, None], sin[0, :, None]

    def _padded(self, rows: int) -> int:
        return rows if self._tile is None else -(-rows // self._tile) * self._tile

    def _blocks(self, rows: int) -> Iterator[slice]:
        step = self._tile or block_rows(self.weights)
        for first in range(0, rows, step):
            yield slice(first, min(first + step, rows))

    def _heads(self, name: str, rows: int, heads: int) -> Tensor:
        return self._take(name, rows, heads, self.weights.dims)

    def _take(self, name: str, *shape: int) -> Tensor:
        return self._space.take(name, shape, self.weights.embedding.dtype, self.weights.embedding.device)


def block_rows(weights: Weights) -> int:
    """Rows of a block between two attentions, where no tile is asked for."""
    if weights.embedding.device.type != "cpu":
        return ROWS_ELSEWHERE
    return int8.block_rows(weights.mlp) if isinstance(weights.blocks[0].v, int8.Int8) else ROWS


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Heads [T, heads, D] turned by their positions' angles stand in `out`, halves paired as in LLaMA."""
    half = heads.shape[-1] // 2
    torch.mul(heads, cos, out=out)
    out[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(heads[..., :half], sin[..., half:])


def split_bounds(bounds: Bounds, items: Sequence[int]) -> list[Bounds]:
    """The bounds of each request's items, on the same axis. `items` counts the items of each request."""
    edges = np.cumsum([0, *items]).tolist()
    return [bounds[first : last + 1] for first, last in itertools.pairwise(edges)]
