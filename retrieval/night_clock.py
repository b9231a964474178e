"""Where the time of a night went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class NightClock:
    """Seconds by stage, and since it was made."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {"embed": 0.0, "index": 0.0, "members": 0.0}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.spent[stage] += time.perf_counter() - start

    def total(self) -> float:
        return time.perf_counter() - self._start
