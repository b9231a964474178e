"""How long ranking will take, so that lateness is known before work is done in vain."""

from __future__ import annotations

import math
from collections import deque


class Pace:
    """How long ranking will take, learned from how long it took.

    A run of n candidates bounds any other from above: a smaller one takes no longer, a larger one no longer than in
    proportion. The forecast is the largest bound of the four recent runs nearest in size. Without a recent run (`MEMORY_S`)
    the best pace ever seen counts, so that one slow minute cannot switch ranking off for good.
    """

    MEMORY_S = 30.0

    def __init__(self) -> None:
        self._runs: deque[tuple[float, int, float]] = deque(maxlen=64)
        self._best: tuple[int, float] | None = None

    def record(self, candidates: int, seconds: float, now: float) -> None:
        """A run of so many candidates took so many seconds and ended now."""
        if candidates < 1:
            return
        self._runs.append((now, candidates, seconds))
        if self._best is None or seconds * self._best[0] < self._best[1] * candidates:
            self._best = (candidates, seconds)

    def forecast(self, candidates: int, now: float) -> float:
        """Seconds that ranking so many candidates will take at most; 0 if nothing was ever measured."""
        runs = [(size, seconds) for when, size, seconds in self._runs if now - when <= self.MEMORY_S]
        runs = runs or ([self._best] if self._best is not None else [])
        nearest = sorted(runs, key=lambda run: abs(math.log(run[0] / max(candidates, 1))))[:4]
        return max((seconds * max(1.0, candidates / size) for size, seconds in nearest), default=0.0)
