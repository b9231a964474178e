"""How far the log of a synthetic world could take a reader who need not learn what words mean: informed ceilings, no rivals.

Three readers see what the simple baselines see of numbers, and more. One is told the true topics of every post and sums up what
a member liked and was shown. The second is also told every law of the world and what words mean, and believes what a posterior
says of the member's interests. The third is told the true interests. None is told quality, taste, ease or a probability; the
oracle knows all. Legend: n rows, E labelled events, M members, K topics, F formats, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from ranking.told_interests import Belief, Reader
from ranking.told_world import Floats, Ints, Told
from retrieval.data.schema import DAY, Events

TOPICS, LAWS, INTERESTS = TOLD = ("Told topics", "Told laws", "Told interests")
HALF_LIVES = (3.0, 10.0, np.inf)
"""Days after which what a member did counts half."""
WORTH = {"item": 25.0, "author": 60.0, "taste": 5.0, "member": 100.0}
"""How certain each hidden thing is beforehand: one over the variance of its part of the want."""
THINNED = 4
"""Of so many samples one judges the past."""
RATE_PRIOR = 5.0
"""Labels that a member's usual rate is worth in their rate for one format."""


@dataclass(frozen=True)
class Asked:
    """Rows to describe: `event` int64 [n] positions in the log, `day` int64 [n] as of whose start, and `until` int64 [n], the
    second before which labels of that same day count too (the day's first second: none)."""

    event: Ints
    day: Ints
    until: Ints

    def take(self, rows: Ints) -> Asked:
        """Some of the rows."""
        return Asked(self.event[rows], self.day[rows], self.until[rows])

    @classmethod
    def joined(cls, parts: Sequence[Asked]) -> Asked:
        """All rows of several, in order."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class Shown:
    """Events in columns, int64 [E] each; label -1 is unknown."""

    member: Ints
    item: Ints
    time: Ints
    position: Ints
    label: Ints

    @classmethod
    def of(cls, log: Events, event: npt.NDArray[np.integer]) -> Shown:
        """The events at the given positions of a log."""
        held = (log.member, log.item, log.timestamp, log.position, log.label)
        return cls(*(column[event].astype(np.int64) for column in held))

    def take(self, which: npt.NDArray[np.bool_] | Ints) -> Shown:
        """Some of the events."""
        return Shown(*(getattr(self, field.name)[which] for field in fields(self)))


def told_features(told: Told, asked: Asked, progress: Callable[[int, int], None] | None = None) -> dict[str, Floats]:
    """Returns float64 [n, .] per reader of TOLD; what happens on a row's day from `until` on, or later, changes nothing."""
    log, truth = told.dataset.events, told.truth
    past, rows = Shown.of(log, np.flatnonzero(log.label >= 0)), Shown.of(log, asked.event)
    change = truth.theta_last - truth.theta_first
    true = Belief(truth.theta_first[None].astype(np.float32), change[None].astype(np.float32))
    days = np.unique(asked.day).tolist()
    order = np.argsort(asked.day, kind="stable")
    parts: dict[str, list[Floats]] = {LAWS: [], INTERESTS: []}
    for done, (day, belief) in enumerate(Reader(told).beliefs(days)):
        here = order[asked.day[order] == day]
        for name, held in ((LAWS, belief), (INTERESTS, true)):
            parts[name].append(belief_columns(told, held, past, day, rows.take(here), asked.until[here]))
        if progress is not None:
            progress(done + 1, len(days))
    back = np.argsort(order, kind="stable")
    topics = topic_columns(told, past, rows, asked.day)
    laws, interests = (np.concatenate(found)[back] for found in parts.values())
    return {TOPICS: topics, LAWS: np.hstack([topics, laws]), INTERESTS: np.hstack([topics, interests])}


def topic_columns(told: Told, past: Shown, rows: Shown, day: Ints) -> Floats:
    """Float64 [n, .] as of the start of days [n]: how the topics of what a member liked and was shown meet those of the item, by
    half-life; the member's rate for the format; the format."""
    truth = told.truth
    formats = np.eye(len(truth.law.format_extra[0]))
    members, phi, form = len(truth.theta_first), truth.phi[rows.item], formats[truth.format[rows.item]]
    columns = []
    for half in HALF_LIVES:
        passed, liked = _sums(past, truth.phi, rows.member, day, members, 0.5 ** (1 / half))
        shown = passed + liked
        near, seen = (liked * phi).sum(1), (shown * phi).sum(1)
        columns += [near, seen, near / (seen + 1), near / (liked.sum(1) + 1), seen / (shown.sum(1) + 1)]
    passed, liked = _sums(past, formats[truth.format], rows.member, day, members, 1.0)
    usual = (liked.sum(1) + 1) / (liked.sum(1) + passed.sum(1) + RATE_PRIOR)
    good, every = (liked * form).sum(1), ((liked + passed) * form).sum(1)
    return np.column_stack([*columns, (good + RATE_PRIOR * usual) / (every + RATE_PRIOR), every, form])


