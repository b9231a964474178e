"""What the engine is measured against: ways to score N items with plain Hugging Face classes, as cheap as those allow.

All run in inference mode with SDPA and without the head over the vocabulary; the score is read at each item's last token through
float32 label rows, as in the engine. Left out is what needs another model or a compiler: the library's last layer computes every
row, its caches join keys by copying, and `torch.compile`, static caches and attention functions of one's own are not tried.

Items int64 [l] may differ in length: they are sorted, so that padding (at the right, where no earlier token sees it) is small.

Legend: P prefix tokens, N items, l tokens of one item, T = P + the tokens of all items.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from index.errors import BrewlineError

Ids = npt.NDArray[np.int64]
Items = Sequence[Ids]
Logits = npt.NDArray[np.float32]
Reader = Callable[[Items, int], Logits]
"""Scores items, so many in one pass, after a prefix that was given before."""
Begin = Callable[[Ids], Reader]

MASK_BYTES = 1 << 30
"""Larger T x T masks are not built."""
WAYS = ("one_by_one", "prefix_cache", "prefix_packed")


class UnfairContender(BrewlineError):
    """The plain model does not run the way in which it is to be compared."""


class MaskTooLarge(BrewlineError):
    """A dense mask would need more memory than it may have."""


class Plain:
    """One Hugging Face model and the rows of its head that are read."""

    def __init__(self, model: PreTrainedModel, label_ids: Sequence[int]) -> None:
        """Raises UnfairContender if the model's attention is not SDPA."""
        if (attention := model.config._attn_implementation) != "sdpa":
            raise UnfairContender(f'the model runs attention "{attention}", expected "sdpa"; load it without attn_implementation')
        self._body = model.eval().model
        self._labels = model.get_output_embeddings().weight.detach()[list(label_ids)].float()
        self.dtype: torch.dtype = model.dtype

    def ways(self) -> dict[str, Begin]:
        """The ways by their names in `WAYS`."""
        return dict(zip(WAYS, (self.one_by_one, self.prefix_cache, self.prefix_packed)))

    def one_by_one(self, prefix: Ids) -> Reader:
        """Reads the label logits [N, labels] of full prompts."""
        return lambda items, batch: _in_groups(
            items, batch, lambda some: self._last([np.concatenate([prefix, one]) for one in some])
        )

    def prefix_cache(self, prefix: Ids) -> Reader:
        """The prefix is computed once; reads items, one per row of a batch, over its keys and values.

        The cache of a batch is a view of the prefix's one; the library copies it when it appends the items' keys.
        """
        kept = self._kept(prefix)
        return lambda items, batch: _in_groups(items, batch, lambda some: self._last(some, _following(kept, len(some))))

    def prefix_packed(self, prefix: Ids) -> Reader:
        """The prefix is computed once; reads groups of items in one sequence behind it, apart by a mask, positions restarted.

        Its keys are never repeated for the items; each group starts from the prefix's own tensors, which appending leaves alone.
        """
        kept = self._kept(prefix)
        return lambda items, batch: _in_groups(items, batch, lambda some: self._pack(kept, some))

    def packed_dense(self, prefix: Ids, items: Items, mask: Tensor) -> Logits:
        """The label logits of one packed pass without a cache, under `mask` [T, T] of `dense_mask`."""
        lengths = [len(one) for one in items]
        ids = torch.from_numpy(np.concatenate([prefix, *items]))[None]
        places = torch.from_numpy(np.concatenate([np.arange(len(prefix)), _places(lengths, len(prefix))]))[None]
        with torch.inference_mode():
            found = self._body(input_ids=ids, attention_mask=mask[None, None], position_ids=places, use_cache=False)
            return self._read(found.last_hidden_state[0, len(prefix) + np.cumsum(lengths) - 1])

    def dense_mask(self, prefix: int, lengths: Sequence[int]) -> Tensor:
        """[T, T], added to the scores: 0 where a row may look, else minus infinity. Raises MaskTooLarge."""
        rows = prefix + sum(lengths)
        if (size := rows * rows * self.dtype.itemsize) > MASK_BYTES:
            raise MaskTooLarge(f"a mask of {rows} x {rows} needs {size} bytes, the limit is {MASK_BYTES}")
        return _apart(prefix, tuple(lengths), prefix, self.dtype)

    def _kept(self, prefix: Ids) -> DynamicCache:
        kept = DynamicCache()
        with torch.inference_mode():
            self._body(input_ids=torch.from_numpy(prefix)[None], past_key_values=kept, use_cache=True)
        return kept

    def _last(self, rows: Items, cache: DynamicCache | None = None) -> Logits:
        """The logits at the ends of rows of a padded batch."""
        lengths = [len(row) for row in rows]
        ids = np.zeros((len(rows), max(lengths)), np.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
        found = self._body(input_ids=torch.from_numpy(ids), past_key_values=cache, use_cache=cache is not None)
        return self._read(found.last_hidden_state[torch.arange(len(rows)), torch.tensor(lengths) - 1])

    def _pack(self, kept: DynamicCache, items: Items) -> Logits:
        lengths, before = tuple(len(one) for one in items), kept.get_seq_length()
        found = self._body(
            input_ids=torch.from_numpy(np.concatenate(items))[None],
            attention_mask=_group_mask(before, lengths, self.dtype)[None, None],
            position_ids=torch.from_numpy(_places(lengths, before))[None],
            past_key_values=_following(kept, 1),
            use_cache=True,
        )
        return self._read(found.last_hidden_state[0, np.cumsum(lengths) - 1])

    def _read(self, hidden: Tensor) -> Logits:
        return (hidden.float() @ self._labels.T).numpy()


def _in_groups(items: Items, batch: int, score: Callable[[Items], Logits]) -> Logits:
    """What `score` says of the items, `batch` at a time, shortest first; answers in input order."""
    order = sorted(range(len(items)), key=lambda row: len(items[row]))
    with torch.inference_mode():
        parts = [score([items[row] for row in order[first : first + batch]]) for first in range(0, len(order), batch)]
    found = np.concatenate(parts)
    logits = np.empty_like(found)
    logits[order] = found
    return logits


def _following(kept: DynamicCache, batch: int) -> DynamicCache:
    """A cache for `batch` rows that all begin like the one row of `kept`, as views; appending to it leaves `kept` as it is."""
    cache = DynamicCache()
    for layer in kept.layers:
        wide = DynamicLayer()
        wide.lazy_initialization(layer.keys, layer.values)
        wide.keys, wide.values = (part.expand(batch, -1, -1, -1) for part in (layer.keys, layer.values))
        cache.layers.append(wide)
    return cache


def _places(lengths: Sequence[int], start: int) -> Ids:
    """Positions of packed items that all begin at `start`."""
    return np.concatenate([np.arange(start, start + length) for length in lengths])


@functools.lru_cache(maxsize=2)
def _group_mask(prefix: int, lengths: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The mask of one group [tokens, P + tokens]. Groups of equal items share it, so that its making counts for nobody."""
    return _apart(prefix, lengths, 0, dtype)


def _apart(prefix: int, lengths: tuple[int, ...], top: int, dtype: torch.dtype) -> Tensor:
    """[top + tokens, P + tokens]: each item sees the prefix and, causally, itself; `top` rows of the prefix see it causally."""
    tokens = sum(lengths)
    mask = torch.full((top + tokens, prefix + tokens), float("-inf"), dtype=dtype)
    mask[top:, :prefix] = 0
    if top:
        mask[:top, :prefix] = _ahead(prefix, dtype)
    ahead, first = _ahead(max(lengths), dtype), 0
    for length in lengths:
        last = first + length
        mask[top + first : top + last, prefix + first : prefix + last] = ahead[:length, :length]
        first = last
    return mask


def _ahead(size: int, dtype: torch.dtype) -> Tensor:
    """[size, size]: minus infinity above the diagonal, else 0."""
    return torch.full((size, size), float("-inf"), dtype=dtype).triu(1)
