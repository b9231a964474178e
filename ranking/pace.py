"""How long the stages took, and how long ranking will take, so that lateness is known before work is done in vain."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Watch = Callable[[str], AbstractContextManager[None]]


class Stopwatch:
    """Microseconds by stage, summed over every time that the stage ran."""

    def __init__(self) -> None:
        self.micros: dict[str, int] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """The block's duration counts for the stage, whether or not it raises."""
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            self.micros[stage] = self.micros.get(stage, 0) + (time.perf_counter_ns() - start) // 1000


def unwatched(stage: str) -> AbstractContextManager[None]:
    """A stopwatch that measures nothing."""
    del stage
    return nullcontext()


class Pace:
    """How long ranking will take, learned from how long it took.

    A run of n candidates bounds any other from above: a smaller one takes no longer, a larger one no longer than in
    proportion. The forecast is the largest bound of the four recent runs nearest in size, the newest of equals. Without a recent
    run (`MEMORY_S`) the best pace ever seen counts, so that one slow minute cannot switch ranking off for good.

    Proportion is a bound, and a poor one from far below: most of what one candidate takes is the member's part. So a run says
    nothing of one more than `REACH` times as large, and where nothing else is known, `REACH` times its seconds are the guess.
    """

    MEMORY_S = 30.0
    REACH = 4

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
        """Seconds that ranking so many candidates will take at most; a guess where nothing like it was ever measured, 0 where
        nothing was."""
        recent = [(size, seconds) for when, size, seconds in reversed(self._runs) if now - when <= self.MEMORY_S]
        best = [self._best] if self._best is not None else []
        recent.sort(key=lambda run: abs(math.log(run[0] / max(candidates, 1))))
        of_now, of_ever = ([run for run in runs if run[0] * self.REACH >= candidates] for runs in (recent, best))
        if near := of_now or of_ever:
            return max(seconds * max(1.0, candidates / size) for size, seconds in near[:4])
        return max((seconds * self.REACH for _, seconds in (recent or best)[:4]), default=0.0)
