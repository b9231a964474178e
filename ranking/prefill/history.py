"""Histories whose entries do not see each other: in which stages such a prefix is computed, and what of it can be reused.

A prefix is then a beginning (task, profile), entries that each see the beginning and themselves, and an end that sees everything.
The number of pairs of history tokens falls from the square of the history to the sum of the entries' squares. It is another
function than full attention: a model must have been trained with it.

Legend: P prefix tokens, edges the bounds of the entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ranking.prefill.lean import Entries

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    """Tokens [start, stop) of a prefix, computed in one go; `entries` if they are history entries."""

    start: int
    stop: int
    entries: Entries | None = None


def marked(tokens: Ints, edges: tuple[int, ...]) -> Ints:
    """The tokens with the place of entries written into them, so that two prefixes agree only where both agree."""
    if not edges:
        return tokens << 2
    mark = np.zeros(len(tokens), np.int64)
    mark[edges[0] : edges[-1]] = 1
    mark[list(edges[:-1])] = 2
    mark[edges[-1] :] = 3
    return tokens << 2 | mark


def whole_entries(shared: int, length: int, edges: tuple[int, ...], blocks_only: bool) -> int:
    """How much of a shared beginning can be gone on from: up to the last whole entry, and with `blocks_only` not from within the
    end, whose blocks are counted from its first token."""
    if not edges or shared == length or shared <= edges[0]:
        return shared
    if shared < edges[-1] or blocks_only:
        return max(edge for edge in edges if edge <= shared)
    return shared


def stages(done: int, length: int, edges: tuple[int, ...], rows: int) -> Iterator[Stage]:
    """What is left of a prefix after `done` tokens, in stages of at most about `rows` tokens."""
    first, last = (edges[0], edges[-1]) if edges else (length, length)
    for start in range(done, first, rows):
        yield Stage(start, min(start + rows, first))
    left = [edge for edge in edges if edge >= max(done, first)]
    while len(left) > 1:
        count = max(1, sum(edge - left[0] <= rows for edge in left) - 1)
        bounds = np.array(left[: count + 1], np.int32) - np.int32(left[0])
        yield Stage(left[0], left[count], Entries(bounds, first))
        left = left[count:]
    for start in range(max(done, last), length, rows):
        yield Stage(start, min(start + rows, length))
