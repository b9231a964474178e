"""The engine's linear layers and attention as bare matrix products: the time of the multiplications alone."""

from __future__ import annotations

import torch

from ranking.prefill.engine import Engine
from ranking.prefill.lean import block_rows
from ranking.prefill.operations import Body, PrefillShape
from ranking.prefill.weights import UnsupportedModel, Weights

ATTENTION_ROWS = 3000


class Products:
    """Products of random rows into preallocated outputs, in shapes and counts those of one cold request."""

    def __init__(self, engine: Engine, body: Body, shape: PrefillShape) -> None:
        """Raises UnsupportedModel if the projections are wrapped."""
        weights = Weights.of(engine.model)
        if weights is None:
            raise UnsupportedModel("the model's projections are wrapped (LoRA); merge them, bare products need plain weights")
        self._layers, self._body, self._shape = weights.blocks, body, shape
        like, self._block = weights.embedding, block_rows(weights)
        self._x = {width: torch.randn(self._block, width).to(like) for width in {body.hidden, body.heads * body.dims, body.mlp}}
        self._small = {width: torch.randint(-127, 128, x.shape, dtype=torch.int8) for width, x in self._x.items()}
        widest = max(2 * body.mlp, body.hidden, (body.heads + body.kv_heads) * body.dims)
        self._out = torch.empty(self._block * widest, dtype=like.dtype)
        full = max(shape.length, engine.limits.max_tokens // shape.length * shape.length)
        self._rows = [*_cut(shape.prefix, engine.limits.max_tokens), *_cut(shape.item_rows, full)]
        self._read = [rows // shape.length for rows in _cut(shape.item_rows, full)]
        self._own = shape.prefix + -(-shape.own_pairs // shape.item_rows)
        width = max(shape.prefix + shape.length, self._own)
        self._q, self._k, self._v = (torch.randn(rows, body.dims).to(like) for rows in (ATTENTION_ROWS, width, width))
        self._scores = torch.empty(ATTENTION_ROWS * width, dtype=like.dtype)
        self._mixed = torch.empty(ATTENTION_ROWS, body.dims, dtype=like.dtype)

    def linear(self) -> None:
        """Every linear layer's products of one cold request are done."""
        with torch.inference_mode():
            for number, layer in enumerate(self._layers):
                last = number == len(self._layers) - 1
                keys = (layer.k, layer.v) if last else (*layer.qk, layer.v)
                rest = (layer.o, *layer.gate_up, layer.down)
                self._multiply([part.weight for part in (keys if last else (*keys, *rest))], self._rows)
                if last:
                    self._multiply([part.weight for part in (layer.q, *rest)], self._read)

    def attention(self) -> None:
        """Scores and mixtures of one cold request are multiplied, as many pairs as attention has on average."""
        shape = self._shape
        own = shape.prefix, (shape.prefix + 1) // 2
        item = shape.item_rows, self._own
        read = shape.items, shape.prefix + shape.length
        with torch.inference_mode():
            for rows, keys in [own, item] * (self._body.layers - 1) + [read]:
                for _ in range(self._body.heads):
                    self._attend(rows, keys)

    def _multiply(self, weights: list[torch.Tensor], passes: list[int]) -> None:
        for rows in (some for one in passes for some in _cut(one, self._block)):
            for weight in weights:
                out = self._out[: rows * len(weight)].view(rows, len(weight))
                if weight.dtype == torch.int8:
                    torch._int_mm(self._small[weight.shape[1]][:rows], weight.t(), out=out.view(torch.int32))
                else:
                    torch.mm(self._x[weight.shape[1]][:rows], weight.t(), out=out)

    def _attend(self, rows: int, keys: int) -> None:
        for some in _cut(rows, ATTENTION_ROWS):
            scores = self._scores[: some * keys].view(some, keys)
            torch.mm(self._q[:some], self._k[:keys].t(), out=scores)
            torch.mm(scores, self._v[:keys], out=self._mixed[:some])


def _cut(total: int, step: int) -> list[int]:
    """`total` in parts of `step`, the last one smaller."""
    return [min(step, total - first) for first in range(0, total, step)]
