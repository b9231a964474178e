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

from retrieval.data.schema import DAY, Dataset

POOLED = "pooled_rate"
HALF_LIFE = 120.0
"""Days after which a label counts half. On two public sets and the synthetic world 60 to 240 do about as well."""
PRIOR_LABELS = 5.0
"""Labels that the level above is worth; for a category, which has many, CATEGORY_LABELS."""
CATEGORY_LABELS = 20.0

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Faded:
    """Labels of places as sorted keys `place * span + day`, with what is left of their sums at each of these days."""

    keys: Int64s
    left: Float64s
    first_day: int
    span: int

    @classmethod
    def of(cls, place: Int64s, day: Int64s, positive: Float64s) -> Faded:
        """Of L labels at `place` [L] on `day` [L], 1.0 or 0.0: `left` is float64 [keys, 2], positive ones and all."""
        first_day, span = (int(day.min()), int(day.max() - day.min()) + 2) if len(day) else (0, 2)
        keys, where = np.unique(place * span + (day - first_day), return_inverse=True)
        summed = np.zeros((len(keys), 2))
        np.add.at(summed, where, np.column_stack([positive, np.ones(len(positive))]))
        return cls(keys, _running(keys // span, keys % span, summed), first_day, span)

    def before(self, place: Int64s, day: Int64s) -> Float64s:
        """Float64 [n, 2]: what is left, at the start of each `day` [n], of the labels of each `place` [n] (-1: of none)."""
        offset = np.clip(day - self.first_day, 0, self.span - 1)
        last = np.searchsorted(self.keys, place * self.span + offset) - 1
        met = np.flatnonzero(last >= 0)
        met = met[self.keys[last[met]] // self.span == place[met]]
        found = np.zeros((len(place), 2))
        age = day[met] - self.first_day - self.keys[last[met]] % self.span
        found[met] = self.left[last[met]] * np.exp2(-age / HALF_LIFE)[:, None]
        return found


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
        item, day, positive = label
        self._creator, (self._start, self._category) = creator, category
        held, owner = self._categories(item)
        made = creator[item] >= 0
        self._everything = Faded.of(np.zeros(len(day), np.int64), day, positive)
        self._of_category = Faded.of(held, day[owner], positive[owner])
        self._of_creator = Faded.of(creator[item][made], day[made], positive[made])
        self._of_item = Faded.of(item, day, positive)

    @classmethod
    def from_dataset(cls, dataset: Dataset, before: int | None = None) -> PooledRates:
        """The rates of a data folder's event log, of events strictly before `before` (seconds) if given ("frozen")."""
        events, items = dataset.events, dataset.items
        known = np.ones(len(events), bool) if before is None else events.timestamp < before
        labelled = events.take((events.label >= 0) & known)
        makers, words = dict[str, int](), dict[str, int]()
        creator = np.array([makers.setdefault(name, len(makers)) if name else -1 for name in items.creator], np.int64)
        held = [[words.setdefault(word, len(words)) for word in categories_of(text)] for text in items.category]
        start = np.cumsum([0, *map(len, held)], dtype=np.int64)
        category = np.array([place for places in held for place in places], np.int64)
        label = (labelled.item.astype(np.int64), labelled.day, labelled.label.astype(np.float64))
        return cls(label, creator, (start, category))

    def at(self, item: npt.NDArray[np.integer], day: npt.NDArray[np.integer]) -> Float64s:
        """Float64 [n]: the rate of `item` [n] (rows) before the start of `day` [n] (days since 1970)."""
        item64, day64 = item.astype(np.int64), day.astype(np.int64)
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
        every = np.arange(len(self._creator), dtype=np.int64)
        return self.at(every, np.full(len(every), timestamp // DAY, np.int64))

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
