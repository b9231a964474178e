"""What the engine is measured against: plain Hugging Face, as cheap as its public classes allow, and bare matrix products.

Nothing is held back in the plain ways: inference mode, SDPA, no head over the vocabulary, no copy that
the library does not make itself. The score is read at the last token through float32 label rows, as in the engine.

Legend: P prefix tokens, N items, L tokens of an item, T = P + N * L.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from index.errors import BrewlineError
from ranking.prefill.engine import Engine
from ranking.prefill.lean import ROWS
from ranking.prefill.operations import Body, PrefillShape
from ranking.prefill.weights import Weights

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Way = Callable[[Ids, Ids, int], Logits]
MASK_BYTES = 1 << 30
"""Larger T x T masks are not built."""
ATTENTION_ROWS = 3000
WAYS = ("one_by_one", "prefix_cache")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SWEEP_PROMPTS, SWEEP_ITEMS = 8, 64
"""Items that show which batch is best: a full prompt costs the same whatever their number, a cached prefix is shared by them."""
TIMED_ITEMS = 64


class UnfairContender(BrewlineError):
    """The plain model does not run the way in which it is to be compared."""


class MaskTooLarge(BrewlineError):
    """A dense mask would need more memory than it may have."""


class Plain:
    """One Hugging Face model and the rows of its head that are read. Prefixes are int64 [P], items int64 [N, L]."""

    def __init__(self, model: PreTrainedModel, label_ids: Sequence[int]) -> None:
        """Raises UnfairContender if the model's attention is not SDPA."""
        if (attention := model.config._attn_implementation) != "sdpa":
            raise UnfairContender(f'the model runs attention "{attention}", expected "sdpa"; load it without attn_implementation')
        self._body = model.eval().model
        self._labels = model.get_output_embeddings().weight.detach()[list(label_ids)].float()
        self.dtype: torch.dtype = model.dtype

    def one_by_one(self, prefix: Ids, items: Ids, batch: int) -> Logits:
        """The label logits [N, labels] of full prompts, `batch` of them in a pass."""
        with torch.inference_mode():
            parts = [self._last(np.hstack([np.tile(prefix, (len(some), 1)), some])) for some in _batches(items, batch)]
        return np.concatenate(parts)

    def prefix_cache(self, prefix: Ids, items: Ids, batch: int) -> Logits:
        """The same, the prefix once and the items over its keys and values, `batch` in a pass.

        The cache of a batch is a view of the prefix's one; the library copies it when it appends the items' keys.
        """
        with torch.inference_mode():
            kept = DynamicCache()
            self._body(input_ids=torch.from_numpy(prefix)[None], past_key_values=kept, use_cache=True)
            parts = [self._last(some, _expanded(kept, len(some))) for some in _batches(items, batch)]
        return np.concatenate(parts)

    def packed_dense(self, prefix: Ids, items: Ids, mask: Tensor) -> Logits:
        """The same in one packed sequence with restarted positions under `mask` [1, 1, T, T] of `dense_mask`."""
        count, length = items.shape
        ids = torch.from_numpy(np.concatenate([prefix, items.ravel()]))[None]
        places = np.concatenate([np.arange(len(prefix)), np.tile(np.arange(length) + len(prefix), count)])
        with torch.inference_mode():
            found = self._body(input_ids=ids, attention_mask=mask, position_ids=torch.from_numpy(places)[None], use_cache=False)
            return self._read(found.last_hidden_state[0, len(prefix) + length - 1 :: length])

    def dense_mask(self, shape: PrefillShape) -> Tensor:
        """[1, 1, T, T] in the model's dtype, added to the scores: 0 where a row may look, else minus infinity.

        It depends on the shape alone, so its making counts for nobody. Raises MaskTooLarge.
        """
        rows = shape.prefix + shape.item_rows
        if (size := rows * rows * self.dtype.itemsize) > MASK_BYTES:
            raise MaskTooLarge(f"a mask of {rows} x {rows} needs {size} bytes, the limit is {MASK_BYTES}")
        mask = torch.full((rows, rows), float("-inf"), dtype=self.dtype)
        mask[:, : shape.prefix] = 0
        mask[: shape.prefix, : shape.prefix] = _ahead(shape.prefix, self.dtype)
        place = shape.prefix * (rows + 1)
        own = mask.as_strided((shape.items, shape.length, shape.length), (shape.length * (rows + 1), rows, 1), place)
        own.copy_(_ahead(shape.length, self.dtype))
        return mask[None, None]

    def _last(self, rows: Ids, cache: DynamicCache | None = None) -> Logits:
        found = self._body(input_ids=torch.from_numpy(rows), past_key_values=cache, use_cache=cache is not None)
        return self._read(found.last_hidden_state[:, -1])

    def _read(self, hidden: Tensor) -> Logits:
        return (hidden.float() @ self._labels.T).numpy()


