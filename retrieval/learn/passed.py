"""Hard negatives from the log: what a member was shown and passed over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retrieval.data.schema import IMPRESSION, Dataset, action_kind
from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.timeline import Ints, Timeline


@dataclass(frozen=True)
class PassedOver:
    """What was shown in the request that led to each target and never engaged by the member.

    `request` int64 [F] of each entry of the timeline (-1 unknown); `item` rows sorted by request, `start` [R + 1] their bounds.
    """

    request: Ints
    item: Ints
    start: Ints

    @classmethod
    def of(cls, dataset: Dataset, timeline: Timeline, before: int) -> PassedOver:
        """Of the impressions strictly before a time. Raises TrainingError if the folder has none with a request."""
        n, events = max(len(dataset.items), 1), dataset.events.before(before)
        wanted = np.array([action_kind(action) == IMPRESSION for action in events.actions], bool)
        shown = events.take(wanted[events.action] & (events.request >= 0)) if len(events) else events
        if not len(shown):
            raise TrainingError(
                f"{dataset.meta.name}: no impression with a request before the cut, so nothing was passed over; "
                "mine hard negatives with the model (--hard-from mined) or do without (--hard 0)"
            )
        log = dataset.engagements.before(before)
        keys, first = np.unique(log.member.astype(np.int64) * n + log.item, return_index=True)
        request = log.request[first][np.searchsorted(keys, timeline.member * n + timeline.item)].astype(np.int64)
        shown = shown.take(~np.isin(shown.member.astype(np.int64) * n + shown.item, keys))
        order = np.argsort(shown.request, kind="stable")
        start = np.searchsorted(shown.request[order], np.arange(len(dataset.events.requests) + 1))
        return cls(request, shown.item[order].astype(np.int64), start)

    def choose(self, target: Ints, each: int, rng: np.random.Generator) -> Ints:
        """Item rows int64 [P, each], -1 where a request passed over too few."""
        chosen = np.full((len(target), each), -1, np.int64)
        for row, request in enumerate(self.request[target].tolist()):
            if request >= 0:
                pool = np.unique(self.item[self.start[request] : self.start[request + 1]])
                taken = rng.choice(pool, min(each, len(pool)), replace=False)
                chosen[row, : len(taken)] = taken
        return chosen
