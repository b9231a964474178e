"""What can be asked: one prefix and its items as token ids, within limits; whatever does not fit gets an error of its own type.

Pure Python and numpy, no torch.

Legend: N items of one request, P prefix tokens, L item tokens, V vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ranking.prefill.errors import (
    BadHistory,
    BadLimits,
    EmptyItem,
    EmptyPrefix,
    ItemTooLong,
    LabelError,
    PrefixTooLong,
    UnknownToken,
    UnknownVector,
)

Tokens = Sequence[int]
TooLong = Literal["error", "keep_end", "keep_start"]
MOST_TOKENS = 1 << 31
"""More than any vocabulary has."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prefix and the items that each continue it, as token ids.

    `history` are the bounds [entries+1] of history entries within the prefix, if they shall not see each other: an entry then
    sees what stands before the first one and itself; what follows the last one, and every item, sees the whole prefix.
    `vectors` float [V, hidden] are embeddings that items may hold among their words: the id -1 stands for row 0, -2 for row 1 and
    so on. An item may be a few vectors instead of its text (MixLM, arXiv 2512.07846).
    """

    prefix: Tokens
    items: Sequence[Tokens]
    vectors: npt.NDArray[np.float32] | None = None
    history: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_tokens` of one pass, `max_item` tokens of one item, `max_positions` the model knows, what to do with a longer item.

    "keep_end" and "keep_start" say which part of a too long item is kept. The score is read at the last token, so
    "keep_start" drops a question that stands at the end of the item.
    """

    max_tokens: int = 8192
    max_item: int | None = None
    max_positions: int | None = None
    too_long: TooLong = "error"

    def __post_init__(self) -> None:
        for name, value in (("max_tokens", self.max_tokens), ("max_item", self.max_item), ("max_positions", self.max_positions)):
            if value is not None and value < 1:
                raise BadLimits(f"{name} is {value}; expected at least 1")
        if self.too_long not in get_args(TooLong):
            raise BadLimits(f"too_long is {self.too_long!r}; expected one of {get_args(TooLong)}")


def fit(item: Tokens, number: int, row: int, limits: Limits) -> tuple[int, ...]:
    """The item as it will be scored: whole, or cut as the limits say. Raises EmptyItem and ItemTooLong."""
    if len(item) == 0:
        raise EmptyItem(f"item {row} of request {number} has no tokens; an item needs at least one")
    if limits.max_item is None or len(item) <= limits.max_item:
        return tuple(item)
    if limits.too_long == "error":
        raise ItemTooLong(
            f"item {row} of request {number} has {len(item)} tokens, the limit is {limits.max_item}; "
            'shorten it or choose the policy "keep_end" or "keep_start"'
        )
    kept = item[-limits.max_item :] if limits.too_long == "keep_end" else item[: limits.max_item]
    return tuple(kept)


def check_prefix(prefix: Tokens, limits: Limits, number: int = 0, longest: int = 0) -> None:
    """Raises EmptyPrefix, or PrefixTooLong if the prefix and an item of `longest` tokens exceed the model's positions."""
    if len(prefix) == 0:
        raise EmptyPrefix(f"request {number} has an empty prefix; a prefix needs at least one token")
    if limits.max_positions is not None and len(prefix) + longest > limits.max_positions:
        raise PrefixTooLong(
            f"request {number} has a prefix of {len(prefix)} tokens and an item of {longest}, together more than the "
            f"{limits.max_positions} positions of the model; give the prefix a smaller token budget"
        )


def check_history(history: Sequence[int], prefix: int, number: int) -> tuple[int, ...]:
    """The bounds as plain numbers. Raises BadHistory unless they rise from at least 1 to at most the prefix's length."""
    edges = tuple(int(edge) for edge in history)
    rising = all(left < right for left, right in itertools.pairwise(edges))
    if edges and (len(edges) < 2 or not rising or edges[0] < 1 or edges[-1] > prefix):
        raise BadHistory(
            f"request {number} has the history bounds {list(edges[:8])} in a prefix of {prefix} tokens; expected at least two "
            f"rising bounds between 1 and {prefix}"
        )
    return edges


def check_labels(label_ids: Sequence[int], vocabulary: int) -> tuple[int, ...]:
    """The label ids as plain numbers. Raises LabelError if there are none, one is repeated, or one is no token."""
    labels = tuple(int(label) for label in label_ids)
    if not labels or len(set(labels)) != len(labels):
        raise LabelError(f"labels need distinct token ids, got {list(labels)}")
    if min(labels) < 0 or max(labels) >= vocabulary:
        raise LabelError(f"label ids {list(labels)} do not fit a vocabulary of {vocabulary}")
    return labels


def check_ids(number: int, prefix: Tokens, items: Sequence[Tokens], vectors: npt.NDArray[np.float32] | None) -> None:
    """Raises UnknownToken and UnknownVector for ids that no model has, and vectors that are no finite rows."""
    if min(prefix) < 0:
        raise UnknownVector(f"the prefix of request {number} holds the id {min(prefix)}; vectors may stand in items only")
    highest = max(max(prefix), max((max(item) for item in items), default=0))
    if highest >= MOST_TOKENS:
        raise UnknownToken(f"request {number} holds the token id {highest}; no vocabulary has so many")
    if vectors is not None and (vectors.ndim != 2 or not np.isfinite(vectors).all()):
        raise UnknownVector(f"the vectors of request {number} have shape {vectors.shape}; expected finite rows [V, hidden]")
    lowest = min((min(item) for item in items), default=0)
    held = 0 if vectors is None else len(vectors)
    if lowest < -held:
        raise UnknownVector(f"an item of request {number} holds the id {lowest}, but the request has {held} vectors")
