"""What each member did for the first time, in order: the training targets and the histories that precede them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval import records
from retrieval.data.schema import DAY, Dataset

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Timeline:
    """First engagements of each member with each item (the targets), and the log that their histories are read from.

    Sorted by member, then time: member, item, timestamp int64 [F]; `start` [M + 1] bounds of each member's run; `earlier` [F] how
    many of the member's entries are strictly earlier in time. `log_item`, `log_timestamp` int64 [L], `log_start` [M + 1]: the
    same of every engagement, repeats included. With `whole` the log holds the other actions too, but for impressions that
    were engaged; `log_event` int64 [L] positions in the data set's events, `log_other` bool [L] what is no engagement.
    """

    member: Ints
    item: Ints
    timestamp: Ints
    start: Ints
    earlier: Ints
    log_item: Ints
    log_timestamp: Ints
    log_start: Ints
    log_event: Ints
    log_other: npt.NDArray[np.bool_]
    whole: bool

    @classmethod
    def of(cls, dataset: Dataset, before: int, *, whole: bool = False) -> Timeline:
        """The engagements strictly before a time (seconds); `whole` lets histories show every action."""
        log, members = dataset.engagements.before(before), np.arange(len(dataset.members) + 1)
        first = np.unique(log.member.astype(np.int64) * max(len(dataset.items), 1) + log.item, return_index=True)[1]
        first.sort()  # back to time order, so that the stable sort below keeps it within a member
        order = first[np.argsort(log.member[first], kind="stable")]
        member, timestamp = log.member[order].astype(np.int64), log.timestamp[order]
        start = np.searchsorted(member, members)
        new_moment = np.ones(len(order), bool)
        new_moment[1:] = (member[1:] != member[:-1]) | (timestamp[1:] != timestamp[:-1])
        moment_start = np.maximum.accumulate(np.where(new_moment, np.arange(len(order)), 0))
        item, earlier = log.item[order].astype(np.int64), moment_start - start[member]
        return cls(member, item, timestamp, start, earlier, *_log(dataset, before, whole), whole)

    def shown(self, member: int, moment: int, settled: int | None = None) -> Ints:
        """Positions in the log of the history that serving would show of a member (row) at a moment (seconds), oldest first.

        As `retrieval.records.view_of` and `Writer.members` do it: of the newest `NEWEST` engagements strictly before the
        moment, repeats counted, each item where it comes first among these. Other actions only before `settled` (the start
        of the moment's day): on the day itself they tell what a visit that is still going on will come to.
        """
        start, stop = self.log_start[member], self.log_start[member + 1]
        rows = np.arange(start, start + np.searchsorted(self.log_timestamp[start:stop], moment))
        if self.whole:
            past = self.log_timestamp[rows] < (moment // DAY * DAY if settled is None else settled)
            rows = rows[past | ~self.log_other[rows]]
        rows = rows[-records.NEWEST :]
        key = np.where(self.log_other[rows], -1 - rows, self.log_item[rows])
        return rows[np.sort(np.unique(key, return_index=True)[1])]

    def history(self, member: int, moment: int) -> tuple[Ints, Ints]:
        """Items and times of what is `shown`."""
        rows = self.shown(member, moment)
        return self.log_item[rows], self.log_timestamp[rows]

    def __len__(self) -> int:
        return len(self.member)

    @property
    def day(self) -> Ints:
        """Days since 1970 (UTC) of each entry."""
        return self.timestamp // DAY


def _log(dataset: Dataset, before: int, whole: bool) -> tuple[Ints, Ints, Ints, Ints, npt.NDArray[np.bool_]]:
    """item, timestamp, start, event, other of the log that histories are read from, sorted by member, then time.

    An impression that was engaged is left out: the engagement says it, and its label would say it too early.
    """
    events, engaged = dataset.events, dataset.is_engagement
    held = np.flatnonzero((events.timestamp < before) & (engaged | (whole & (events.label != 1))))
    held = held[np.argsort(events.member[held], kind="stable")]
    start = np.searchsorted(events.member[held], np.arange(len(dataset.members) + 1))
    return events.item[held].astype(np.int64), events.timestamp[held], start, held, ~engaged[held]


def day_runs(day: Ints, at_least: int) -> list[Ints]:
    """Positions of entries grouped by day, in rising order of day; thin neighbouring days share a run of `at_least`.

    A batch is drawn from one run, so that its negatives are what members could have chosen at the same time. Batches
    that mix days let the model tell positives from negatives by their date alone.
    """
    order = np.argsort(day, kind="stable")
    edges = np.flatnonzero(np.diff(day[order])) + 1
    runs: list[Ints] = []
    waiting: list[Ints] = []
    for part in np.split(order, edges):
        waiting.append(part)
        if sum(map(len, waiting)) >= at_least:
            runs.append(np.concatenate(waiting))
            waiting = []
    if waiting and sum(map(len, waiting)):
        rest = np.concatenate(waiting)
        if runs:
            runs[-1] = np.concatenate([runs[-1], rest])
        else:
            runs.append(rest)
    return runs
