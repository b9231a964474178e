"""What the simple ranking baselines see of an event: numbers that were known before the start of a day.

Rates and counts of item, member and author, similarity of the item's words to what the member liked and disliked, the
item's own numbers, and a small vector of its text. Legend: n rows, F features, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from retrieval.data.schema import DAY, MISSING_TIME, Dataset
from retrieval.terms import Terms, unit_rows

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]

PRIOR = 5.0
"""Labels that the base rate is worth in a smoothed rate."""
TEXT_DIMS = 32
NEWEST = 200
"""History entries per member that text similarity looks at."""


@dataclass(frozen=True)
class Tally:
    """Running sums per key over days, to be read before any day."""

    keys: npt.NDArray[np.int64]
    running: Floats
    first_day: int
    span: int

    @classmethod
    def of(cls, key: Ints, day: Ints, value: Floats) -> Tally:
        """Adds up `value` by key and day."""
        first = int(day.min()) if len(day) else 0
        span = int(day.max()) - first + 2 if len(day) else 1
        combined = key.astype(np.int64) * span + (day - first)
        order = np.argsort(combined, kind="stable")
        return cls(combined[order], np.concatenate([[0.0], np.cumsum(value[order])]), first, span)

    def before(self, key: Ints, day: Ints) -> Floats:
        """Returns float64 [n]: the sum of each key's values on days strictly before the given one."""
        base = key.astype(np.int64) * self.span
        end = np.searchsorted(self.keys, base + np.clip(day - self.first_day, 0, self.span - 1))
        return self.running[end] - self.running[np.searchsorted(self.keys, base)]


