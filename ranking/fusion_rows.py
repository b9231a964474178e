"""The features of late fusion for events of a log: at each moment what the service would have known then.

Numbers are as of the start of a candidate's day, the history ends strictly before the group's moment. Legend: n candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ranking.fusion import FusionError
from ranking.fusion_features import NEWEST, RATE, Asked, Facts, Features, Floats, connected_to, feature_names, features
from ranking.learn.examples import Pool
from ranking.prompts import relations_of
from ranking.tasks import LABEL
from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset, Engagement, Item, MemberView
from retrieval.pooled_rate import POOLED, PooledRates

if TYPE_CHECKING:
    from retrieval.encoder import Encoder

LAGGED = 0.3
"""Share of training events that are seen with older knowledge, so that the head also knows members who were away and numbers
that stand still."""
LAG_DAYS = 30
GROUPS_AT_ONCE = 512


class FeatureRows:
    """Features of groups of a data folder, nothing at or after `before` (seconds) counted in its numbers."""

    def __init__(self, dataset: Dataset, before: int, base: float, static: Sequence[str] | None = None) -> None:
        """`base` is the rate of an item without labels; `static` the items' own numbers that are read (None: all).

        Raises FusionError if the folder's items lack one of them.
        """
        self.dataset, self.base = dataset, base
        self.static = tuple(dataset.items.numbers if static is None else static)
        missing = [name for name in self.static if name not in dataset.items.numbers]
        if missing:
            raise FusionError(f"{dataset.meta.name}: its items have no numbers {', '.join(missing)}, which the head reads")
        self.counts, self._before = Counts.from_dataset(dataset, before), before
        self._log = dataset.engagements
        self._order = np.argsort(self._log.member, kind="stable")
        self._bounds = np.searchsorted(self._log.member[self._order], np.arange(len(dataset.members) + 1))
        self._records: dict[int, Item] = {}

    def of(self, pool: Pool, groups: Sequence[int], cosine: Floats | None = None) -> Features:
        """Returns float32 [n, F] of the candidates of the chosen groups in order; `cosine` float64 [n], None unknown."""
        parts, place = [np.zeros((0, len(feature_names(self.static))), np.float32)], 0
        for begin in range(0, len(groups), GROUPS_AT_ONCE):
            chosen = groups[begin : begin + GROUPS_AT_ONCE]
            size = sum(len(pool.item[pool.candidates(group)]) for group in chosen)
            said = np.full(size, np.nan) if cosine is None else cosine[place : place + size]
            parts += [features(asked, self.static, self.base) for asked in self._asked(pool, chosen, said)]
            place += size
        return np.concatenate(parts)

    @cached_property
    def _pooled(self) -> PooledRates:
        """Nobody who asks for cosines alone waits for it."""
        return PooledRates.from_dataset(self.dataset, self._before)

    def _asked(self, pool: Pool, groups: Sequence[int], cosine: Floats) -> Iterator[Asked]:
        """What is known in each group; the numbers of all of them are looked up in one go."""
        pasts = [self._past(int(pool.member[group]), int(pool.moment[group])) for group in groups]
        held = np.concatenate([self._log.item[rows] for rows in pasts])
        day = np.repeat(pool.moment[groups] // DAY, [len(rows) for rows in pasts])
        rates = np.split(self.counts.at(held, day)[RATE], np.cumsum([len(rows) for rows in pasts])[:-1])
        where = np.concatenate([np.arange(pool.start[group], pool.start[group + 1]) for group in groups])
        numbers = self.counts.at(pool.item[where], pool.day[where])
        numbers[POOLED] = self._pooled.at(pool.item[where], pool.day[where])
        numbers |= {name: self.dataset.items.numbers[name][pool.item[where]] for name in self.static}
        items, place = self.dataset.items, 0
        for group, rows, rate in zip(groups, pasts, rates):
            offered = pool.item[pool.candidates(group)].tolist()
            part = slice(place, place + len(offered))
            facts = Facts(
                {name: column[part] for name, column in numbers.items()},
                [items.category[row] for row in offered],
                [items.creator[row] for row in offered],
            )
            moment = int(pool.moment[group])
            edges = self.dataset.connections_of(int(pool.member[group]), moment)
            connected = connected_to(relations_of(edges, facts.creator))
            yield Asked(moment, [self._engagement(row) for row in rows.tolist()], rate, facts, connected, cosine[part])
            place = part.stop

    def cosines(self, pool: Pool, groups: Sequence[int], encoder: Encoder) -> Floats:
        """Returns float64 [n]: what an encoder's first stage says of the candidates of the chosen groups at those moments."""
        sizes = [int(pool.start[group + 1] - pool.start[group]) for group in groups]
        where = np.concatenate([np.arange(pool.start[group], pool.start[group + 1]) for group in groups])
        asked = np.stack([pool.item[where], pool.day[where]], 1)
        distinct, back = np.unique(asked, axis=0, return_inverse=True)
        records = [self.dataset.items[row] for row in distinct[:, 0].tolist()]
        vectors = encoder.items(records, self.counts.at(distinct[:, 0], distinct[:, 1]))[back.reshape(-1)]
        members = encoder.members([self._view(int(pool.member[group]), int(pool.moment[group])) for group in groups])
        return np.asarray((vectors * np.repeat(members, sizes, axis=0)).sum(1), np.float64)

    def _view(self, member: int, moment: int) -> MemberView:
        past = [self._engagement(row) for row in self._past(member, moment).tolist()]
        return MemberView(self.dataset.members[member], past, self.dataset.connections_of(member, moment))

    def _past(self, member: int, moment: int) -> npt.NDArray[np.int64]:
        """Places in the log of the member's newest engagements before a moment, oldest first."""
        rows = self._order[self._bounds[member] : self._bounds[member + 1]]
        return rows[: np.searchsorted(self._log.timestamp[rows], moment)][-NEWEST:]

    def _engagement(self, row: int) -> Engagement:
        log, item = self._log, int(self._log.item[row])
        if item not in self._records:
            self._records[item] = self.dataset.items[item]
        label = int(log.label[row])
        action = log.actions[int(log.action[row])]
        return Engagement(self._records[item], int(log.timestamp[row]), action, None if label < 0 else label)


def base_rate(dataset: Dataset, before: int) -> float:
    """Share of positive labels before a time (seconds), kept off 0 and 1; .5 if there are none."""
    known = dataset.events.before(before)
    labels = known.label[known.label >= 0]
    return float(np.clip(labels.mean(), 0.01, 0.99)) if len(labels) else 0.5


def training_pool(dataset: Dataset, before: int, most: int, seed: int) -> Pool:
    """The newest labelled events before a time (seconds), at most so many, each a group of its own at its own moment.

    A share of them (LAGGED) is asked up to LAG_DAYS earlier.
    """
    log = dataset.events.before(before)
    event = np.flatnonzero(log.label >= 0)[-most:]
    rng = np.random.default_rng([seed, 12])
    lag = np.where(rng.random(len(event)) < LAGGED, rng.integers(0, LAG_DAYS * DAY, len(event)), 0)
    moment = log.timestamp[event] - lag
    return Pool(
        task=LABEL,
        member=log.member[event].astype(np.int64),
        moment=moment,
        start=np.arange(len(event) + 1),
        item=log.item[event].astype(np.int64),
        day=moment // DAY,
        event=event,
        label=log.label[event],
    )
