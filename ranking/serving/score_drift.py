"""Whether answers score as they did: the score of each recent answer's first item against those of the first hour.

Models that are healthy by every other sign can still answer uselessly (a damaged export, features that stopped coming, another
population of members), and then the score of what comes first is among the first things to move. The reference begins anew when
the encoder or the ranker changes, because their scores are on a scale of their own, and is kept when only the snapshot does: a
bad night is compared with the good ones before it.
"""

from __future__ import annotations

import threading
import time
from collections import deque

import numpy as np

RECENT, REFERENCE, REFERENCE_S, ENOUGH = 512, 4_096, 3_600.0, 100
"""Answers in the recent window; most answers and seconds of the reference; fewest of both for a comparison."""
STATS = ("mean", "p10", "p50", "p90")

Stats = dict[tuple[str, ...], float]


class Drift:
    """One kind of score of one method. Safe for concurrent calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: str | None = None
        self._since = 0.0
        self._reference: list[float] = []
        self._recent: deque[float] = deque(maxlen=RECENT)

    def add(self, score: float, models: str, now: float | None = None) -> None:
        """The score of one more answer's first item, made by `models` (any name for both), at a time of the monotonic clock."""
        now = time.monotonic() if now is None else now
        with self._lock:
            if models != self._models:
                self._models, self._since, self._reference = models, now, []
                self._recent.clear()
            self._recent.append(score)
            if len(self._reference) < REFERENCE and now - self._since < REFERENCE_S:
                self._reference.append(score)

    def windows(self) -> dict[str, np.ndarray]:
        """The scores of both windows, float64 [n] each."""
        with self._lock:
            held = {"reference": list(self._reference), "recent": list(self._recent)}
        return {window: np.asarray(scores) for window, scores in held.items()}

    def stats(self) -> Stats:
        """By window and statistic: mean and quantiles of what is there."""
        found: Stats = {}
        for window, scores in self.windows().items():
            if len(scores):
                values = (scores.mean(), *np.quantile(scores, (0.1, 0.5, 0.9)))
                found.update({(window, name): float(value) for name, value in zip(STATS, values)})
        return found

    def shift(self) -> float | None:
        """How far the recent mean is from the reference's, in standard deviations of the latter; None while either is small."""
        windows = self.windows()
        reference, recent = windows["reference"], windows["recent"]
        if min(len(reference), len(recent)) < ENOUGH:
            return None
        return float((recent.mean() - reference.mean()) / max(reference.std(), 1e-6))
