"""Waiting in line, computed: distributions of seconds on a grid, one queue before c workers, and workers that take batches.

Waits are those of Pollaczek and Khinchine (M/G/1: a geometric number of residual services), stretched to c workers by Erlang's
probability of waiting, which is exact for M/M/c and for M/G/1. A worker that takes all that waits (at most `most`) is a Markov
chain over what waits when a batch ends.

Legend: rate in requests per second; cells of `step` seconds; cell i stands for the seconds around i * step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from index.errors import BrewlineError

CELLS = 4_000
"""Cells that a distribution may have; what lies beyond is later than all (`Times.quantile` is then infinite)."""
MOMENTS = 8
"""Moments of a batch at which a request may come that are told apart."""
REACH = 4
"""Full batches that may wait in the chain; a line that gets longer is one that has no end."""


class CapacityError(BrewlineError):
    """The load cannot be borne by these workers, or a figure of the question makes no sense."""


@dataclass(frozen=True, eq=False)
class Times:
    """A distribution of seconds: `mass[i]` is the probability of i * step; what is missing to 1 lies beyond the last cell."""

    step: float
    mass: np.ndarray

    @property
    def mean(self) -> float:
        """Mean seconds of what lies within the cells."""
        return float(self.mass @ np.arange(len(self.mass))) * self.step

    def quantile(self, share: float) -> float:
        """The least seconds within which this share lies; infinite if that is beyond the last cell."""
        at = int(np.searchsorted(np.cumsum(self.mass), share - 1e-12))
        return at * self.step if at < len(self.mass) else math.inf

    def later(self, seconds: float) -> float:
        """The share that takes longer than so many seconds."""
        return float(max(0.0, 1 - self.mass[: int(seconds / self.step) + 1].sum()))

    def at(self, shares: np.ndarray) -> np.ndarray:
        """The seconds [n] within which these shares [n], in [0, 1), lie: evenly drawn shares draw from the distribution."""
        below = np.cumsum(self.mass)
        return np.searchsorted(below, shares * below[-1], side="right") * self.step

    def then(self, other: Times) -> Times:
        """One after the other, independent of each other; the coarser grid of both."""
        step = max(self.step, other.step)
        return Times(step, np.convolve(self.on(step).mass, other.on(step).mass)[:CELLS])

    def slowest(self, of: int) -> Times:
        """The latest of so many independent ones."""
        return Times(self.step, np.diff(np.cumsum(self.mass) ** of, prepend=0.0))

    def on(self, step: float) -> Times:
        """The same on another grid, with the same mean."""
        return self if step == self.step else spread(np.arange(len(self.mass)) * self.step, self.mass, step)


def spread(seconds: np.ndarray, mass: np.ndarray, step: float) -> Times:
    """A distribution of these values [n] with these probabilities [n]; each is shared out between the two cells around it."""
    place = seconds / step
    low = np.minimum(np.floor(place), CELLS).astype(np.int64)
    high = np.clip(place - low, 0, 1)
    cells = np.bincount(low, mass * (1 - high), CELLS + 2) + np.bincount(low + 1, mass * high, CELLS + 2)
    return Times(step, cells[:CELLS])


def constant(seconds: float, step: float) -> Times:
    """Always the same."""
    return spread(np.array([seconds]), np.ones(1), step)


def mixed(parts: Sequence[Times], shares: Sequence[float]) -> Times:
    """One of several on one grid, each with its probability."""
    return Times(parts[0].step, sum((share * one.mass for one, share in zip(parts, shares)), np.zeros(CELLS)))


def lognormal(mean: float, variation: float, step: float) -> Times:
    """Skewed to the right: this mean, and this standard deviation over the mean. 0 is constant."""
    if not variation:
        return constant(mean, step)
    sigma = math.sqrt(math.log1p(variation**2))
    shares = (np.arange(512) + 0.5) / 512
    bell = np.array([NormalDist().inv_cdf(share) for share in shares])
    values = np.exp(sigma * bell)
    return spread(values * (mean / values.mean()), np.full(512, 1 / 512), step)


def must_wait(load: float, workers: int) -> float:
    """Erlang's C: the probability that all of c workers are busy where work of `load` worker-seconds comes each second.

    Raises CapacityError if they can never catch up.
    """
    if not 0 <= load < workers:
        raise CapacityError(f"{load:.2f} worker-seconds of work come each second, {workers} workers bear less than {workers}")
    blocked = 1.0
    for number in range(1, workers + 1):
        blocked = load * blocked / (number + load * blocked)
    return blocked / (1 - load / workers * (1 - blocked))


def waits(rate: float, service: Times, workers: int = 1) -> Times:
    """How long a request of a Poisson stream stands in one line before so many workers. Raises CapacityError."""
    load = rate * service.mean
    busy = load / workers
    stands = must_wait(load, workers)
    step = service.step / workers
    beyond = np.clip(1 - np.cumsum(service.mass), 0, None)
    residual = (beyond + np.append(0.0, beyond[:-1])) / 2 * (service.step / service.mean)  # half to either end of a cell
    found = np.empty(len(residual))
    found[0] = (1 - busy) / (1 - busy * residual[0])
    for cell in range(1, len(found)):
        found[cell] = busy * (residual[1 : cell + 1] @ found[cell - 1 :: -1]) / (1 - busy * residual[0])
    late = found * (stands / busy)
    late[0] = 1 - stands / busy * (1 - found[0])
    return Times(step, late).on(service.step)


def let_in(wait: Times, busy: float, most_s: float) -> tuple[Times, float]:
    """The waits of those who are let in where nobody waits longer than `most_s`, and the share who are not.

    Below the bound an M/G/1 line stands as often at each length as without one, in proportion (Gavish and Schweitzer 1977);
    `wait` is that without, for a worker who would be busy this share of time.
    """
    inside = wait.mass[: int(most_s / wait.step) + 1]
    within = float(inside.sum())
    refused = (1 - busy) * (1 - within) / (1 - busy + busy * within)
    return Times(wait.step, inside / within), max(refused, 0.0)


@dataclass(frozen=True)
class Batches:
    """A worker that takes up to `most` requests at once, in `fixed + each * b` seconds for b of them."""

    fixed: float
    each: float
    most: int

    def seconds(self, together: int) -> float:
        """Seconds of so many at once."""
        return self.fixed + self.each * together

    @property
    def most_rate(self) -> float:
        """Requests a second of a worker that is never idle."""
        return self.most / self.seconds(self.most)


def batched(rate: float, work: Batches, step: float) -> tuple[Times, float]:
    """Seconds from coming to answered of a Poisson stream at one such worker, and the share of time that it works.

    A request's place in line is taken to be the expected one. Raises CapacityError.
    """
    if rate >= work.most_rate:
        raise CapacityError(f"{rate:.1f} requests a second come, a worker bears less than {work.most_rate:.1f}")
    states = REACH * work.most
    taken = np.minimum(np.maximum(np.arange(states), 1), work.most)
    lasting = work.fixed + work.each * taken
    left = np.maximum(np.arange(states) - work.most, 0)
    coming = np.array([_poisson(rate * seconds, states) for seconds in lasting])
    chance = _standing(left, coming)
    idle = chance[0] / rate
    cycle = float(chance @ lasting) + idle
    values, masses = [np.array([work.seconds(1)])], [np.array([idle / cycle])]
    for state in np.flatnonzero(chance > 1e-9):
        for moment in (np.arange(MOMENTS) + 0.5) / MOMENTS:
            waiting = left[state] + 1 + np.arange(states)
            before = (left[state] + np.arange(states) * moment) // work.most
            own = work.fixed + work.each * np.minimum(waiting - before * work.most, work.most)
            values.append(lasting[state] * (1 - moment) + before * work.seconds(work.most) + own)
            masses.append(coming[state] * (chance[state] * lasting[state] / cycle / MOMENTS))
    return spread(np.concatenate(values), np.concatenate(masses), step), 1 - idle / cycle


def _poisson(mean: float, cells: int) -> np.ndarray:
    """Probabilities of 0, 1, ... [cells], the tail in the last."""
    logs = np.arange(cells) * math.log(mean) - mean - np.array([math.lgamma(count + 1) for count in range(cells)])
    found: np.ndarray = np.exp(logs)
    found[-1] += max(0.0, 1 - found.sum())
    return found


def _standing(left: np.ndarray, coming: np.ndarray) -> np.ndarray:
    """What waits when a batch ends, in the long run: from each state, what was left over and what came meanwhile."""
    states = len(left)
    moves = np.zeros((states, states))
    for state in range(states):
        moves[state, left[state] :] = coming[state, : states - left[state]]
        moves[state, -1] += 1 - moves[state].sum()
    equations = np.vstack([(moves.T - np.eye(states))[:-1], np.ones(states)])
    return np.clip(np.linalg.solve(equations, np.append(np.zeros(states - 1), 1.0)), 0, None)
