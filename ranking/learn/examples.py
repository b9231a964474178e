"""The event log becomes questions: one member at one moment, the candidates of that time, and what became of them.

A group shares one prefix, so its candidates are scored in one pass in training as in serving. Its history ends strictly
before its first event; each candidate's numbers are as of the start of its own day.

Legend: G groups, n candidates of all groups, E events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ranking.tasks import Task, tasks_of, taught_of
from retrieval.counts import appeared
from retrieval.data.schema import DAY, IMPRESSION, Dataset, Events, action_kind

Ints = npt.NDArray[np.int64]
HELD_BACK = 0.15
"""Share of members that the refit is calibrated on, in the newest days before the test cut."""
SAMPLED = -1
"""Stands for "no event" where a candidate was drawn from the catalogue."""


@dataclass(frozen=True)
class GroupSettings:
    """How events are grouped: a group ends at a day's end once it has `least` candidates, and at `most` in any case.

    Few candidates to a prefix waste computation; many days to a prefix make its history stale. `negatives` catalogue items
    that existed by its day are drawn for each engagement where the folder says nothing about what was not chosen. Negatives of
    a rare action are left out of training until positives are the share `rare` of its answers (0: never); see `thinned`.
    """

    least: int = 8
    most: int = 24
    negatives: int = 4
    rare: float = 0.0


@dataclass(frozen=True)
class Pool:
    """All groups of one task in a window: member, moment int64 [G] (seconds: the history ends before it), start int64 [G+1];
    item, day, event int64 [n] (event SAMPLED = drawn), label int8 [n] (1 or 0)."""

    task: str
    member: Ints
    moment: Ints
    start: Ints
    item: Ints
    day: Ints
    event: Ints
    label: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.member)

    def candidates(self, group: int) -> slice:
        """The positions of a group's candidates."""
        return slice(int(self.start[group]), int(self.start[group + 1]))

    def only(self, kept: npt.NDArray[np.bool_]) -> Pool:
        """The groups [G] that are kept."""
        return self.where(np.repeat(kept, np.diff(self.start)))

    def where(self, kept: npt.NDArray[np.bool_]) -> Pool:
        """The candidates [n] that are kept; a group that loses all of them is left out."""
        columns = {name: getattr(self, name)[kept] for name in ("item", "day", "event", "label")}
        sizes = np.diff(np.concatenate([[0], np.cumsum(kept)])[self.start])
        there = sizes > 0
        start = np.concatenate([[0], np.cumsum(sizes[there])])
        return replace(self, member=self.member[there], moment=self.moment[there], start=start, **columns)


def pools_of(
    dataset: Dataset, tasks: Mapping[str, Task], since: int | None, until: int, settings: GroupSettings, seed: int
) -> dict[str, Pool]:
    """The groups of every task from events with since <= timestamp < until (seconds); tasks without any are left out."""
    # Nothing at or after `until` may decide an answer or a negative; a prefix of the log keeps every event's position.
    dataset = replace(dataset, events=dataset.events.before(until))
    log = dataset.events
    window = np.ones(len(log), bool) if since is None else log.timestamp >= since
    found = {name: _pool(dataset, task, window, settings, seed) for name, task in tasks.items()}
    return {name: pool for name, pool in found.items() if len(pool)}


def thinned(
    pools: Mapping[str, Pool], tasks: Mapping[str, Task], rare: float, seed: int
) -> tuple[dict[str, Pool], dict[str, float]]:
    """The pools with fewer negatives of rare actions, and task -> what that adds to the logit of a trained model.

    Of a task whose positives are less than the share `rare`, each negative stays with the chance w that makes them that share.
    Odds among what stays are 1/w times those of the log: a loss on logit + ln(1/w) leaves a logit that means the log's odds
    (the correction of He et al. 2014, made before training instead of after it).
    """
    found, corrections = dict(pools), dict[str, float]()
    for name, pool in pools.items():
        positives = float(pool.label.mean())
        if tasks[name].asks != "action" or not 0 < positives < rare < 1:
            continue
        kept = positives / (1 - positives) * (1 - rare) / rare
        stays = (pool.label == 1) | (np.random.default_rng([seed, 9]).random(len(pool.label)) < kept)
        found[name], corrections[name] = pool.where(stays), -float(np.log(kept))
    return found, corrections


def sampled(pool: Pool, candidates: int) -> list[tuple[str, int]]:
    """About that many candidates' groups of a pool as (task, group), always the same ones."""
    order = np.random.default_rng(5).permutation(len(pool))
    total = np.cumsum(np.diff(pool.start)[order])
    return [(pool.task, group) for group in np.sort(order[: int(np.searchsorted(total, candidates)) + 1]).tolist()]


def held_back(dataset: Dataset, seed: int) -> npt.NDArray[np.bool_]:
    """Bool [M]: members whose events between the cuts the refit does not learn from, so that it can be calibrated on them."""
    return np.random.default_rng([seed, 6]).random(len(dataset.members)) < HELD_BACK


def taught(dataset: Dataset, pools: Mapping[str, Pool], held: npt.NDArray[np.bool_]) -> dict[str, Pool]:
    """The pools without any event between the cuts of the members `held` (bool [M]): what the refit may learn from.

    Events decide, not groups: a group may begin before the cut and end after it. A drawn candidate goes with its engagement.
    """
    time, cut, found = dataset.events.timestamp, dataset.meta.cut_valid, {}
    for name, pool in pools.items():
        asked = np.maximum.accumulate(np.where(pool.event == SAMPLED, 0, np.arange(len(pool.event))))
        late = time[pool.event[asked]] >= cut
        found[name] = pool.where(~(late & np.repeat(held[pool.member], np.diff(pool.start))))
    return found


