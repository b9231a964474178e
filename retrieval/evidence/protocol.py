"""Which questions the evaluation asks: "last after the cut", on the test window or one window earlier.

A query is one member at one moment: the last time point at or after the cut at which the member engages with an item that is
new to them, provided that they did something strictly earlier. Its targets are the new items of that time point; its history
is every strictly earlier engagement, also one after the cut; its candidates are the whole catalogue minus the history. The
validation window asks the same between the two cuts and never sees an event at or after the test cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from retrieval.data.meta import uncounted
from retrieval.data.schema import DAY, Dataset, Engagement, Events, Item, MemberView
from retrieval.evidence.ragged import Ints, Ragged
from retrieval.moments import moment_words

Window = Literal["valid", "test"]


class EvidenceError(BrewlineError):
    """An evaluation cannot be done, or what was handed to it cannot be judged."""


@dataclass(frozen=True)
class Queries:
    """B questions and what is known about each.

    member int32 [B] (row of Members), timestamp int64 [B]; `targets` and `excluded` hold rows of Items; `history` holds
    positions in `events`, oldest first. `events` are the engagements of the window's log (before the test cut for "valid"),
    `cut` the moment where frozen knowledge ends, `left_out` the members after the cut who had no history.
    """

    window: Window
    cut: int
    events: Events
    member: npt.NDArray[np.int32]
    timestamp: npt.NDArray[np.int64]
    targets: Ragged
    history: Ragged
    excluded: Ragged
    left_out: int

    def __len__(self) -> int:
        return len(self.member)

    @property
    def day(self) -> npt.NDArray[np.int64]:
        """Int64 [B]: days since 1970 (UTC) of the queries."""
        return self.timestamp // DAY

    def take(self, which: Ints | slice) -> Queries:
        """The queries at the given positions, in the given order; `left_out` stays that of the whole window."""
        rows = np.arange(len(self))[which]
        return replace(
            self,
            member=self.member[rows],
            timestamp=self.timestamp[rows],
            targets=self.targets.take(rows),
            history=self.history.take(rows),
            excluded=self.excluded.take(rows),
        )

    def sample(self, at_most: int) -> Queries:
        """All queries if there are few enough, else evenly spaced ones in order of time: no chance, no order of rows."""
        if len(self) <= at_most:
            return self
        in_time = np.lexsort((self.targets.values[self.targets.start[:-1]], self.timestamp))
        return self.take(np.sort(in_time[np.linspace(0, len(self) - 1, at_most).round().astype(np.int64)]))


def last_after_cut(dataset: Dataset, window: Window = "test") -> Queries:
    """Returns the queries of a window, in the order of Members rows.

    Raises EvidenceError if the window asks nothing (no events, or nobody with a history comes back after the cut).
    """
    log = dataset.engagements
    if window == "valid":
        log = log.before(dataset.meta.cut_test)
    cut = dataset.meta.cut_test if window == "test" else dataset.meta.cut_valid
    queries = _queries(log, window, cut, len(dataset.members), len(dataset.items))
    if not len(queries):
        raise EvidenceError(f"The {window} window of {dataset.meta.name} asks no question: {_why_none(dataset, log, queries)}")
    return queries


def _why_none(dataset: Dataset, log: Events, queries: Queries) -> str:
    """What a window without a question has, and what would help."""
    if not len(dataset.events):
        return "the folder has no interactions. Models learn from its texts; judging retrieval needs interactions.parquet."
    timed = dataset.meta.order == "timestamp"
    last = f", the last of them at {moment_words(int(log.timestamp[-1]))}" if timed and len(log) else ""
    cut = f" ({moment_words(queries.cut)})" if timed else ""
    return uncounted(dataset) or (
        f"{len(log)} engagements{last}, and from the cut{cut} on {queries.left_out} members touch a new "
        "item, none of whom has a history. Move the cuts or add events."
    )


def _queries(log: Events, window: Window, cut: int, members: int, items: int) -> Queries:
    """The queries of a log that is in time order (possibly none)."""
    first = np.zeros(len(log), bool)
    first[np.unique(log.member.astype(np.int64) * max(items, 1) + log.item, return_index=True)[1]] = True
    asked = first & (log.timestamp >= cut)
    moment = np.full(members, np.iinfo(np.int64).min)
    np.maximum.at(moment, log.member[asked], log.timestamp[asked])
    earlier = log.timestamp < moment[log.member]
    has_query = np.bincount(log.member[asked], minlength=members) > 0
    has_history = np.bincount(log.member[earlier], minlength=members) > 0
    who = np.flatnonzero(has_query & has_history)
    row_of = np.full(members, -1)
    row_of[who] = np.arange(len(who))
    target = asked & (log.timestamp == moment[log.member]) & (row_of[log.member] >= 0)
    past = np.flatnonzero(earlier & (row_of[log.member] >= 0))
    history = Ragged.from_pairs(row_of[log.member[past]], past, len(who))
    return Queries(
        window=window,
        cut=cut,
        events=log,
        member=who.astype(np.int32),
        timestamp=moment[who],
        targets=Ragged.from_pairs(row_of[log.member[target]], log.item[target], len(who)),
        history=history,
        excluded=Ragged(history.start, log.item[history.values].astype(np.int64)).distinct(),
        left_out=int((has_query & ~has_history).sum()),
    )


def cold_items(queries: Queries, items: int) -> npt.NDArray[np.bool_]:
    """Bool [N]: the items that nobody had engaged with before the cut."""
    return popularity_before_cut(queries, items) == 0


def popularity_before_cut(queries: Queries, items: int) -> npt.NDArray[np.int64]:
    """Int64 [N]: engagements of each item before the cut."""
    log = queries.events
    return np.bincount(log.item[log.timestamp < queries.cut], minlength=items)


def cold_members(queries: Queries) -> npt.NDArray[np.bool_]:
    """Bool [B]: members whose whole history lies at or after the cut."""
    oldest = queries.history.values[queries.history.start[:-1]]
    return queries.events.timestamp[oldest] >= queries.cut


def member_views(dataset: Dataset, queries: Queries, newest: int | None = None) -> list[MemberView]:
    """Returns what a prompt may know of each queried member at the moment of the query, one view per query.

    `newest` keeps only that many of the latest engagements: a prompt has a token budget, records cost memory.
    """
    records: dict[int, Item] = {}
    return [_view(dataset, queries, row, newest, records) for row in range(len(queries))]


def _view(dataset: Dataset, queries: Queries, row: int, newest: int | None, records: dict[int, Item]) -> MemberView:
    past = queries.history[row]
    past = past if newest is None else past[max(len(past) - newest, 0) :]
    member = int(queries.member[row])
    return MemberView(
        member=dataset.members[member],
        history=engagements(dataset, queries.events, past, records),
        connections=dataset.connections_of(member, before=int(queries.timestamp[row])),
    )


def engagements(dataset: Dataset, log: Events, which: Ints, records: dict[int, Item]) -> Sequence[Engagement]:
    """Returns the events of a log at the given positions as records; `records` caches item records between calls."""
    found = []
    for at in which.tolist():
        item = int(log.item[at])
        if item not in records:
            records[item] = dataset.items[item]
        label = int(log.label[at])
        action = log.actions[int(log.action[at])]
        found.append(Engagement(records[item], int(log.timestamp[at]), action, None if label < 0 else label))
    return found
