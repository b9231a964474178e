"""How well items are liked as of a day, where few labels lean on the creator's, and those on the categories'.

An item's plain rate (`retrieval.counts`, "positive_rate") weighs a label of two years ago like one of yesterday, and takes an
item of one label for an average one. Here labels fade, and each level is shrunk to the one above (partial pooling; Gelman and
Hill 2007, chapter 12): everything -> mean of the item's categories -> creator -> item. It is for late fusion; prompts do not show
it. Time is cut as in `Counts`: everything strictly before the start of a day, nothing of the day itself.

Legend: N items, n asked, L labels, P places (an item, a creator or a category).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval.counts import NEVER, Float64s, Int64s
from retrieval.data.schema import DAY, Dataset

POOLED = "pooled_rate"
HALF_LIFE = 120.0
"""Days after which a label counts half. On two public sets and the synthetic world 60 to 240 do about as well."""
PRIOR_LABELS = 5.0
"""Labels that the level above is worth; for a category, which has many, CATEGORY_LABELS."""
CATEGORY_LABELS = 20.0

DAYS = 1 << 17
"""More than there are: times lie between 1970 and 2100 (`retrieval.data.events`)."""


@dataclass(frozen=True)
class Faded:
    """Labels as sorted `keys` of place and day, with what is `left` of their sums, float64 [keys, 2]: positive ones and all."""

    keys: Int64s
    left: Float64s

    @classmethod
    def of(cls, place: Int64s, day: Int64s, weight: Float64s) -> Faded:
        """Of `weight` float64 [n, 2] at `place` [n] on `day` [n]."""
        place, day, weight = _summed(place, day, weight)
        return cls(place * DAYS + day, _running(place, day, weight))

    def before(self, place: Int64s, day: Int64s) -> Float64s:
        """Float64 [n, 2]: what is left, at the start of each `day` [n], of the labels of each `place` [n] (-1: of none)."""
        last = np.searchsorted(self.keys, place * DAYS + np.clip(day, 0, DAYS - 1)) - 1
        met = np.flatnonzero(last >= 0)
        met = met[self.keys[last[met]] // DAYS == place[met]]
        found = np.zeros((len(place), 2))
        found[met] = self.left[last[met]] * np.exp2((self.keys[last[met]] % DAYS - day[met]) / HALF_LIFE)[:, None]
        return found


def _summed(place: Int64s, day: Int64s, weight: Float64s) -> tuple[Int64s, Int64s, Float64s]:
    """Rows of one place and day as one: places, days and weights, by place and then by day."""
    keys, where = np.unique(place * DAYS + day, return_inverse=True)
    return keys // DAYS, keys % DAYS, np.column_stack([np.bincount(where, one, len(keys)) for one in weight.T])


def _running(place: Int64s, day: Int64s, weight: Float64s) -> Float64s:
    """The recurrence left[j] = left[j - 1] x fading + weight[j] within each place, for all rows at once.

    Doubling: after s rounds each row holds the sum over the 2^s rows that end with it. Differences of one running sum of growing
    powers would be quicker, and lose the oldest labels to rounding.
    """
    left, reach = weight.copy(), 1
    while (same := place[reach:] == place[:-reach]).any():
        gap = np.where(same, day[reach:] - day[:-reach], 0)
        left[reach:] += left[:-reach] * (same * np.exp2(-gap / HALF_LIFE))[:, None]
        reach *= 2
    return left


class PooledRates:
    """As-of rates of N items from one event log; NaN before the first label of anything."""

    def __init__(self, label: tuple[Int64s, Int64s, Float64s], creator: Int64s, category: tuple[Int64s, Int64s]) -> None:
        """`label` = (item, day, 1.0 or 0.0) [L]; `creator` [N] the place of each item's creator, -1 unknown; `category` =
        (start [N + 1], place): those of item i are `place[start[i] : start[i + 1]]`."""
        self._creator, (self._start, self._category) = creator, category
        self._last_day = int(label[1].max(initial=0)) + 1
        item, day, weight = _summed(*label[:2], np.column_stack([label[2], np.ones(len(label[2]))]))
        held, owner = self._categories(item)
        made = creator[item] >= 0
        self._everything = Faded.of(np.zeros(len(day), np.int64), day, weight)
        self._of_category = Faded.of(held, day[owner], weight[owner])
        self._of_creator = Faded.of(creator[item][made], day[made], weight[made])
        self._of_item = Faded.of(item, day, weight)

    @classmethod
    def from_dataset(cls, dataset: Dataset, before: int | None = None) -> PooledRates:
        """The rates of a data folder's event log, of events strictly before `before` (seconds) if given ("frozen")."""
        events, items = dataset.events, dataset.items
        labelled = events.take((events.label >= 0) & (events.timestamp < (NEVER if before is None else before)))
        makers, words = dict[str, int](), dict[str, int]()
        creator = np.array([makers.setdefault(name, len(makers)) if name else -1 for name in items.creator], np.int64)
        held = [[words.setdefault(word, len(words)) for word in dict.fromkeys(categories_of(text))] for text in items.category]
        start = np.cumsum([0, *map(len, held)], dtype=np.int64)
        label = (labelled.item.astype(np.int64), labelled.day, labelled.label.astype(np.float64))
        return cls(label, creator, (start, np.array([place for places in held for place in places], np.int64)))

    def at(self, item: npt.NDArray[np.integer], day: npt.NDArray[np.integer]) -> Float64s:
        """Float64 [n]: the rate of `item` [n] (rows) before the start of `day` [n] (days since 1970).

        A log that has ended fades no more: what nobody contradicted for years would else be forgotten for what is average.
        """
        item64, day64 = item.astype(np.int64), np.minimum(day.astype(np.int64), self._last_day)
        held, owner = self._categories(item64)
        everything = self._everything.before(np.zeros(len(day64), np.int64), day64)
        base = np.divide(everything[:, 0], everything[:, 1], out=np.full(len(day64), np.nan), where=everything[:, 1] > 0)
        words = _shrunk(self._of_category.before(held, day64[owner]), base[owner], CATEGORY_LABELS)
        many = np.bincount(owner, minlength=len(item64))
        kind = np.divide(np.bincount(owner, words, len(item64)), many, out=base.copy(), where=many > 0)
        made = _shrunk(self._of_creator.before(self._creator[item64], day64), kind, PRIOR_LABELS)
        return _shrunk(self._of_item.before(item64, day64), made, PRIOR_LABELS)

    def as_of(self, timestamp: int) -> Float64s:
        """Float64 [N]: the rates of all items before the start of the day of `timestamp` (seconds UTC)."""
        return self.at(np.arange(len(self._creator)), np.full(len(self._creator), timestamp // DAY))

    def _categories(self, item: Int64s) -> tuple[Int64s, Int64s]:
        """The categories of items [n], joined, and the place in `item` that each belongs to."""
        many = np.diff(self._start)[item]
        owner = np.repeat(np.arange(len(item), dtype=np.int64), many)
        first = np.cumsum(many) - many
        return self._category[self._start[item][owner] + np.arange(len(owner)) - first[owner]], owner


def categories_of(category: str) -> tuple[str, ...]:
    """The words of a category text, which commas or bars divide."""
    return tuple(part for word in category.replace("|", ",").split(",") if (part := word.strip()))


def _shrunk(labels: Float64s, towards: Float64s, worth: float) -> Float64s:
    """The share of positive labels [n, 0] among all [n, 1], joined by so many labels of the rate `towards` [n]."""
    return np.asarray((labels[:, 0] + worth * towards) / (labels[:, 1] + worth), np.float64)
