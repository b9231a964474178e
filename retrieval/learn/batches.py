"""Training batches of the dual encoder: members with their targets of one day, and the items that compete for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval.counts import NEVER, Counts, appeared
from retrieval.data.schema import DAY, Dataset, Engagement, MemberView
from retrieval.learn.timeline import Ints, Timeline, day_runs
from retrieval.writer import Writer

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class BatchSettings:
    """How a batch is drawn. `targets`: positives aimed at; `random_items`: easy negatives added, from the part of the catalogue
    that had appeared by the batch's day."""

    targets: int = 160
    targets_per_member: int = 8
    random_items: int = 160


@dataclass(frozen=True)
class Batch:
    """S member rows, P targets, C competing items.

    `member_rows` id rows of S members; target t belongs to member row `owner[t]`, whose state is the mean over its first
    `prefix[t]` tokens (the history strictly before the target); `item_rows` id rows of C items, `positive[t]` the target's
    column; `log_q` float32 [C] log of the probability that the batch holds the column; `hidden` bool [P, C] columns that are
    no negatives for the target: other copies of its item, and items that the member engages with anyway.
    """

    member_rows: list[list[int]]
    owner: Ints
    prefix: Ints
    item_rows: list[list[int]]
    positive: Ints
    log_q: npt.NDArray[np.float32]
    hidden: Bools