def _sums(past: Shown, value: Floats, who: Ints, day: Ints, members: int, keep: float) -> tuple[Floats, Floats]:
    """Two float64 [n, C]: sums of the values [N, C] of the items that each asked member passed over and engaged with on days
    before the asked one; each day that has passed makes them count `keep` times as much."""
    found = np.zeros((2, len(who), value.shape[1]))
    running = np.zeros((2, members, value.shape[1]))
    when = past.time // DAY
    for one in range(int(when.min()), int(day.max()) + 1) if len(when) else ():
        asked, new = day == one, when == one
        found[:, asked] = running[:, who[asked]]
        np.add.at(running, (past.label[new], past.member[new]), value[past.item[new]])
        running *= keep
    return found[0], found[1]


def belief_columns(told: Told, belief: Belief, past: Shown, day: int, rows: Shown, until: Ints) -> Floats:
    """Float64 [n, .]: what a belief about interests says of rows as of the start of one day: log odds, fit how sure it is, and
    by how much item, author, format and member have surprised it before."""
    connected = told.connected(rows.member, rows.item, until)
    code = told.code(np.ones(len(until), np.int64), rows.position, rows.item, connected)
    moved = told.moved(rows.time)
    fit = np.stack([told.fit(interest, rows.item) for interest in belief.at(rows.member, moved)])
    weight = _same_day(told, belief, past.take(past.time // DAY == day), day, rows.member, until)
    mean, middle = (weight * told.probability(code, fit)).sum(0), (weight * fit).sum(0)
    spread = np.sqrt(np.maximum((weight * fit**2).sum(0) - middle**2, 0))
    surprises = _surprises(told, belief, past.take(past.time < day * DAY), rows)
    return np.column_stack([np.log(mean / (1 - mean)), middle, spread, *surprises])


def _same_day(told: Told, belief: Belief, today: Shown, day: int, member: Ints, until: Ints) -> Floats:
    """Float64 [S, n]: weight of each sample after the labels that the member gave on this day before `until`."""
    width = DAY + 1
    key = today.member * width + today.time - day * DAY
    order = np.argsort(key, kind="stable")
    said = np.log(_chances(told, belief, today.take(order)))
    running = np.concatenate([np.zeros((len(said), 1)), np.cumsum(said, axis=1, dtype=np.float64)], axis=1)
    begin, end = (np.searchsorted(key[order], member * width + second) for second in (0, until - day * DAY))
    gained = running[:, end] - running[:, begin]
    weight = np.exp(gained - gained.max(0))
    return np.asarray(weight / weight.sum(0))


def _chances(told: Told, belief: Belief, events: Shown) -> npt.NDArray[np.float32]:
    """Float32 [S, E]: the chance of the label that each event has, by sample."""
    connected = told.connected(events.member, events.item, events.time)
    code = told.code(events.label, events.position, events.item, connected)
    moved = told.moved(events.time)
    return np.stack([told.probability(code, told.fit(held, events.item)) for held in belief.at(events.member, moved)])


def _surprises(told: Told, belief: Belief, past: Shown, rows: Shown) -> Iterator[Floats]:
    """Yields float64 [n] for item, author, the member's taste for the format, and member: label minus chance over past events,
    shrunk to an estimate of what is hidden there in the want."""
    truth, formats = told.truth, len(told.truth.law.format_extra[0])
    chance = _chances(told, Belief(belief.first[::THINNED], belief.change[::THINNED]), past).mean(0).astype(np.float64)
    gap, certain = np.where(past.label == 1, 1 - chance, chance - 1), chance * (1 - chance)

    def keys(events: Shown) -> dict[str, Ints]:
        author, taste = truth.author[events.item].astype(np.int64), events.member * formats + truth.format[events.item]
        return {"item": events.item, "author": author, "taste": taste, "member": events.member}

    before, asked = keys(past), keys(rows)
    for name, worth in WORTH.items():
        size = int(max(before[name].max(initial=0), asked[name].max(initial=0))) + 1
        total, sure = (np.bincount(before[name], value, size) for value in (gap, certain))
        yield (total / (sure + worth))[asked[name]]
