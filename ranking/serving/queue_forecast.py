"""How long work will take, learned from how long such work took: what the queue's promises are made of. No gRPC here."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

NEWEST = 0.2
"""Weight of the newest run in the mean: after ten runs nine tenths of it are newer than a swap or a change of the machine."""
RECENT = 8
"""Runs of which the median is taken: one that was slow by chance moves a mean beyond a deadline, and not a median."""
TRIAL_S, TRIAL_TURNS = 1.0, 10
"""When a measurement that refuses others is old: after so many seconds, and so many times as long as such work takes. What is
then tried in vain takes less than a tenth of the time."""


class Kind(NamedTuple):
    """What is asked of the models: a name, and how much of it (candidates, members, items)."""

    name: str
    size: int = 1

    @property
    def step(self) -> int:
        """Sizes of one step differ by less than a factor of two and are forecast alike."""
        return max(self.size, 1).bit_length()


@dataclass
class Known:
    """What is known of one name and step: mean seconds, those of the last runs, when one was last run or tried, and whether all
    of it is only believed until what is tried has been run."""

    mean: float
    last: float
    doubted: bool = False
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))


class Forecast:
    """Seconds of each kind of work, the newest runs first. For one thread at a time; `now` is `time.monotonic()`."""

    def __init__(self) -> None:
        self._known: dict[str, dict[int, Known]] = {}

    def record(self, kind: Kind, seconds: float, now: float) -> None:
        """Work of a kind took so long; work done together counts for each by its share."""
        known = self._known.setdefault(kind.name, {}).setdefault(kind.step, Known(seconds, now))
        if known.doubted:
            known.mean, known.doubted = seconds, False
            known.recent.clear()
        known.mean += NEWEST * (seconds - known.mean)
        known.recent.append(seconds)
        known.last = now

    def seconds(self, kind: Kind) -> float:
        """Mean seconds that such work will take, by the nearest size that was measured; 0 if none ever was.

        A larger size is taken to cost in proportion, a smaller one no less: both err on the side of waiting longer.
        """
        steps = self._known.get(kind.name)
        if not steps:
            return 0.0
        step = kind.step
        nearest = min(steps, key=lambda known: (abs(known - step), known))
        return float(steps[nearest].mean * 2 ** max(step - nearest, 0))

    def usual(self, kind: Kind) -> float:
        """Median seconds of the last runs of such work, or of the next smaller size that was measured; 0 if none was.

        A request may be refused for this, and what is refused is not measured: it errs on the side of trying.
        """
        known = self._no_larger(kind)
        return statistics.median_low(known.recent) if known else 0.0

    def is_old(self, kind: Kind, now: float, turn: float) -> bool:
        """Whether `usual` is so old that a request which it speaks against, and whose `turn` takes so long, should be tried."""
        known = self._no_larger(kind)
        return known is None or now - known.last > max(TRIAL_S, TRIAL_TURNS * turn)

    def tried(self, kind: Kind, now: float) -> None:
        """Such a request is on its way: until it has been run, or as long again, what is known of its kind is not old."""
        known = self._no_larger(kind)
        if known is not None:
            known.last, known.doubted = now, True

    def most(self, name: str) -> float:
        """Seconds of the longest that was measured of a name or of what begins with it and a space: an unread request's."""
        kinds = [steps for known, steps in self._known.items() if known == name or known.startswith(f"{name} ")]
        return max((known.mean for steps in kinds for known in steps.values()), default=0.0)

    def _no_larger(self, kind: Kind) -> Known | None:
        steps = self._known.get(kind.name, {})
        measured = [step for step in steps if step <= kind.step]
        return steps[max(measured)] if measured else None