@dataclass(frozen=True)
class FeatureTable:
    """Features of a data set's events as of given days."""

    dataset: Dataset

    @cached_property
    def labelled(self) -> npt.NDArray[np.int64]:
        """Positions of the events with a label."""
        return np.flatnonzero(self.dataset.events.label >= 0)

    @cached_property
    def author(self) -> npt.NDArray[np.int64]:
        """Int64 [N]: a number for each item's creator, -1 if it is unknown."""
        known: dict[str, int] = {}
        return np.array([known.setdefault(name, len(known)) if name else -1 for name in self.dataset.items.creator], np.int64)

    @cached_property
    def base_rate(self) -> float:
        """Share of positive labels before the test cut, .5 if there are none."""
        log = self.dataset.events
        known = log.label[(log.label >= 0) & (log.timestamp < self.dataset.meta.cut_test)]
        return float(known.mean()) if len(known) else 0.5

    @cached_property
    def words(self) -> sp.csr_matrix:
        """Float32 [N, V]: TF-IDF of each item, unit rows."""
        terms = Terms.of_items(self.dataset.items)
        return terms.tfidf(terms.counts)

    @cached_property
    def text_vectors(self) -> npt.NDArray[np.float32]:
        """Float32 [N, d]: the leading directions of the TF-IDF matrix, d = 32 or fewer."""
        dims = min(TEXT_DIMS, min(self.words.shape) - 1)
        if dims < 1:
            return np.zeros((self.words.shape[0], 0), np.float32)
        start = np.random.default_rng(0).standard_normal(min(self.words.shape))
        left, values, _ = svds(self.words.astype(np.float64), k=dims, v0=start)
        return (left * values).astype(np.float32)

    @cached_property
    def engaged(self) -> Tally:
        """Engagements by item."""
        log = self.dataset.engagements
        return Tally.of(log.item, log.day, np.ones(len(log)))

    @cached_property
    def _tallies(self) -> dict[str, tuple[Tally, Tally]]:
        """(labels, positive labels) by item, member and author."""
        log = self.dataset.events.take(self.labelled)
        keys: dict[str, Ints] = {"item": log.item, "member": log.member, "author": self.author[log.item]}
        ones, positive = np.ones(len(log)), log.label.astype(np.float64)
        return {name: (Tally.of(key, log.day, ones), Tally.of(key, log.day, positive)) for name, key in keys.items()}

    def rate(self, kind: str, key: Ints, day: Ints) -> tuple[Floats, Floats]:
        """Returns the smoothed share of positive labels before each day and the number of labels it rests on, both [n].

        `kind` is "item", "member" or "author", `key` rows of Items or Members, or numbers of `author`.
        """
        labels, positives = self._tallies[kind]
        count = np.where(key >= 0, labels.before(key, day), 0)
        good = np.where(key >= 0, positives.before(key, day), 0)
        return (good + PRIOR * self.base_rate) / (count + PRIOR), count

    def features(self, event: Ints, day: Ints) -> npt.NDArray[np.float32]:
        """Returns float32 [n, F] of the events at the given positions, with everything as of the start of `day`."""
        log = self.dataset.events
        member, item = log.member[event], log.item[event]
        columns = self._rates(member, item, day)
        columns += [np.log1p(self.engaged.before(item, day)), *self._numbers(item, day), *self._likeness(member, item, day)]
        if (log.position >= 0).any():
            columns.append(np.log1p(np.maximum(log.position[event], 0)))
        if self.dataset.connections is not None:
            columns.append(self._connected(member, item, day))
        return np.column_stack([*columns, self.text_vectors[item]]).astype(np.float32)

    def _rates(self, member: Ints, item: Ints, day: Ints) -> list[Floats]:
        found = []
        keys = {"item": item, "member": member}
        if (self.author >= 0).any():
            keys["author"] = self.author[item]
        for kind, key in keys.items():
            rate, count = self.rate(kind, key, day)
            found += [np.log(rate / (1 - rate)), np.log1p(count)]
        return found

    def _numbers(self, item: Ints, day: Ints) -> list[Floats]:
        """The item's own numbers and age; an unknown one is 0 beside a column that says so."""
        columns = [np.asarray(column[item], np.float64) for column in self.dataset.items.numbers.values()]
        created = self.dataset.items.created_at
        if (created != MISSING_TIME).any():
            columns.append(np.where(created[item] == MISSING_TIME, np.nan, day - created[item] / DAY))
        found = []
        for column in columns:
            known = np.isfinite(column)
            found += [np.where(known, np.sign(column) * np.log1p(np.abs(column)), 0), known.astype(np.float64)]
        return found

    def _likeness(self, member: Ints, item: Ints, day: Ints) -> list[Floats]:
        """Cosine of the item's words with those of what the member liked, and with what they disliked, before the day."""
        span = int(day.max()) + 1
        pairs, which = np.unique(member.astype(np.int64) * span + day, return_inverse=True)
        log = self.dataset.events.take(self.labelled)
        found = []
        for wanted in (1, 0):
            part = log.take(log.label == wanted)
            histories = _items_before(part.member, part.day, part.item, pairs // span, pairs % span, len(self.dataset.items))
            profile = unit_rows(histories @ self.words)
            found.append(np.asarray(profile[which].multiply(self.words[item]).sum(axis=1), np.float64).ravel())
        return found

    def _connected(self, member: Ints, item: Ints, day: Ints) -> Floats:
        """1 where the item's creator is a connection known before the day."""
        edges = self.dataset.connections
        if edges is None:
            return np.zeros(len(item))
        since: dict[tuple[int, str], int] = {}
        for who, other, moment in zip(edges.member.tolist(), edges.other_id, edges.since.tolist()):
            since[who, other] = min(moment, since.get((who, other), moment))
        creator = self.dataset.items.creator
        moments = (day * DAY).tolist()
        never = np.iinfo(np.int64).max
        asked = zip(member.tolist(), item.tolist(), moments)
        return np.array([since.get((who, creator[what]), never) < moment for who, what, moment in asked], np.float64)


def _items_before(member: Ints, day: Ints, item: Ints, asked: Ints, before: Ints, items: int) -> sp.csr_matrix:
    """Float32 [P, N]: the newest items of each asked member on days before the given one (events in time order)."""
    width = int(max(day.max(initial=0), before.max(initial=0))) + 2
    order = np.argsort(member, kind="stable")
    keys = member[order].astype(np.int64) * width + day[order]
    end = np.searchsorted(keys, asked.astype(np.int64) * width + before)
    begin = np.maximum(np.searchsorted(keys, asked.astype(np.int64) * width), end - NEWEST)
    lengths = end - begin
    start = np.concatenate([[0], np.cumsum(lengths)])
    values = np.arange(start[-1]) + np.repeat(begin - start[:-1], lengths)
    return sp.csr_matrix((np.ones(len(values), np.float32), item[order][values], start), (len(asked), items))
