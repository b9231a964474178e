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
    same of every engagement, repeats included.
    """

    member: Ints
    item: Ints
    timestamp: Ints
    start: Ints
    earlier: Ints
    log_item: Ints
    log_timestamp: Ints
    log_start: Ints

    @classmethod
    def of(cls, dataset: Dataset, before: int) -> Timeline:
        """The engagements strictly before a time (seconds)."""
        log = dataset.engagements.before(before)
        by_member, members = np.argsort(log.member, kind="stable"), np.arange(len(dataset.members) + 1)
        log_item, log_timestamp = log.item[by_member].astype(np.int64), log.timestamp[by_member]
        log_start = np.searchsorted(log.member[by_member], members)
        first = np.unique(log.member.astype(np.int64) * max(len(dataset.items), 1) + log.item, return_index=True)[1]
        first.sort()  # back to time order, so that the stable sort below keeps it within a member
        order = first[np.argsort(log.member[first], kind="stable")]
        member, timestamp = log.member[order].astype(np.int64), log.timestamp[order]
        start = np.searchsorted(member, members)
        new_moment = np.ones(len(order), bool)
        new_moment[1:] = (member[1:] != member[:-1]) | (timestamp[1:] != timestamp[:-1])
        moment_start = np.maximum.accumulate(np.where(new_moment, np.arange(len(order)), 0))
        item, earlier = log.item[order].astype(np.int64), moment_start - start[member]
        return cls(member, item, timestamp, start, earlier, log_item, log_timestamp, log_start)

    def history(self, member: int, moment: int) -> tuple[Ints, Ints]:
        """Items and times of the history that serving would show of a member (row) at a moment (seconds), oldest first.

        As `retrieval.records.view_of` and `Writer.members` do it: of the newest `NEWEST` engagements strictly before the
        moment, repeats counted, each item where it comes first among these.
        """
        start, stop = self.log_start[member], self.log_start[member + 1]
        stop = start + np.searchsorted(self.log_timestamp[start:stop], moment)
        newest = slice(max(start, stop - records.NEWEST), stop)
        first = np.sort(np.unique(self.log_item[newest], return_index=True)[1])
        return self.log_item[newest][first], self.log_timestamp[newest][first]

    def __len__(self) -> int:
        return len(self.member)

    @property
    def day(self) -> Ints:
        """Days since 1970 (UTC) of each entry."""
        return self.timestamp // DAY


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
