"""How long work will take, learned from how long such work took: what the queue's promises are made of. No gRPC here."""

from __future__ import annotations

from typing import NamedTuple

NEWEST = 0.2
"""Weight of the newest run in the mean: after ten runs nine tenths of it are newer than a swap or a change of the machine."""


class Kind(NamedTuple):
    """What is asked of the models: a name, and how much of it (candidates, members, items)."""

    name: str
    size: int = 1

    @property
    def step(self) -> int:
        """Sizes of one step differ by less than a factor of two and are forecast alike."""
        return max(self.size, 1).bit_length()


class Forecast:
    """Mean seconds of each kind of work, the newest runs first. For one thread at a time."""

    def __init__(self) -> None:
        self._known: dict[str, dict[int, float]] = {}

    def record(self, kind: Kind, seconds: float) -> None:
        """Work of a kind took so long; work done together counts for each by its share."""
        steps = self._known.setdefault(kind.name, {})
        before = steps.get(kind.step)
        steps[kind.step] = seconds if before is None else before + NEWEST * (seconds - before)

    def seconds(self, kind: Kind) -> float:
        """Seconds that such work will take, by the nearest size that was measured; 0 if none ever was.

        A larger size is taken to cost in proportion, a smaller one no less: both err on the side of waiting longer.
        """
        steps = self._known.get(kind.name)
        if not steps:
            return 0.0
        step = kind.step
        nearest = min(steps, key=lambda known: (abs(known - step), known))
        return float(steps[nearest] * 2 ** max(step - nearest, 0))

    def most(self, name: str) -> float:
        """Seconds of the longest that was measured of a name or of what begins with it and a space: an unread request's."""
        kinds = [steps for known, steps in self._known.items() if known == name or known.startswith(f"{name} ")]
        return max((seconds for steps in kinds for seconds in steps.values()), default=0.0)
