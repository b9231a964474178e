"""What exists at a moment: the items of a data folder that a night indexes, with their numbers as of then."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval.counts import Counts
from retrieval.data.schema import MISSING_TIME, Dataset, Item, Items
from retrieval.moments import NightError, checked_words
from retrieval.pooled_rate import POOLED, PooledRates

Numbers = dict[str, npt.NDArray[np.float64]]
Rows = npt.NDArray[np.int64]
NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Tonight:
    """The items that exist at a time, their as-of numbers float64 [N] by name, and the time in seconds."""

    items: Items
    numbers: Numbers
    as_of: int

    @classmethod
    def of(cls, dataset: Dataset, as_of: int, put: Rows = NONE, gone: Rows = NONE) -> Tonight:
        """The items created or engaged with before `as_of`, with numbers from events before the start of its day.

        The rows `put` exist whenever they were created, the rows `gone` do not. Raises NightError if there is no item, or if
        `as_of` is no time.
        """
        until = checked_words(as_of)
        items, events = dataset.items, dataset.events
        exists = (items.created_at == MISSING_TIME) | (items.created_at < as_of)
        exists[events.item[events.timestamp < as_of]] = True
        exists[put] = True
        exists[gone] = False
        rows = np.flatnonzero(exists)
        if not len(rows):
            raise NightError(f"none of {len(items):,} items exists before {until}; give a later --as-of (or `--as-of end`)")
        numbers = Counts.from_dataset(dataset, before=as_of).as_of(as_of)
        numbers[POOLED] = PooledRates.from_dataset(dataset, before=as_of).as_of(as_of)
        return cls(take_items(items, rows), {name: column[rows] for name, column in numbers.items()}, as_of)

    def records(self) -> list[Item]:
        """The items as records, in row order."""
        return [self.items[row] for row in range(len(self.items))]


def take_items(items: Items, rows: npt.NDArray[np.int64]) -> Items:
    """The items at the given rows, in the given order."""

    def take(words: list[str]) -> list[str]:
        return [words[row] for row in rows.tolist()]

    return Items(
        take(items.item_id),
        take(items.title),
        take(items.text),
        take(items.category),
        take(items.creator),
        items.created_at[rows],
        {name: column[rows] for name, column in items.numbers.items()},
        {name: take(column) for name, column in items.facets.items()},
    )
