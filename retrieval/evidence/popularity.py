"""Baselines that look at no history: popularity of all time, of late, of the last days, and the age of an item."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval.data.schema import DAY, MISSING_TIME, Events
from retrieval.evidence.baselines import Floats, Knowledge, Past
from retrieval.evidence.protocol import Queries
from retrieval.evidence.rank import Scorer

FRESHNESS_DAYS = 90
"""Days before the cut that rates by age are learnt from."""
_UNDATED = -(1 << 40)
_UNDATED_AGE = 1 << 39


def same_for_all(scores: npt.NDArray[np.float64]) -> Scorer:
    """Returns a scorer that gives every query the same scores [N]."""
    row = scores.astype(np.float32)
    return lambda queries: np.broadcast_to(row, (len(queries), len(row)))


@dataclass(frozen=True)
class Popularity:
    """Engagements before the cut; with a half-life (days) those of long ago count less."""

    half_life: float | None = None
    knowledge: Knowledge = "frozen"

    @property
    def name(self) -> str:
        return "Popularity" if self.half_life is None else "Popularity, recent"

    @property
    def setting(self) -> str:
        return "all" if self.half_life is None else f"half-life {self.half_life:g} d"

    def fit(self, past: Past) -> Scorer:
        if self.half_life is None:
            return same_for_all(past.counts)
        weight = 0.5 ** ((past.before - past.events.timestamp) / DAY / self.half_life)
        return same_for_all(np.bincount(past.events.item, weight, len(past.dataset.items)).astype(np.float64))


@dataclass(frozen=True)
class LivePopularity:
    """Engagements of everybody before the day of the query: those of the last whole `days`, or, with a half-life (days), all of
    them, those of long ago counting less."""

    days: int = 7
    half_life: float | None = None
    knowledge: Knowledge = "live"

    @property
    def name(self) -> str:
        return f"Live popularity {self.days}d" if self.half_life is None else "Live popularity, fading"

    @property
    def setting(self) -> str:
        return f"{self.days} d" if self.half_life is None else f"half-life {self.half_life:g} d"

    def fit(self, past: Past) -> Scorer:
        items = len(past.dataset.items)

        def score(queries: Queries) -> Floats:
            days, which = np.unique(queries.day, return_inverse=True)
            return np.stack([self._before(queries.events, int(day), items) for day in days])[which]

        return score

    def _before(self, log: Events, day: int, items: int) -> Floats:
        oldest = day - self.days if self.half_life is None else 0
        begin, end = np.searchsorted(log.timestamp, [oldest * DAY, day * DAY])
        weight = None if self.half_life is None else 0.5 ** ((day - 1 - log.timestamp[begin:end] // DAY) / self.half_life)
        return np.bincount(log.item[begin:end], weight, minlength=items).astype(np.float32)


@dataclass(frozen=True)
class Freshness:
    """How often an item of this age is engaged with on a day, learnt before the cut; what does not exist yet comes last.

    The whole days since `created_at` are all it knows of an item; items without one score like the average item.
    """

    oldest: int = 60
    name: str = "Freshness"
    knowledge: Knowledge = "live"

    @property
    def setting(self) -> str:
        return f"ages to {self.oldest} d"

    def fit(self, past: Past) -> Scorer:
        created = past.dataset.items.created_at
        born = np.where(created == MISSING_TIME, _UNDATED, created // DAY)
        rates = self._rates(past, born)

        def score(queries: Queries) -> Floats:
            days, which = np.unique(queries.day, return_inverse=True)
            return np.stack([rates[self._bucket(day - born)] for day in days.tolist()])[which].astype(np.float32)

        return score

    def _bucket(self, age: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Age in whole days up to `oldest`; then one bucket for what is not born, one for what has no date."""
        known = np.where(age < 0, self.oldest + 1, np.minimum(age, self.oldest))
        return np.where(age > _UNDATED_AGE, self.oldest + 2, known)

    def _rates(self, past: Past, born: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Log engagements per item and day by bucket."""
        last = past.before // DAY
        log = past.events.take(past.events.day >= last - FRESHNESS_DAYS)
        size = self.oldest + 3
        done = np.bincount(self._bucket(log.day - born[log.item]), minlength=size).astype(np.float64)
        if not len(log):
            return np.zeros(size)
        first = int(log.day[0])
        there = np.zeros(size)
        for day in range(first, last):
            there += np.bincount(self._bucket(day - born), minlength=size)
        average = done.sum() / max(there.sum(), 1)
        rates = np.log((done + average) / (there + 1))
        rates[self.oldest + 1] = rates.min() - 1
        return rates