@dataclass(frozen=True)
class Entrant:
    """One plain way at its best batch size, timed on the first `items` of the N, which stand for all of them."""

    name: str
    dtype: torch.dtype
    batch: int
    items: int
    score: Callable[[Ids, Ids], Logits]

    @property
    def key(self) -> tuple[str, torch.dtype]:
        """What tells it from the others."""
        return self.name, self.dtype


def best_batch(way: Way, prefix: Ids, items: Ids, least: int) -> int:
    """The batch size with the least time per item, each tried twice on at least `least` items (as far as there are so many)."""
    way(prefix, items[:1], 1)

    def pace(batch: int) -> float:
        some = items[: max(batch, least)]
        return min(timed(way, prefix, some, batch) for _ in range(2)) / len(some)

    return min((batch for batch in BATCHES if batch <= len(items)), key=pace)


def entrants_of(plain: Plain, prefix: Ids, items: Ids) -> Iterator[Entrant]:
    """Yields the ways of one model at the batch sizes that were best on this request."""
    best = best_batch(plain.one_by_one, prefix, items, SWEEP_PROMPTS)
    enough = min(len(items), max(TIMED_ITEMS, 2 * best))
    yield Entrant("one_by_one", plain.dtype, best, enough, functools.partial(plain.one_by_one, batch=best))
    best = best_batch(plain.prefix_cache, prefix, items, SWEEP_ITEMS)
    yield Entrant("prefix_cache", plain.dtype, best, len(items), functools.partial(plain.prefix_cache, batch=best))


def timed(call: Callable[..., object], *given: object) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call(*given)
    return time.perf_counter() - began


class Products:
    """The engine's linear layers and its attention as bare matrix products into preallocated outputs, equal shapes and counts."""

    def __init__(self, engine: Engine, body: Body, shape: PrefillShape) -> None:
        weights = Weights.of(engine.model)
        assert weights is not None, "the model has plain weights"
        self._layers, self._body, self._shape = weights.blocks, body, shape
        like = weights.embedding
        self._x = {width: torch.randn(ROWS, width).to(like) for width in {body.hidden, body.heads * body.dims, body.mlp}}
        widest = max(2 * body.mlp, body.hidden, (body.heads + body.kv_heads) * body.dims)
        self._out = torch.empty(ROWS * widest, dtype=like.dtype)
        full = max(shape.length, engine.limits.max_tokens // shape.length * shape.length)
        self._rows = [*_cut(shape.prefix, engine.limits.max_tokens), *_cut(shape.item_rows, full)]
        self._read = [rows // shape.length for rows in _cut(shape.item_rows, full)]
        width = shape.prefix + shape.length
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
        """Scores and mixtures of one cold request are multiplied, as many pairs as attention has."""
        shape = self._shape
        own = shape.prefix, (shape.prefix + 1) // 2
        item = shape.item_rows, shape.prefix + (shape.length + 1) // 2
        read = shape.items, shape.prefix + shape.length
        with torch.inference_mode():
            for rows, keys in [own, item] * (self._body.layers - 1) + [read]:
                for _ in range(self._body.heads):
                    self._attend(rows, keys)

    def _multiply(self, weights: list[torch.Tensor], passes: list[int]) -> None:
        for rows in (some for one in passes for some in _cut(one, ROWS)):
            for weight in weights:
                out = self._out[: rows * len(weight)].view(rows, len(weight))
                torch.mm(self._x[weight.shape[1]][:rows], weight.t(), out=out)

    def _attend(self, rows: int, keys: int) -> None:
        for some in _cut(rows, ATTENTION_ROWS):
            scores = self._scores[: some * keys].view(some, keys)
            torch.mm(self._q[:some], self._k[:keys].t(), out=scores)
            torch.mm(scores, self._v[:keys], out=self._mixed[:some])


def _expanded(kept: DynamicCache, batch: int) -> DynamicCache:
    """A cache for `batch` rows that all begin like the one row of `kept`, as views."""
    cache = DynamicCache()
    for layer in kept.layers:
        wide = DynamicLayer()
        wide.lazy_initialization(layer.keys, layer.values)
        wide.keys, wide.values = (part.expand(batch, -1, -1, -1) for part in (layer.keys, layer.values))
        cache.layers.append(wide)
    return cache


def _batches(items: Ids, batch: int) -> Iterator[Ids]:
    for first in range(0, len(items), batch):
        yield items[first : first + batch]


def _ahead(size: int, dtype: torch.dtype) -> Tensor:
    """[size, size]: minus infinity above the diagonal, else 0."""
    return torch.full((size, size), float("-inf"), dtype=dtype).triu(1)


def _cut(total: int, step: int) -> list[int]:
    """`total` in parts of `step`, the last one smaller."""
    return [min(step, total - first) for first in range(0, total, step)]
