"""What became of what was shown: labels of impressions, by the engagements that name them, told now or held by the base folder.

What the journal and the member store have forgotten the base folder still knows: nothing that it says is taken back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from retrieval.data.exported_journal import Done
from retrieval.data.schema import IMPRESSION, Dataset, Events, action_kind

Shows = tuple[str, str, str]
"""Request, member, item: what names an impression."""


@dataclass(frozen=True)
class Judge:
    """What became of impressions: `good` were engaged with, of `own` the engagement carries the label itself."""

    good: frozenset[Shows]
    own: frozenset[Shows]

    @classmethod
    def of(cls, done: Iterable[Done], actions: tuple[str, ...]) -> Judge:
        """Who knows these engagements; one without an action did the first of `actions`, and others than these do not count."""
        good: set[Shows] = set()
        own: set[Shows] = set()
        for one in done:
            if one.request and action_kind(one.action or actions[0]) in actions:
                (good if one.label is None else own).add((one.request, one.member, one.item))
        return cls(frozenset(good), frozenset(own))

    @property
    def named(self) -> frozenset[Shows]:
        """All impressions of which something became."""
        return self.good | self.own

    def knowing(self, base: Dataset, requests: Collection[str]) -> Judge:
        """Who also knows the base folder's engagements that name one of these requests."""
        label = base.events.label
        found = _named(base, base.is_engagement, requests)
        good = {name for row, name in found if label[row] < 0}
        return Judge(self.good | good, self.own | {name for row, name in found if label[row] >= 0})

    def label(self, name: Shows) -> int:
        """1 engaged with, 0 not, -1 if the engagement says it."""
        return -1 if name in self.own else int(name in self.good)

    def over(self, base: Dataset, named: Collection[Shows]) -> Dataset:
        """The base folder, with the labels of these of its impressions by what is known now."""
        if IMPRESSION not in base.events.actions:
            return base
        shown = base.events.action == base.events.actions.index(IMPRESSION)
        label = base.events.label.copy()
        for row, name in _named(base, shown, {request for request, _, _ in named}):
            if name in named:
                label[row] = self.label(name)
        return replace(base, events=replace(base.events, label=label))


def carried(base: Events, fresh: Events) -> Events:
    """The fresh events; those whose numbers the base has too keep what only the base knows of them: where they were shown, and
    that an impression was engaged with. `fresh` has the codes of `base` and more."""
    old = base.take(np.isin(base.event_id, fresh.event_id))
    if not len(old):
        return fresh
    order = np.argsort(old.event_id)
    row = order[np.minimum(np.searchsorted(old.event_id, fresh.event_id, sorter=order), len(old) - 1)]
    both = old.event_id[row] == fresh.event_id
    shown = fresh.action == fresh.actions.index(IMPRESSION) if IMPRESSION in fresh.actions else np.zeros(len(fresh), bool)
    return replace(
        fresh,
        label=np.where(both & shown & (fresh.label == 0), old.label[row], fresh.label),
        request=np.where(both & (fresh.request < 0), old.request[row], fresh.request),
        position=np.where(both & (fresh.position < 0), old.position[row], fresh.position),
        surface=np.where(both & (fresh.surface < 0), old.surface[row], fresh.surface),
    )


def _named(base: Dataset, which: npt.NDArray[np.bool_], requests: Collection[str]) -> list[tuple[int, Shows]]:
    """The rows of the base's events in the mask that belong to one of the requests, each with what names its impression."""
    log, members, items = base.events, base.members.member_id, base.items.item_id
    codes = np.array([code for code, name in enumerate(log.requests) if name in requests], np.int32)
    rows = np.flatnonzero(which & np.isin(log.request, codes)).tolist()
    return [(row, (log.requests[log.request[row]], members[log.member[row]], items[log.item[row]])) for row in rows]