def teaches(dataset: Dataset, before: int, tasks: Mapping[str, Task] | None = None) -> bool:
    """Whether anything before a time (seconds) answers one of the tasks, or, without any, one that the folder can teach."""
    known = replace(dataset, events=dataset.events.before(before))
    return any(len(answers(known, task)[0]) for task in (taught_of(tasks) if tasks else tasks_of(known)).values())


def _pool(dataset: Dataset, task: Task, window: npt.NDArray[np.bool_], settings: GroupSettings, seed: int) -> Pool:
    event, label = answers(dataset, task)
    kept = window[event]
    event, label = event[kept], label[kept]
    log = dataset.events
    order = np.argsort(log.member[event], kind="stable")  # the log is in time order, so each member's part is too
    event, label = event[order], label[order]
    member, day = log.member[event].astype(np.int64), log.timestamp[event] // DAY
    start = np.array(_edges(member, day, settings), np.int64)
    first = event[start[:-1]]
    pool = Pool(
        task=task.name,
        member=log.member[first].astype(np.int64),
        moment=log.timestamp[first],
        start=start,
        item=log.item[event].astype(np.int64),
        day=day,
        event=event,
        label=label,
    )
    return _with_negatives(dataset, pool, settings.negatives, seed) if task.asks == "engage" else pool


def answers(dataset: Dataset, task: Task) -> tuple[Ints, npt.NDArray[np.int8]]:
    """The events [n] that a task asks about, in time order, and the answers int8 [n].

    For a task on labels every labelled event; for an action every impression of a known request, positive if that member
    did that to that item in that request; for "engage" each member's first engagement with each item, all positive. Only
    events of the task's surface are asked about, if it names one.
    """
    event, label = _any_answers(dataset, task)
    if not task.surface:
        return event, label
    log = dataset.events
    there = log.surface[event] == (log.surfaces.index(task.surface) if task.surface in log.surfaces else -2)
    return event[there], label[there]


def _any_answers(dataset: Dataset, task: Task) -> tuple[Ints, npt.NDArray[np.int8]]:
    """The answers of any surface."""
    log = dataset.events
    if task.asks == "label":
        event = np.flatnonzero(log.label >= 0)
        return event, (log.label[event] == task.label).astype(np.int8)
    if task.asks == "engage":
        engaged = np.flatnonzero(dataset.is_engagement)
        pair = log.member[engaged].astype(np.int64) * max(len(dataset.items), 1) + log.item[engaged]
        event = engaged[np.sort(np.unique(pair, return_index=True)[1])]
        return event, np.ones(len(event), np.int8)
    shown = log.actions.index(IMPRESSION) if IMPRESSION in log.actions else -1
    event = np.flatnonzero((log.action == shown) & (log.request >= 0))
    wanted = np.array([action_kind(action) == task.action for action in log.actions], bool)
    did = np.flatnonzero(wanted[log.action] & (log.request >= 0))
    return event, np.isin(shown_key(log, event), shown_key(log, did)).astype(np.int8)


def shown_key(log: Events, event: Ints) -> npt.NDArray[np.void]:
    """One comparable value for (request, member, item) of each event."""
    columns = np.stack([log.request[event], log.member[event], log.item[event]], 1).astype(np.int32)
    return np.ascontiguousarray(columns).view(np.dtype((np.void, 12)))[:, 0]


def _edges(member: Ints, day: Ints, settings: GroupSettings) -> list[int]:
    """Bounds [G+1] of groups over candidates sorted by member, then time."""
    edges = [0]
    for row in range(1, len(member)):
        size = row - edges[-1]
        new_day = day[row] != day[row - 1]
        if member[row] != member[row - 1] or size >= settings.most or (new_day and size >= settings.least):
            edges.append(row)
    if len(member):
        edges.append(len(member))
    return edges


def _with_negatives(dataset: Dataset, pool: Pool, negatives: int, seed: int) -> Pool:
    """The pool with `negatives` random items of that day after each positive, never one that the member engaged with."""
    rng = np.random.default_rng([seed, 3])
    n_items = len(dataset.items)
    log = dataset.engagements
    known = np.unique(log.member.astype(np.int64) * n_items + log.item)
    owner = np.repeat(pool.member, np.diff(pool.start))
    first_day = appeared(dataset) // DAY
    order = np.argsort(first_day, kind="stable")
    there = np.searchsorted(first_day[order], pool.day, side="right")  # at least the event's own item
    drawn = order[(rng.random((len(owner), negatives)) * there[:, None]).astype(np.int64)]
    free = ~np.isin(owner[:, None] * n_items + drawn, known)
    keep = np.concatenate([np.ones((len(owner), 1), bool), free], axis=1)
    width = keep.shape[1]
    counts = np.concatenate([[0], np.cumsum(keep.sum(1))])
    label = np.zeros(keep.shape, np.int8)
    label[:, 0] = 1
    event = np.full(keep.shape, SAMPLED, np.int64)
    event[:, 0] = pool.event
    return Pool(
        task=pool.task,
        member=pool.member,
        moment=pool.moment,
        start=counts[pool.start],
        item=np.concatenate([pool.item[:, None], drawn], axis=1)[keep],
        day=np.repeat(pool.day[:, None], width, axis=1)[keep],
        event=event[keep],
        label=label[keep],
    )
