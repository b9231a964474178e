"""The same system, request by request: what the formulas of `ranking.capacity` leave out is in here.

Poisson arrivals; each goes to one replica of every stage, drawn at random; a replica is a line before one worker, bounded by
count and by the server's own `Patience` (`ranking.serving.load_shed`), which works alone or takes what waits together. A search
asks one replica of every shard and is as late as the slowest. Who is refused once has no answer. Stages feed forward, so each
replica's line can be followed to its end before the next stage begins; inside a line events happen in order of time.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ranking.capacity import Plan, Stage
from ranking.capacity_queues import Batches, Times
from ranking.serving.load_shed import MOST_WAIT_S, Patience

MOST_WAITING = 64
"""As `brewline serve` has it."""
CALLERS = 64
"""Front ends that ask; the door remembers whom it refused."""

MARGIN_P99, MARGIN_BUSY = 0.1, 0.02
"""How far computed and simulated may lie apart: a share of p99, and points of busy time. While under one request in a hundred is
refused: beyond, refusals make the door stricter than the formulas know, and what is let in is quicker."""


@dataclass(frozen=True)
class Line:
    """What is before one worker: how many may wait, for how long, and how many may be taken at once."""

    most_waiting: int = MOST_WAITING
    most_wait_s: float = MOST_WAIT_S
    together: Batches | None = None
    workers: int = 1


@dataclass(frozen=True, eq=False)
class Simulated:
    """What came of a run: seconds of each answered request, the share refused, and each stage's share of busy time."""

    seconds: np.ndarray
    refused: float
    busy: dict[str, float]

    def quantile(self, share: float) -> float:
        """Seconds within which this share was answered; the least answer that does it."""
        return float(np.quantile(self.seconds, share, method="inverted_cdf"))


def simulate(stages: Sequence[Stage], rate: float, requests: int, seed: int = 0) -> Simulated:
    """So many requests have gone through all stages, one after the other; the first tenth of them warmed the lines up.

    The share of busy time is over the time in which the stage's requests came.
    """
    rng = np.random.default_rng(seed)
    came = np.cumsum(rng.exponential(1 / rate, requests))
    callers = [f"front end {number}" for number in rng.integers(CALLERS, size=requests).tolist()]
    now, busy = came, {}
    for stage in stages:
        now, working = _through(stage, now, callers, rng)
        busy[stage.name] = working / (stage.replicas * stage.shards * float(came[-1] - came[0]))
    kept = np.isfinite(now)
    kept[: requests // 10] = False
    return Simulated((now - came)[kept], 1 - float(kept[requests // 10 :].mean()), busy)


def check(whole: Plan, *, shards: int, replicas: int, requests: int, seed: int = 0) -> dict[str, float | bool]:
    """Computed beside simulated, of a slice of the plan: the same lines, fewer of them. `agrees`: within the margins."""
    slice_ = whole.sliced(shards, replicas)
    seen, told = simulate(slice_.stages, slice_.load.rate, requests, seed), slice_.times.quantile(0.99)
    busy = max(abs(seen.busy[stage.name] - stage.busy) for stage in slice_.stages)
    return {
        "requests": requests,
        "shards": slice_.stages[1].shards,
        "rate": slice_.load.rate,
        "p99_ms_computed": told * 1e3,
        "p99_ms_simulated": seen.quantile(0.99) * 1e3,
        "refused_computed": slice_.refused,
        "refused_simulated": seen.refused,
        "busy_difference": busy,
        "agrees": abs(seen.quantile(0.99) / told - 1) <= MARGIN_P99 and busy <= MARGIN_BUSY,
    }


def _through(stage: Stage, came: np.ndarray, callers: Sequence[str], rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """When each request leaves a stage (infinite: refused), and the seconds of all its workers together."""
    alive = np.flatnonzero(np.isfinite(came))
    alive = alive[np.argsort(came[alive], kind="stable")]
    left = np.full(len(came), -np.inf)
    left[~np.isfinite(came)] = np.inf
    working, work = 0.0, stage.work
    line = Line(together=work) if isinstance(work, Batches) else Line()
    for _ in range(stage.shards):
        chosen = rng.integers(stage.replicas, size=len(alive))
        for replica in range(stage.replicas):
            rows = alive[chosen == replica]
            services = work.at(rng.random(len(rows))) if isinstance(work, Times) else np.ones(len(rows))
            done, seconds = serve(came[rows], services, line, [callers[row] for row in rows])
            left[rows] = np.maximum(left[rows], done)
            working += seconds
    return left, working


def serve(came: np.ndarray, services: np.ndarray, line: Line, callers: Sequence[str]) -> tuple[np.ndarray, float]:
    """A line from the first request to the last: when each was answered (infinite: refused), and its busy seconds.

    `came` [n] rises; `services` [n] are the seconds of each, or factors on a batch's seconds where they are taken together.
    """
    worker = _Worker(line, services, np.full(len(came), np.inf))
    patience = Patience(line.most_wait_s)
    usual = line.together.seconds(1) if line.together else float(services.mean()) if len(services) else 0.0
    for request, moment in enumerate(came.tolist()):
        worker.until(moment)
        wait = worker.wait(moment, usual)
        bound = patience.bound(usual, moment, callers[request], gathered=line.together is not None)
        if len(worker.waiting) >= line.most_waiting or wait > bound:
            patience.refuse(callers[request], wait, "", moment)
        else:
            worker.waiting.append((request, moment))
    worker.until(np.inf)
    return worker.answered, worker.busy


class _Worker:
    """Threads (one, as the server has it) and the line before them."""

    def __init__(self, line: Line, services: np.ndarray, answered: np.ndarray) -> None:
        self._line, self._services = line, services.tolist()
        self.waiting: deque[tuple[int, float]] = deque()
        self.answered, self.busy, self._free = answered, 0.0, [0.0] * line.workers

    def wait(self, now: float, usual: float) -> float:
        """Seconds until a request that comes now would begin, by what such work usually takes."""
        together = self._line.together
        if together is None:
            return max(self._free[0] - now, 0.0) + len(self.waiting) * usual / self._line.workers
        return max(self._free[0] - now, 0.0) + len(self.waiting) // together.most * together.seconds(together.most)

    def until(self, moment: float) -> None:
        """All work that begins before the moment is begun."""
        while self.waiting and (begins := max(self._free[0], self.waiting[0][1])) < moment:
            taken = [self.waiting.popleft()[0]]
            together = self._line.together
            while together and len(taken) < together.most and self.waiting and self.waiting[0][1] <= begins:
                taken.append(self.waiting.popleft()[0])
            own = self._services[taken[0]]
            seconds = own * together.seconds(len(taken)) if together else own
            heapq.heapreplace(self._free, begins + seconds)
            self.busy += seconds
            self.answered[taken] = begins + seconds
