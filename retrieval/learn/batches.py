"""Training batches of the dual encoder: members with their targets of one day, and the items that compete for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from retrieval.counts import NEVER, Counts, appeared
from retrieval.data.schema import DAY, MISSING_TIME, Dataset, MemberView
from retrieval.evidence.protocol import engagements
from retrieval.learn.passed import PassedOver
from retrieval.learn.timeline import Ints, Timeline, day_runs
from retrieval.writer import Writer

Bools = npt.NDArray[np.bool_]
KEPT_DAYS = 64
"""Days whose odds stay in memory, 8 bytes an item each."""
MONTH_WEIGHT = 8.0
"""An engagement of the last 30 days heats an item that much less than one of the last 7."""
HardSource = Literal["impressions", "mined"]


@dataclass(frozen=True)
class BatchSettings:
    """How a batch is drawn. `targets`: positives aimed at; `random_items`: easy negatives added on average, from the part of the
    catalogue that had appeared by the batch's day, the share `popular` of them in proportion to the day's popularity.

    `strangers`: columns that stand for what nobody has met by then. A catalogue without times of creation holds items that
    appear with their first engagement, so that every item without counts that training meets is one that is about to be
    chosen, while those not yet met compete in every search. A stranger is another item's words with the numbers of nothing;
    words of unmet items themselves must not be learned as wrong answers.

    `hard`: hard negatives per target, of `hard_from`: passed over in the request of the target, or among the best of the model
    `mine_every` steps ago at most, the first `mine_skip` left out, drawn from the next `mine_window` (none before step
    `mine_every`); each counts as `hard_weight` items. `recency_days`: a day teaches half as often for every so many days that
    it is older than the newest. `share`: the share of members whose engagements are targets; the others still count and lend
    their words.
    """

    targets: int = 160
    targets_per_member: int = 8
    random_items: int = 240
    popular: float = 0.5
    strangers: int = 80
    hard: int = 0
    hard_from: HardSource = "impressions"
    hard_weight: float = 1.0
    mine_every: int = 200
    mine_skip: int = 10
    mine_window: int = 50
    recency_days: float | None = None
    share: float = 1.0

    @property
    def mines(self) -> bool:
        """Whether hard negatives come from the model."""
        return self.hard > 0 and self.hard_from == "mined"


@dataclass(frozen=True)
class Batch:
    """S member rows, P targets, C competing items.

    `member_rows` id rows of S members; target t belongs to member row `owner[t]`, whose state is the mean over its first
    `prefix[t]` tokens (the history strictly before the target); `item_rows` id rows of C items, `positive[t]` the target's
    column; `log_q` float32 [C] log of the probability that the batch holds the column; `hidden` bool [P, C] columns that are
    no negatives for the target: other copies of its item, and items that the member engages with anyway; `target` [P] positions
    in the timeline, `columns` [C] rows of items, `day` the day of the batch.
    """

    member_rows: list[list[int]]
    owner: Ints
    prefix: Ints
    item_rows: list[list[int]]
    positive: Ints
    log_q: npt.NDArray[np.float32]
    hidden: Bools
    target: Ints
    columns: Ints
    day: int


class Sampler:
    """Draws batch number s as a function of (seed, s) alone, so that a resumed run sees the same batches."""

    def __init__(self, dataset: Dataset, writer: Writer, before: int, settings: BatchSettings, seed: int) -> None:
        """Targets and histories are the engagements strictly before `before`; counts are as of each batch's day."""
        self.dataset, self.writer, self.settings, self.seed, self.before = dataset, writer, settings, seed, before
        self.timeline = Timeline.of(dataset, before, whole=writer.whole)
        self.counts = Counts.from_dataset(dataset, before)
        teachers = np.random.default_rng([seed, 6]).random(len(dataset.members)) < settings.share
        taught = np.flatnonzero(teachers[self.timeline.member])
        self.runs = [taught[run] for run in day_runs(self.timeline.day[taught], settings.targets)]
        self._share = self._shares()
        self._passed = PassedOver.of(dataset, self.timeline, before) if settings.hard and not settings.mines else None
        met, first = np.unique(self._codes(np.arange(len(self.timeline.log_item))), return_index=True)
        self._entries = dict(
            zip(met.tolist(), writer.entries(engagements(dataset, dataset.events, self.timeline.log_event[first], {})))
        )
        since = appeared(dataset)
        self._since = np.where(since < before, since // DAY, NEVER)
        self._undated = dataset.items.created_at == MISSING_TIME
        self._odds_of: dict[int, npt.NDArray[np.float64]] = {}

    def there(self, day: int) -> Bools:
        """Bool [N]: the items that had appeared by a day."""
        return self._since <= day

    @cached_property
    def catalogue(self) -> list[list[int]]:
        """Id rows of all N items with the numbers of the last day."""
        rows = np.arange(len(self.dataset.items))
        numbers = self.counts.at(rows, np.full(len(rows), self.before // DAY))
        return self.writer.items([self.dataset.items[row] for row in rows.tolist()], numbers)

    def _shares(self) -> npt.NDArray[np.float64]:
        sizes = np.array([len(run) for run in self.runs], np.float64)
        if self.settings.recency_days is not None and len(sizes):
            day = np.array([np.median(self.timeline.day[run]) for run in self.runs])
            sizes *= 0.5 ** ((day.max() - day) / self.settings.recency_days)
        return sizes / sizes.sum() if len(sizes) else sizes

    def _codes(self, rows: Ints) -> Ints:
        """What tells apart the entries at positions of the log: the item and, in a whole history, what was done."""
        log, events, item = self.timeline.log_event[rows], self.dataset.events, self.timeline.log_item[rows]
        if not self.writer.whole:
            return item
        return item + len(self.dataset.items) * (3 * events.action[log].astype(np.int64) + events.label[log] + 1)

    def batch(self, step: int) -> Batch:
        """Batch number `step`."""
        rng = np.random.default_rng([self.seed, step])
        run = self.runs[int(rng.choice(len(self.runs), p=self._share))]
        members = rng.permutation(np.unique(self.timeline.member[run]))
        chosen = self._targets_of(members, run, rng)
        rows, owner, prefix, target = self._member_side(chosen)
        batch = self._with_items(rows, owner, prefix, target, run, rng)
        return batch if self._passed is None else self.with_hard(batch, self._passed.choose(target, self.settings.hard, rng))

    def with_hard(self, batch: Batch, chosen: Ints) -> Batch:
        """The batch with `chosen` item rows [P, n] (-1 none) as further negatives, each against its own target only.

        With log-Q: a hard item is there because of its target, with probability one, so it stands for itself alone (log q = 0),
        and a drawn copy of it, which would stand for it once more, is hidden from that target. The sum over columns thus
        stays an unbiased estimate of the sum over the catalogue; what is hard is only known exactly instead of by chance. With a
        `hard_weight` above 1 it counts as that many items (log q = - log weight): no estimate any more, but a lesson.
        """
        target, place = np.nonzero(chosen >= 0)
        item = chosen[target, place]
        keys, column = np.unique(item * _SPAN + self.timeline.day[batch.target[target]], return_inverse=True)
        rows, days = keys // _SPAN, keys % _SPAN
        item_rows = self.writer.items([self.dataset.items[row] for row in rows.tolist()], self.counts.at(rows, days))
        hidden = np.concatenate([batch.hidden, np.ones((len(batch.target), len(keys)), bool)], 1)
        for row, hard in zip(target.tolist(), item.tolist()):
            hidden[row, : len(batch.columns)] |= batch.columns == hard
        hidden[target, len(batch.columns) + column] = False
        return replace(
            batch,
            item_rows=[*batch.item_rows, *item_rows],
            log_q=np.concatenate([batch.log_q, np.full(len(keys), -np.log(self.settings.hard_weight), np.float32)]),
            hidden=hidden,
            columns=np.concatenate([batch.columns, rows]),
        )

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
            settled = int(timeline.day[mine[0]]) * DAY
            shown = timeline.shown(member, int(timeline.timestamp[mine[-1]]), settled)
            times, known = timeline.log_timestamp[shown], [self._entries[code] for code in self._codes(shown).tolist()]
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
        odds, unmet = self._odds(day), int((self._undated & (self._since > day)).sum())
        extra = np.flatnonzero(rng.random(len(odds)) < odds)
        known = np.flatnonzero(self.there(day))
        strangers = rng.choice(known, min(self.settings.strangers, unmet, len(known)), replace=False)
        keys = timeline.item[target] * _SPAN + 1 + timeline.day[target]
        keys = np.concatenate([keys, extra * _SPAN + 1 + day, strangers * _SPAN])
        columns, positive = np.unique(keys, return_inverse=True)
        item, item_day, strange = columns // _SPAN, np.maximum(columns % _SPAN - 1, 0), columns % _SPAN == 0
        records = [self.dataset.items[row] for row in item.tolist()]
        item_rows = self.writer.items(records, self.counts.at(item, np.where(strange, _BEFORE_ALL, item_day)))
        # An item that stands in the batch with the numbers of several days is one item: its columns share its weight.
        copies = np.bincount(item, weights=~strange, minlength=len(self.dataset.items))[item]
        log_q = np.log(self._inclusion(item, target, run, odds) * np.maximum(copies, 1))
        if len(strangers):
            log_q[strange] = np.log(len(strangers) / unmet)
        hidden = item[None, :] == timeline.item[target][:, None]
        hidden |= self._engaged_anyway(timeline.member[target], item)
        positive = positive[: len(target)]
        hidden[np.arange(len(target)), positive] = False
        return Batch(rows, owner, prefix, item_rows, positive, log_q.astype(np.float32), hidden, target, item, day)

    def _odds(self, day: int) -> npt.NDArray[np.float64]:
        """Probability [N] with which each item is drawn as an easy negative on a day, each on its own: 0 if it is not there yet.

        Even draws alone meet the hundreds of items that compete for the first hundred places once in fifty batches, and then
        with the weight of all of them.
        """
        if day not in self._odds_of:
            if len(self._odds_of) >= KEPT_DAYS:
                self._odds_of.pop(next(iter(self._odds_of)))
            there = self.there(day)
            rows = np.arange(len(there))
            numbers = self.counts.at(rows, np.full(len(rows), day))
            heat = np.where(there, numbers["n_7d"] + numbers["n_30d"] / MONTH_WEIGHT, 0.0)
            hot = self.settings.popular * self.settings.random_items if heat.any() else 0.0
            odds = (self.settings.random_items - hot) * there / max(there.sum(), 1) + hot * heat / max(heat.sum(), 1.0)
            self._odds_of[day] = np.minimum(odds, 1.0)
        return self._odds_of[day]

    def _inclusion(self, item: Ints, target: Ints, run: Ints, odds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Probability [C] that the batch holds each column: as a target of the run, or as an easy negative (`odds` [N])."""
        in_run = np.bincount(self.timeline.item[run], minlength=len(self.dataset.items))[item]
        share = min(len(target) / len(run), 1 - 1e-6)
        missed_as_target = (1 - share) ** in_run
        return np.maximum(1 - missed_as_target * (1 - odds[item]), 1e-9)

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
_BEFORE_ALL = -(1 << 20)
"""A day before every log: the counts of that day are those of an item that nobody has met."""


def _shown(row: list[int], opening: list[int], known: list[list[int]]) -> int:
    """How many of the newest entries the row holds."""
    left, shown = len(row) - len(opening), 0
    while left > 0:
        shown += 1
        left -= len(known[-shown])
    return shown
