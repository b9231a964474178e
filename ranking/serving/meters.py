"""Counters, readings and histograms that cost about a microsecond to touch, and the one list of them that a scrape reads."""

from __future__ import annotations

import logging
import math
import re
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from index.errors import BrewlineError

MOST_SERIES = 1_000
"""Series of one meter; label values beyond them are counted together, so that no caller can fill the memory with names."""
OTHER = "other"
SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
)
"""Upper bounds for latencies: each at most twice the one before up to 2 s, closest where answers should be, at 5 to 20 ms."""
SIZES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
"""Upper bounds for how many were taken together."""

Values = tuple[str, ...]
Readings = Mapping[Values, float]
Labels = tuple[tuple[str, str], ...]
log = logging.getLogger(__name__)


class MeterError(BrewlineError):
    """A meter is wrongly named, named twice, or touched with other labels than it has."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of a scrape."""

    name: str
    labels: Labels
    value: float


@dataclass(frozen=True)
class Family:
    """The numbers of one meter: `kind` is "counter", "gauge" or "histogram", `told` says what they count and in which unit."""

    name: str
    kind: str
    told: str
    samples: list[Sample] = field(default_factory=list)


class Meter(Protocol):
    """Anything that a scrape can read."""

    @property
    def name(self) -> str: ...
    def family(self) -> Family: ...


class Head:
    """The name, the meaning and the labels of a meter. Raises MeterError for what Prometheus would refuse."""

    NAME = re.compile(r"[a-z][a-z0-9_]*")

    def __init__(self, name: str, told: str, labels: Sequence[str] = ()) -> None:
        wrong = [one for one in (name, *labels) if not self.NAME.fullmatch(one)]
        if wrong or len(set(labels)) < len(labels) or "le" in labels:
            raise MeterError(f"meter {name!r}, labels {list(labels)}: names are small letters, digits and _, none twice, no 'le'")
        self.name, self.told, self.labels = name, told, tuple(labels)

    def named(self, values: Values) -> Labels:
        """The labels with their values. Raises MeterError if there are more or fewer."""
        if len(values) != len(self.labels):
            raise MeterError(f"{self.name} has the labels {list(self.labels)} and was given {len(values)} values")
        return tuple(zip(self.labels, values))

    def room(self, values: Values, held: Mapping[Values, object]) -> Values:
        """The key of a new series: its values, or "other" for each once there are too many."""
        self.named(values)
        return values if len(held) < MOST_SERIES else (OTHER,) * len(values)


class Counter(Head):
    """A sum that only grows, one for each combination of label values. Safe for concurrent calls."""

    def __init__(self, name: str, told: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, told, labels)
        self._sums: dict[Values, float] = {} if labels else {(): 0.0}
        self._lock = threading.Lock()

    def add(self, *values: str, by: float = 1.0) -> None:
        """The sum of these label values is larger by `by`. Raises MeterError if that is below 0."""
        if not by >= 0:
            raise MeterError(f"{self.name} only grows and was given {by}")
        with self._lock:
            key = values if values in self._sums else self.room(values, self._sums)
            self._sums[key] = self._sums.get(key, 0.0) + by

    def family(self) -> Family:
        """The sums of now."""
        with self._lock:
            sums = dict(self._sums)
        samples = [Sample(self.name, self.named(values), total) for values, total in sorted(sums.items())]
        return Family(self.name, "counter", self.told, samples)


class Reading(Head):
    """Numbers that are kept elsewhere and looked up when a scrape asks: `read` returns them by label values.

    `kind` is "gauge", or "counter" for one that only grows (or starts again).
    """

    def __init__(
        self,
        name: str,
        told: str,
        read: Callable[[], Readings],
        labels: Sequence[str] = (),
        kind: str = "gauge",
    ) -> None:
        super().__init__(name, told, labels)
        self._read, self._kind = read, kind

    def family(self) -> Family:
        """The numbers of now. Raises whatever `read` does."""
        samples = [Sample(self.name, self.named(values), value) for values, value in self._read().items()]
        return Family(self.name, self._kind, self.told, samples)


class Histogram(Head):
    """How many values fell under each of fixed bounds, and their sum, by label values. Safe for concurrent calls."""

    def __init__(self, name: str, told: str, labels: Sequence[str] = (), bounds: Sequence[float] = SECONDS) -> None:
        super().__init__(name, told, labels)
        if not bounds or any(not low < high for low, high in zip(bounds, [*bounds[1:], math.inf])):
            raise MeterError(f"{name}: the bounds {list(bounds)} do not rise, or include infinity")
        self.bounds = tuple(map(float, bounds))
        self._held: dict[Values, list[float]] = {}
        self._lock = threading.Lock()

    def observe(self, value: float, *values: str) -> None:
        """One more value was seen; a bound includes the value that equals it."""
        place = bisect_left(self.bounds, value)
        with self._lock:
            held = self._held.get(values)
            if held is None:
                key = self.room(values, self._held)
                held = self._held.setdefault(key, [0.0] * (len(self.bounds) + 2))
            held[place] += 1
            held[-1] += value

    def family(self) -> Family:
        """The counts of now, summed from the lowest bound up."""
        with self._lock:
            held = {values: list(counts) for values, counts in self._held.items()}
        family = Family(self.name, "histogram", self.told)
        for values, (*counts, total) in sorted(held.items()):
            labels, below = self.named(values), 0.0
            for bound, count in zip((*self.bounds, math.inf), counts):
                below += count
                family.samples.append(Sample(f"{self.name}_bucket", (*labels, ("le", number(bound))), below))
            family.samples.append(Sample(f"{self.name}_sum", labels, total))
            family.samples.append(Sample(f"{self.name}_count", labels, below))
        return family


M = TypeVar("M", bound=Meter)


class Registry:
    """All meters of one server. One that cannot be read is left out of the scrape, logged and counted; the others are told."""

    def __init__(self) -> None:
        self._meters: dict[str, Meter] = {}
        self._failed = self.add(Counter("brewline_unread_total", "Meters that a scrape could not read; the log says why."))

    def add(self, meter: M) -> M:
        """The meter is read by every later scrape. Raises MeterError if another one has its name."""
        if meter.name in self._meters:
            raise MeterError(f"there is a meter {meter.name} already")
        self._meters[meter.name] = meter
        return meter

    def collect(self) -> Iterator[Family]:
        """What every meter says now, those included that have nothing to say yet."""
        for meter in list(self._meters.values()):
            try:
                yield meter.family()
            except Exception as error:
                self._failed.add()
                log.error("meter %s cannot be read", meter.name, exc_info=error)


def number(value: float) -> str:
    """The number as Prometheus reads it: the shortest text that is exactly this float."""
    if math.isfinite(value):
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
