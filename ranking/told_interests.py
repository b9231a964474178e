"""What the log says about every member's interests, to a reader who is told topics, laws and words: samples of a posterior.

One Metropolis chain per member, all in step. A state is two to five interests with weights and the one to which the first
fades. Evidence, all of it before a day: labels, which topics were shown, the profile's words, whom the member knows and what
they wrote themselves. Legend: M members, K topics, P places, S samples, E events, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ranking.told_state import Moves, State
from ranking.told_world import BINS, Floats, Ints, Singles, Told
from retrieval.data.schema import DAY

COMMON = -0.35
"""Topics are drawn by (1 + number) to this power."""
OWN_POWER, STRAY = 1.5, 0.12
"""Members write about their interests to this power, and about anything with this probability."""
ALIKE = 0.75
"""Share of connections that lead to a like interest."""
MAIN = 0.75
"""Mean share of a post's main topic."""
MOVES = ("renew", "replace", "walk", "grow", "replace", "swap")
FIRST_BURN, BURN, SAMPLES, APART = 600, 120, 48, 6
"""Steps before the first day and before each day; samples per day, each so many steps after the one before."""
NEWS = 48
"""Steps after which the others' interests, as believed so far, are looked up again while the chain settles."""
FASHION = 10.0
"""Posts shown on a day that a topic's usual share is worth."""


@dataclass(frozen=True)
class Belief:
    """Samples of what is believed at the start of a day: float32 [S, M, K] each, as `State.interests` gives them."""

    first: Singles
    change: Singles

    def at(self, member: Ints, moved: Singles) -> Iterator[Singles]:
        """Yields float32 [n, K], one per sample: the members' interests when so much has moved."""
        for first, change in zip(self.first, self.change):
            yield first[member] + moved[:, None] * change[member]


@dataclass(frozen=True)
class Known:
    """What was known at the start of a day. Of E events in the members' order: `bound` int64 [M + 1], `main` and `second` int64
    [E] places in a flat [M, K], their shares, `moved` float32 [E] and `code` int64 [E]; `stock` float32 [M, K] and `late`
    float32 [M, 1], the mean of `moved`; `author`, `wrote` int64: members and topics of posts; `one`, `other` int64: edges, both
    ways; `guess` float64 [M, K]: where to look for interests."""

    bound: Ints
    main: Ints
    second: Ints
    share: Singles
    moved: Singles
    code: Ints
    stock: Singles
    late: Singles
    author: Ints
    wrote: Ints
    one: Ints
    other: Ints
    guess: Floats


