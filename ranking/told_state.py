"""One state of every member's interests, and the moves that lead from it to another.

Legend: M members, K topics, P places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

FEWEST, PLACES = 2, 5
"""Interests of a member; place PLACES of `State.topic` is the one that comes."""
LEAST_WEIGHT = 0.35
STRIDE = 0.35
"""Standard deviation of a walk in the log of what a weight has above LEAST_WEIGHT."""


@dataclass(frozen=True)
class State:
    """number int64 [M] of interests; topic int64 [M, P + 1], the fading one first; weight float64 [M, P], not normalised. What
    stands past `number` means nothing."""

    number: Ints
    topic: Ints
    weight: Floats

    @cached_property
    def share(self) -> Singles:
        """Float32 [M, P]: the weights as shares, 0 past `number`."""
        held = np.where(np.arange(PLACES) < self.number[:, None], self.weight, 0)
        return (held / held.sum(1, keepdims=True)).astype(np.float32)

    def interests(self, topics: int) -> tuple[Singles, Singles]:
        """Float32 [M, K] each: the interests at the start, and what they would change by if all of the first faded."""
        row = np.arange(len(self.number))
        first, change = np.zeros((2, len(row), topics), np.float32)
        for place in range(PLACES):
            first[row, self.topic[:, place]] += self.share[:, place]
        change[row, self.topic[:, PLACES]] += self.share[:, 0]
        change[row, self.topic[:, 0]] -= self.share[:, 0]
        return first, change

    @cached_property
    def held(self) -> Bools:
        """Bool [M, P + 1]: which places of `topic` mean something."""
        places = np.arange(PLACES + 1)
        return (places < self.number[:, None]) | (places == PLACES)

    def holds(self, topic: Ints) -> Bools:
        """Bool [M, P + 1]: where a member's state has this topic [M]."""
        return (self.topic == topic[:, None]) & self.held

    def mass(self, common: Floats) -> Floats:
        """Float64 [M]: the share [K] of all topics that the state holds, for no topic is dealt twice."""
        return np.where(self.held, common[self.topic], 0).sum(1)

    def where(self, taken: Bools, other: State) -> State:
        """This state for the members of a mask [M], the other one for the rest."""
        return State(
            np.where(taken, self.number, other.number),
            np.where(taken[:, None], self.topic, other.topic),
            np.where(taken[:, None], self.weight, other.weight),
        )


@dataclass(frozen=True)
class Moves:
    """Proposals: `common` float64 [K] shares by which the world deals topics, `guess` float64 [M, K] those by which new ones are
    tried. Each move returns a state and float64 [M], the log of prior and proposal ratios; -inf where it is impossible."""

    rng: np.random.Generator
    common: Floats
    guess: Floats

    def any_state(self, members: int) -> State:
        """A state drawn from the world's own laws."""
        order = np.argsort(self.rng.exponential(size=(members, len(self.common))) / self.common, axis=1)
        number = self.rng.integers(FEWEST, PLACES + 1, members)
        return State(number, order[:, : PLACES + 1], LEAST_WEIGHT + self.rng.exponential(size=(members, PLACES)))

    def renew(self, state: State) -> tuple[State, Floats]:
        """One weight is drawn anew from the world's law."""
        row, place = self._place(state.number)
        weight = state.weight.copy()
        weight[row, place] = LEAST_WEIGHT + self.rng.exponential(size=len(row))
        return State(state.number, state.topic, weight), np.zeros(len(row))

    def walk(self, state: State) -> tuple[State, Floats]:
        """One weight changes a little."""
        row, place = self._place(state.number)
        weight, stride = state.weight.copy(), STRIDE * self.rng.standard_normal(len(row))
        above = weight[row, place] - LEAST_WEIGHT
        weight[row, place] = LEAST_WEIGHT + above * np.exp(stride)
        return State(state.number, state.topic, weight), stride - above * np.expm1(stride)

    def swap(self, state: State) -> tuple[State, Floats]:
        """Another interest becomes the one that fades."""
        row, place = self._place(state.number)
        topic, weight = state.topic.copy(), state.weight.copy()
        topic[row, place], topic[:, 0] = state.topic[:, 0], state.topic[row, place]
        weight[row, place], weight[:, 0] = state.weight[:, 0], state.weight[row, place]
        return State(state.number, topic, weight), np.zeros(len(row))

    def replace(self, state: State) -> tuple[State, Floats]:
        """One interest, or the one that comes, becomes another topic; one that is held already changes places with it."""
        row, place = self._place(state.number + 1)
        place = np.where(place == state.number, PLACES, place)
        new, old = self._topic(), state.topic[row, place]
        at = state.holds(new)
        held = at.any(1)
        topic = state.topic.copy()
        topic[row, place] = new
        topic[row[held], at.argmax(1)[held]] = old[held]
        gain = np.log(self.common[new] * self.guess[row, old] / (self.common[old] * self.guess[row, new]))
        return State(state.number, topic, state.weight), np.where(held, 0, gain)

    def grow(self, state: State) -> tuple[State, Floats]:
        """One interest more or less."""
        members = len(state.number)
        row, drop = self._place(state.number)
        more, add, new = self.rng.random(members) < 0.5, self._place(state.number + 1)[1], self._topic()
        fresh = LEAST_WEIGHT + self.rng.exponential(size=members)
        possible = np.where(more, (state.number < PLACES) & ~state.holds(new).any(1), state.number > FEWEST)
        topic, weight = state.topic.copy(), state.weight.copy()
        gone, last = state.topic[row, drop], np.minimum(state.number, PLACES - 1)
        grown, shrunk = row[more & possible], row[~more & possible]
        topic[grown, last[grown]], weight[grown, last[grown]] = topic[grown, add[grown]], weight[grown, add[grown]]
        topic[grown, add[grown]], weight[grown, add[grown]] = new[grown], fresh[grown]
        end = state.number[shrunk] - 1
        topic[shrunk, drop[shrunk]], weight[shrunk, drop[shrunk]] = topic[shrunk, end], weight[shrunk, end]
        proposed = State(state.number + np.where(possible, np.where(more, 1, -1), 0), topic, weight)
        left = 1 - np.where(more, state.mass(self.common), proposed.mass(self.common))
        changed = np.where(more, new, gone)
        gain = np.where(more, 1, -1) * np.log(self.common[changed] / (left * self.guess[row, changed]))
        return proposed, np.where(possible, gain, -np.inf)

    def named(self, name: str) -> Callable[[State], tuple[State, Floats]]:
        """A move by its name."""
        moves = {"renew": self.renew, "walk": self.walk, "swap": self.swap, "replace": self.replace, "grow": self.grow}
        return moves[name]

    def _place(self, number: Ints) -> tuple[Ints, Ints]:
        return np.arange(len(number)), (self.rng.random(len(number)) * number).astype(np.int64)

    def _topic(self) -> Ints:
        drawn = (np.cumsum(self.guess, axis=1) < self.rng.random(len(self.guess))[:, None]).sum(1)
        return np.asarray(np.minimum(drawn, len(self.common) - 1), np.int64)
