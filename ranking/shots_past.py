"""Examples out of the log: the newest answers of other members before a day, as many of either kind.

The choice depends on the log, the task and the day alone, so that all members who need examples on one day read the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ranking.learn.examples import answers
from ranking.shots import Shot, Shots, check_shots
from ranking.tasks import Task
from retrieval.data.schema import DAY, Dataset

LOOKED_AT = 400
"""Newest answers of either kind among which examples are looked for: one busy member may have given all of them."""


class PastShots:
    """Finds `count` examples of a task as of any day. Nothing at or after `until` (seconds) is known."""

    def __init__(self, dataset: Dataset, tasks: Mapping[str, Task], count: int, until: int) -> None:
        known = replace(dataset, events=dataset.events.before(until))
        self.count, self._items, self._log = check_shots(count), dataset.items, known.events
        self._answers: dict[tuple[str, bool], npt.NDArray[np.int64]] = {}
        for name, task in tasks.items() if count else ():
            event, label = answers(known, task)
            for positive in (True, False):
                self._answers[name, positive] = event[(label == 1) == positive]
        self._kept: dict[tuple[str, int, bool], list[int]] = {}

    def before(self, task: str, moment: int, member: int = -1) -> tuple[Shot, ...]:
        """The examples of a task before the start of a moment's day (seconds), none of them of the member (row) who reads them.

        Positive and negative ones take turns, newest first, so that whatever is cut at the end leaves a balance.
        """
        day = moment // DAY
        halves = [self._newest(task, day, positive) for positive in (True, False)]
        kept = [[row for row in some if self._log.member[row] != member] for some in halves]
        turns = [row for pair in zip(*kept) for row in pair] if all(kept) else [*kept[0], *kept[1]]
        positives = set(halves[0])
        return tuple(self._shot(row, row in positives) for row in turns[: self.count])

    def of_all(self, tasks: Iterable[str], moment: int) -> Shots:
        """The examples of every task before the start of a moment's day; tasks without any are left out."""
        found = {task: self.before(task, moment) for task in tasks} if self.count else {}
        return {task: shots for task, shots in found.items() if shots}

    def _newest(self, task: str, day: int, positive: bool) -> list[int]:
        """Events of one kind of answer before a day, newest first, one for each item and member; one more than is shown."""
        key = (task, day, positive)
        if key not in self._kept:
            events = self._answers.get((task, positive), np.zeros(0, np.int64))
            end = int(np.searchsorted(self._log.timestamp[events], day * DAY))
            found: list[int] = []
            items, members = set[int](), set[int]()
            for row in events[max(0, end - LOOKED_AT) : end][::-1].tolist():
                item, member = int(self._log.item[row]), int(self._log.member[row])
                if item not in items and member not in members:
                    found.append(row)
                    items.add(item)
                    members.add(member)
                if len(found) > (self.count + 1) // 2:
                    break
            self._kept[key] = found
        return self._kept[key]

    def _shot(self, row: int, positive: bool) -> Shot:
        item = int(self._log.item[row])
        return Shot(self._items.title[item] or self._items.text[item][:200], self._items.category[item], positive)
