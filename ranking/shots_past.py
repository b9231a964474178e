"""Examples out of the log: the newest answers of other members before a day, as many of either kind.

An example is answered as it was known when the day began: an impression that somebody answers on the third day stands as
unanswered on the second. The choice depends on the log, the task and the day alone, so that all members who need examples on one
day read the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ranking.learn.examples import Ints, answers, shown_key
from ranking.shots import Shot, Shots, check_shots
from ranking.tasks import Task
from retrieval.data.schema import DAY, IMPRESSION, Dataset, action_kind

LOOKED_AT = 400
"""Newest answers of either kind among which examples are looked for: one busy member may have given all of them."""
NEVER = np.iinfo(np.int64).max
"""Seconds at which nothing happens."""


class PastShots:
    """Finds `count` examples of a task as of any day. Nothing at or after `until` (seconds) is known."""

    def __init__(self, dataset: Dataset, tasks: Mapping[str, Task], count: int, until: int) -> None:
        self.count, self._items, self._log, self._until = check_shots(count), dataset.items, dataset.events, until
        self._asked = {name: _Asked.of(dataset, task, until) for name, task in tasks.items()} if count else {}
        self._kept: dict[tuple[str, int], tuple[list[int], list[int]]] = {}

    def before(self, task: str, moment: int, member: int = -1) -> tuple[Shot, ...]:
        """The examples of a task before the start of a moment's day (seconds), none of them of the member (row) who reads them.

        Positive and negative ones take turns, newest first, so that whatever is cut at the end leaves a balance.
        """
        halves = self._newest(task, moment // DAY)
        kept = [[row for row in some if self._log.member[row] != member] for some in halves]
        turns = [row for pair in zip(*kept) for row in pair] if all(kept) else [*kept[0], *kept[1]]
        positives = set(halves[0])
        return tuple(self._shot(row, row in positives) for row in turns[: self.count])

    def of_all(self, tasks: Iterable[str], moment: int) -> Shots:
        """The examples of every task before the start of a moment's day; tasks without any are left out."""
        found = {task: self.before(task, moment) for task in tasks} if self.count else {}
        return {task: shots for task, shots in found.items() if shots}

    def _newest(self, task: str, day: int) -> tuple[list[int], list[int]]:
        """The positive and the negative events before a day, see `_distinct`."""
        if task not in self._asked:
            return [], []
        if (task, day) not in self._kept:
            event, positive = self._asked[task].before(min(day * DAY, self._until))
            self._kept[task, day] = self._distinct(event[positive]), self._distinct(event[~positive])
        return self._kept[task, day]

    def _distinct(self, events: Ints) -> list[int]:
        """The newest of some events first, one for each item and member; one more than is shown."""
        found: list[int] = []
        items, members = set[int](), set[int]()
        for row in events[-LOOKED_AT:][::-1].tolist():
            item, member = int(self._log.item[row]), int(self._log.member[row])
            if item not in items and member not in members:
                found.append(row)
                items.add(item)
                members.add(member)
            if len(found) > (self.count + 1) // 2:
                break
        return found

    def _shot(self, row: int, positive: bool) -> Shot:
        item = int(self._log.item[row])
        return Shot(self._items.title[item] or self._items.text[item][:200], self._items.category[item], positive)


@dataclass(frozen=True)
class _Asked:
    """What one task asks: `event` int64 [n] in time order, when each was there and when its answer came (seconds), the answer,
    and the one that an unanswered event has."""

    event: Ints
    shown: Ints
    answered: Ints
    positive: npt.NDArray[np.bool_]
    unanswered: bool

    @classmethod
    def of(cls, dataset: Dataset, task: Task, until: int) -> _Asked:
        """About the events before a time (seconds). When they were answered is read of the whole log: the `label` column tells of
        an answer, and not when it came."""
        event, label = answers(replace(dataset, events=dataset.events.before(until)), task)
        shown = dataset.events.timestamp[event]
        return cls(event, shown, _answered(dataset, task, event), label == 1, task.asks == "label" and task.label == 0)

    def before(self, moment: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """The events before a moment (seconds), and which of them were positive as it was known then."""
        end = int(np.searchsorted(self.shown, moment))
        known = self.answered[:end] < moment
        return self.event[:end], np.where(known, self.positive[:end], self.unanswered)


def _answered(dataset: Dataset, task: Task, event: Ints) -> Ints:
    """When a task's events [n] got their answer, seconds: an impression by the first engagement in its request that the task
    asks about, everything else at its own time."""
    log = dataset.events
    own = log.timestamp[event]
    if task.asks == "engage":
        return own
    asked = np.array([task.asks == "label" or action_kind(action) == task.action for action in log.actions], bool)
    impression = np.array([action == IMPRESSION for action in log.actions], bool)
    did = np.flatnonzero(asked[log.action] & ~impression[log.action] & (log.request >= 0))
    _, key = np.unique(np.concatenate([shown_key(log, did), shown_key(log, event)]), return_inverse=True)
    first = np.full(len(key), NEVER, np.int64)
    np.minimum.at(first, key[: len(did)], log.timestamp[did])
    found = first[key[len(did) :]]
    return np.where(impression[log.action[event]] & (log.request[event] >= 0) & (found < NEVER), found, own)