class Sampler:
    """Draws batch number s as a function of (seed, s) alone, so that a resumed run sees the same batches."""

    def __init__(self, dataset: Dataset, writer: Writer, before: int, settings: BatchSettings, seed: int) -> None:
        """Targets and histories are the engagements strictly before `before`; counts are as of each batch's day."""
        self.dataset, self.writer, self.settings, self.seed = dataset, writer, settings, seed
        self.timeline = Timeline.of(dataset, before)
        self.counts = Counts.from_dataset(dataset, before)
        self.runs = day_runs(self.timeline.day, settings.targets)
        sizes = np.array([len(run) for run in self.runs], np.float64)
        self._share = sizes / sizes.sum() if len(sizes) else sizes
        met = np.unique(self.timeline.log_item).tolist()
        self._entries = dict(zip(met, writer.entries([Engagement(dataset.items[row], 0, "") for row in met])))
        since = appeared(dataset)
        self._since = np.where(since < before, since // DAY, NEVER)

    def batch(self, step: int) -> Batch:
        """Batch number `step`."""
        rng = np.random.default_rng([self.seed, step])
        run = self.runs[int(rng.choice(len(self.runs), p=self._share))]
        members = rng.permutation(np.unique(self.timeline.member[run]))
        chosen = self._targets_of(members, run, rng)
        rows, owner, prefix, target = self._member_side(chosen)
        return self._with_items(rows, owner, prefix, target, run, rng)

    def _targets_of(self, members: Ints, run: Ints, rng: np.random.Generator) -> list[Ints]:
        """Timeline positions of each drawn member's targets in the run, members drawn until there are enough targets."""
        in_run = np.sort(run)
        owners = self.timeline.member[in_run]
        chosen, total = [], 0
        for member in members.tolist():
            mine = in_run[np.searchsorted(owners, member) : np.searchsorted(owners, member, side="right")]
            if len(mine) > self.settings.targets_per_member:
                mine = np.sort(rng.choice(mine, self.settings.targets_per_member, replace=False))
            chosen.append(mine)
            total += len(mine)
            if total >= self.settings.targets:
                break
        return chosen

    def _member_side(self, chosen: list[Ints]) -> tuple[list[list[int]], Ints, Ints, Ints]:
        """Member rows, and for each kept target its row, its prefix length in tokens and its timeline position.

        A row is what serving would write at the moment of the member's last target, with the connections known at the first. The
        last target sees exactly that; an earlier one sees the part from before its own moment, which can lack the oldest
        entries that serving would still have had room for then. Targets for whom nothing is left of a history are dropped.
        """
        timeline = self.timeline
        rows: list[list[int]] = []
        owner: list[int] = []
        prefix: list[int] = []
        target: list[int] = []
        for mine in chosen:
            member = int(timeline.member[mine[0]])
            opening = self._opening(member, int(timeline.timestamp[mine[0]]))
            items, times = timeline.history(member, int(timeline.timestamp[mine[-1]]))
            known = [self._entries[item] for item in items.tolist()]
            row = self.writer.member(opening, known)
            unseen = len(known) - _shown(row, opening, known)
            ends = len(opening) + np.concatenate([[0], np.cumsum([len(entry) for entry in known[unseen:]])])
            for position in mine.tolist():
                visible = int(np.searchsorted(times[unseen:], timeline.timestamp[position]))
                if visible > 0 or timeline.earlier[position] == 0:
                    owner.append(len(rows))
                    prefix.append(int(ends[visible]))
                    target.append(position)
            rows.append(row)
        return rows, np.array(owner, np.int64), np.array(prefix, np.int64), np.array(target, np.int64)

    def _opening(self, member: int, before: int) -> list[int]:
        view = MemberView(self.dataset.members[member], (), self.dataset.connections_of(member, before))
        return self.writer.profile(view)

    def _with_items(
        self, rows: list[list[int]], owner: Ints, prefix: Ints, target: Ints, run: Ints, rng: np.random.Generator
    ) -> Batch:
        timeline, day = self.timeline, int(np.median(self.timeline.day[target]))
        there = np.flatnonzero(self._since <= day)
        extra = rng.choice(there, min(self.settings.random_items, len(there)), replace=False)
        keys = timeline.item[target] * _SPAN + timeline.day[target]
        keys = np.concatenate([keys, extra * _SPAN + day])
        columns, positive = np.unique(keys, return_inverse=True)
        item, item_day = columns // _SPAN, columns % _SPAN
        records = [self.dataset.items[row] for row in item.tolist()]
        item_rows = self.writer.items(records, self.counts.at(item, item_day))
        log_q = np.log(self._inclusion(item, target, run, len(extra) / len(there), day))
        hidden = item[None, :] == timeline.item[target][:, None]
        hidden |= self._engaged_anyway(timeline.member[target], item)
        positive = positive[: len(target)]
        hidden[np.arange(len(target)), positive] = False
        return Batch(rows, owner, prefix, item_rows, positive, log_q.astype(np.float32), hidden)

    def _inclusion(self, item: Ints, target: Ints, run: Ints, random: float, day: int) -> npt.NDArray[np.float64]:
        """Probability [C] that the batch holds each column: as a target of the run, or, if it is there by the day, as a random
        item, each of which is drawn with probability `random`."""
        in_run = np.bincount(self.timeline.item[run], minlength=len(self.dataset.items))[item]
        share = min(len(target) / len(run), 1 - 1e-6)
        missed_as_target = (1 - share) ** in_run
        missed_as_random = np.where(self._since[item] <= day, 1 - random, 1.0)
        return np.maximum(1 - missed_as_target * missed_as_random, 1e-9)

    def _engaged_anyway(self, member: Ints, item: Ints) -> Bools:
        """Bool [P, C]: the member engages with the column's item at some time before the end of the data used here."""
        timeline = self.timeline
        column_of: dict[int, list[int]] = {}
        for column, row in enumerate(item.tolist()):
            column_of.setdefault(row, []).append(column)
        found = np.zeros((len(member), len(item)), bool)
        for row, who in enumerate(member.tolist()):
            for known in timeline.item[timeline.start[who] : timeline.start[who + 1]].tolist():
                if known in column_of:
                    found[row, column_of[known]] = True
        return found


_SPAN = 1 << 24
"""Larger than any day number, so that item * _SPAN + day is one key."""


def _shown(row: list[int], opening: list[int], known: list[list[int]]) -> int:
    """How many of the newest entries the row holds."""
    left, shown = len(row) - len(opening), 0
    while left > 0:
        shown += 1
        left -= len(known[-shown])
    return shown
