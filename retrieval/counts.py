"""As-of numbers: what the event log knew of every item before a given day.

One source, three users. Training asks `at(items, days)` for the items of a batch, the nightly job asks `as_of(time)` for the
whole catalogue, and the service reads what the nightly job wrote beside the vectors. All three see everything strictly
before the start of the day (UTC) and nothing of the day itself, so an example is never inside its own count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval.data.schema import DAY, MISSING_TIME, Dataset

NUMBERS = ("n_total", "n_30d", "n_7d", "n_1d", "positive_rate", "age_days")
"""Engagements ever / in the last 30, 7, 1 whole days; smoothed share of positive labels; days since the item appeared."""
WINDOWS = {"n_30d": 30, "n_7d": 7, "n_1d": 1}
NEVER = int(np.iinfo(np.int64).max)
PRIOR_WEIGHT = 5.0
"""Labels that the overall positive rate is worth when an item's own rate is smoothed towards it."""

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Ledger:
    """Events as sorted keys `item * span + day`, with a running sum of weights: any prefix of days in two look-ups."""

    keys: Int64s
    running: Float64s
    starts: Int64s
    first_day: int
    span: int

    @classmethod
    def of(cls, n_items: int, item: Int64s, day: Int64s, weight: Float64s, first_day: int, span: int) -> _Ledger:
        keys = item * span + (day - first_day)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        running = np.concatenate([[0.0], np.cumsum(weight[order])])
        return cls(keys, running, np.searchsorted(keys, np.arange(n_items, dtype=np.int64) * span), first_day, span)

    def before(self, item: Int64s, day: Int64s) -> Float64s:
        """Sum of weights of each item's events with a day strictly before the given one."""
        offset = np.clip(day - self.first_day, 0, self.span - 1)
        return self.running[np.searchsorted(self.keys, item * self.span + offset)] - self.running[self.starts[item]]


class Counts:
    """As-of numbers of N items from one event log (`NUMBERS`). NaN means unknown."""

    def __init__(
        self,
        n_items: int,
        engaged: tuple[Int64s, Int64s],
        labelled: tuple[Int64s, Int64s, Float64s],
        created_day: Float64s,
    ) -> None:
        """`engaged` = (item, day) of engagements; `labelled` = (item, day, 1.0 or 0.0); `created_day` [N], NaN unknown."""
        self.n_items = n_items
        days = np.concatenate([engaged[1], labelled[1]])
        first_day, span = (int(days.min()), int(days.max() - days.min()) + 2) if len(days) else (0, 2)
        self._engaged = _Ledger.of(n_items, *engaged, np.ones(len(engaged[0])), first_day, span)
        self._positive = _Ledger.of(n_items, *labelled, first_day, span)
        self._labelled = _Ledger.of(n_items, *labelled[:2], np.ones(len(labelled[0])), first_day, span)
        first_seen = np.full(n_items, np.inf)
        np.minimum.at(first_seen, engaged[0], engaged[1].astype(np.float64))
        np.minimum.at(first_seen, labelled[0], labelled[1].astype(np.float64))
        self._first_seen, self._created_day = first_seen, created_day
        self._rate_before = _overall_rate(labelled[1], labelled[2], first_day, span)
        self._first_day, self._span = first_day, span

    @classmethod
    def from_dataset(cls, dataset: Dataset, before: int | None = None) -> Counts:
        """The counts of a data folder's event log, of events strictly before `before` (seconds) if given ("frozen")."""
        events = dataset.events
        known = np.ones(len(events), bool) if before is None else events.timestamp < before
        engaged = events.take(dataset.is_engagement & known)
        labelled = events.take((events.label >= 0) & known)
        created = dataset.items.created_at.astype(np.float64)
        created[dataset.items.created_at == MISSING_TIME] = np.nan
        return cls(
            len(dataset.items),
            (engaged.item.astype(np.int64), engaged.day),
            (labelled.item.astype(np.int64), labelled.day, labelled.label.astype(np.float64)),
            np.floor(created / DAY),
        )

    def at(self, item: npt.NDArray[np.integer], day: npt.NDArray[np.integer]) -> dict[str, Float64s]:
        """The numbers of `item` [n] (rows) before the start of `day` [n] (days since 1970), each float64 [n]."""
        item64, day64 = item.astype(np.int64), day.astype(np.int64)
        total = self._engaged.before(item64, day64)
        found = {"n_total": total}
        for name, window in WINDOWS.items():
            found[name] = total - self._engaged.before(item64, day64 - window)
        labelled = self._labelled.before(item64, day64)
        prior = self._rate_before[np.clip(day64 - self._first_day, 0, self._span - 1)]
        smoothed = (self._positive.before(item64, day64) + PRIOR_WEIGHT * prior) / (labelled + PRIOR_WEIGHT)
        found["positive_rate"] = np.where(labelled > 0, smoothed, np.nan)
        # A first event of the day itself must not show: it would tell that somebody chooses the item today.
        since_seen, since_made = day64 - self._first_seen[item64], day64 - self._created_day[item64]
        seen, made = since_seen > 0, since_made >= 0
        found["age_days"] = np.fmax(np.where(seen, since_seen, np.nan), np.where(made, since_made, np.nan))
        return found

    def as_of(self, timestamp: int) -> dict[str, Float64s]:
        """The numbers of all N items before the start of the day of `timestamp` (seconds UTC), each float64 [N]."""
        day = np.full(self.n_items, timestamp // DAY, np.int64)
        return self.at(np.arange(self.n_items, dtype=np.int64), day)


def appeared(dataset: Dataset) -> Int64s:
    """When each item came into the world, seconds UTC int64 [N]: created, or met in any event if that was earlier.

    NEVER for an item of which neither is known. Everything has been there from the start (the smallest int64) where the
    folder knows no time at all.
    """
    created = dataset.items.created_at
    found = np.where(created == MISSING_TIME, NEVER, created)
    np.minimum.at(found, dataset.events.item, dataset.events.timestamp)
    return found if (found < NEVER).any() else created


def _overall_rate(day: Int64s, label: Float64s, first_day: int, span: int) -> Float64s:
    """Share of positives among all labels before each day of the span, float64 [span]; .5 before the first label."""
    offset = day - first_day
    positives = np.concatenate([[0.0], np.cumsum(np.bincount(offset, label, span))[:-1]])
    labels = np.concatenate([[0.0], np.cumsum(np.bincount(offset, minlength=span))[:-1]])
    return np.divide(positives, labels, out=np.full(span, 0.5), where=labels > 0)