class Reader:
    """Reads the log of a told world, day by day."""

    def __init__(self, told: Told, seed: int = 0) -> None:
        self.told, self.rng = told, np.random.default_rng([seed, 17])
        log = told.dataset.events
        event = np.flatnonzero(log.label >= 0)
        self.event = event[np.lexsort((log.timestamp[event], log.member[event]))]
        self.members, self.topics = told.truth.theta_first.shape
        self.log_table = np.log(told.table)
        common = (1.0 + np.arange(self.topics)) ** COMMON
        self.common = common / common.sum()
        nothing = np.zeros((self.members, self.topics))
        self.state = Moves(self.rng, self.common, nothing).any_state(self.members)
        self.mean: Singles | None = None
        self.alike = np.zeros((0, self.topics), np.float32)
        self._stocks: dict[int, Floats] = {}

    def beliefs(self, days: Sequence[int]) -> Iterator[tuple[int, Belief]]:
        """Yields each day (since 1970, rising) with samples that rest on events, edges and posts before it.

        The first day is read twice: fashions can be told from what was shown only once the interests are roughly known.
        """
        for turn, day in enumerate(days):
            if not turn:
                self._settle(self.known(day), FIRST_BURN)
            known = self.known(day)
            self._settle(known, BURN)
            first, change = zip(*self._samples(known))
            yield day, Belief(np.stack(first), np.stack(change))

    def known(self, day: int) -> Known:
        """Everything that was known at the start of a day."""
        told, truth, log = self.told, self.told.truth, self.told.dataset.events
        event = self.event[log.timestamp[self.event] < day * DAY]
        member, item, time = log.member[event].astype(np.int64), log.item[event].astype(np.int64), log.timestamp[event]
        counts = np.bincount(member, minlength=self.members)
        moved = told.moved(time)
        connected = told.connected(member, item, time)
        wrote, met = truth.created < day * DAY, truth.edge_since < day * DAY
        ends = np.stack([truth.edge_member[met], truth.edge_other[met]]).astype(np.int64)
        pairs = np.unique(np.concatenate([ends, ends[::-1]], axis=1), axis=1)
        label = log.label[event].astype(np.int64)
        place = member[:, None] * self.topics + told.topic[item]
        return Known(
            bound=np.concatenate([[0], np.cumsum(counts)]),
            main=place[:, 0],
            second=place[:, 1],
            share=told.share[item],
            moved=moved,
            code=told.code(label, log.position[event].astype(np.int64), item, connected),
            stock=self._stock(member, time // DAY, told.topic[item, 0]),
            late=(np.bincount(member, moved, self.members) / np.maximum(counts, 1)).astype(np.float32)[:, None],
            author=np.repeat(truth.author[wrote].astype(np.int64), 2),
            wrote=told.topic[wrote].ravel(),
            one=pairs[0],
            other=pairs[1],
            guess=self._guess(place, label),
        )

    def _stock(self, member: Ints, day: Ints, main: Ints) -> Singles:
        """Float32 [M, K]: `Told.stock` of the days on which each member was shown something, topics in fashion on a day weighing
        more: shown more often than so believed interests explain."""
        total = np.full((self.members, self.topics), 1e-9)
        for one in np.unique(day).tolist():
            if one not in self._stocks:
                self._stocks[one] = self.told.stock(one)
            stock, shown = self._stocks[one], day == one
            times = np.bincount(member[shown], minlength=self.members)
            if self.mean is not None:
                noon = self.told.moved(np.array([one * DAY + DAY // 2]))
                weight = self._weights(self.mean[0] + noon * self.mean[1], stock)
                expected = times @ (weight / weight.sum(1, keepdims=True))
                stock = stock * (np.bincount(main[shown], minlength=self.topics) + FASHION) / (expected + FASHION)
            total += times[:, None] * stock / stock.sum(1, keepdims=True)
        return (total / total.sum(1, keepdims=True)).astype(np.float32)

    def _guess(self, place: Ints, label: Ints) -> Floats:
        """Shares [M, K] by which new interests are proposed: liked and shown topics, the profile, and a little of everything."""
        size = (self.members, self.topics)
        found = np.full(size, 0.3)
        for column, (liked, shown) in enumerate(((0.5, 0.05), (0.15, 0.02))):
            found += np.bincount(place[:, column], liked * label + shown, size[0] * size[1]).reshape(size)
        member, chance = self.told.words
        meant = chance * self.common
        np.add.at(found, member, meant / meant.sum(1, keepdims=True))
        return 0.85 * found / found.sum(1, keepdims=True) + 0.15 / self.topics

    def _settle(self, known: Known, steps: int) -> None:
        """Moves the chain to what is known; while it does, the others' interests are the mean of what was believed of them."""
        mean, seen = np.zeros((2, self.members, self.topics)), 0
        now = self.log_chance(self.state, known)
        for step in range(steps):
            now = self._step(known, now, step)
            if step >= steps // 4 and step % APART == 0:
                mean, seen = mean + np.stack(self.state.interests(self.topics)), seen + 1
            if seen and step % NEWS == NEWS - 1:
                self.mean = (mean / seen).astype(np.float32)
                self.alike = self.mean[0] / self.mean[0].sum(0)
                now = self.log_chance(self.state, known)

    def _samples(self, known: Known) -> Iterator[tuple[Singles, Singles]]:
        now = self.log_chance(self.state, known)
        for step in range(SAMPLES * APART):
            now = self._step(known, now, step)
            if step % APART == APART - 1:
                yield self.state.interests(self.topics)

    def _step(self, known: Known, now: Floats, step: int) -> Floats:
        """One move of every chain; returns the log chance [M] of where they are then."""
        moves = Moves(self.rng, self.common, known.guess)
        state, gain = moves.named(MOVES[step % len(MOVES)])(self.state)
        after = self.log_chance(state, known)
        taken = np.log(self.rng.random(self.members)) < after - now + gain
        self.state = state.where(taken, self.state)
        return np.where(taken, after, now)

    def log_chance(self, state: State, known: Known) -> Floats:
        """Float64 [M]: log likelihood of all that is known, up to a constant."""
        first, change = state.interests(self.topics)
        flat, move = first.ravel(), change.ravel()
        pull = (flat[known.main] + known.moved * move[known.main]) * known.share[:, 0]
        pull += (flat[known.second] + known.moved * move[known.second]) * known.share[:, 1]
        law = self.told.truth.law
        fit = 1 - np.exp2(pull / np.float32(-law.half_affinity))
        said = self.log_table[known.code + (fit * np.float32(BINS - 0.01)).astype(np.int64)] + np.float32(law.show_affinity) * fit
        running = np.concatenate([[0.0], np.cumsum(said, dtype=np.float64)])[known.bound]
        found = np.diff(running) - np.diff(known.bound) * np.log(self._weights(first + known.late * change, known.stock).sum(1))
        member, chance = self.told.words
        found += np.bincount(member, np.log(_mixed(state, member, chance, np.arange(len(member)))), self.members)
        own = first**OWN_POWER
        own /= own.sum(1, keepdims=True)
        said_self = (1 - STRAY) * own[known.author, known.wrote] + STRAY / self.topics
        found += np.bincount(known.author, np.log(said_self), self.members)
        if len(self.alike):
            like = ALIKE * _mixed(state, known.one, self.alike, known.other) + (1 - ALIKE) / self.members
            found += np.bincount(known.one, np.log(like), self.members)
        return found

    def _weights(self, interest: Singles, stock: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """[M, K]: weight with which a stock's topics are shown to such interests, posts taken for typical ones."""
        law = self.told.truth.law
        main = np.exp2(interest * np.float32(-MAIN / law.half_affinity))
        second = (stock * np.exp2(interest * np.float32((MAIN - 1) / law.half_affinity))).sum(1, keepdims=True)
        return np.asarray(stock * np.exp(law.show_affinity * (1 - main * second)))


def _mixed(state: State, member: Ints, chance: Singles, row: Ints) -> Singles:
    """Float32 [T]: each token's chance, given the interests of its member; `chance` float32 [., K] by topic, `row` [T] of it."""
    topics = chance.shape[1]
    flat, begin = chance.ravel(), row * topics
    topic, share = state.topic[member], state.share[member]
    return np.asarray(sum(share[:, place] * flat[begin + topic[:, place]] for place in range(share.shape[1])) + np.float32(1e-12))
