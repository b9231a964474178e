"""What a server's meters need beyond prometheus_client: a bound on their series, and numbers that are looked up by a scrape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

MOST_SERIES = 1_000
"""Series of one meter; label values beyond them are counted together, so that no caller can fill the memory with names."""
OTHER = "other"

Values = tuple[str, ...]
Read = Callable[[], Mapping[Values, float]]
"""Returns the numbers of now by label values."""
M = TypeVar("M", Counter, Histogram)

log = logging.getLogger(__name__)


class Series(Generic[M]):
    """The series of one meter by label values; beyond `MOST_SERIES` each further one is that of "other". Threads may share it.

    Each is looked up once: the library's `labels` takes a lock and makes text of the values, .8 microseconds each time.
    """

    def __init__(self, meter: M) -> None:
        self._meter: M = meter
        self._held: dict[Values, M] = {}

    def __call__(self, *values: str) -> M:
        found = self._held.get(values)
        if found is not None:
            return found
        if len(self._held) >= MOST_SERIES:
            return self._meter.labels(*(OTHER,) * len(values))
        made = self._held[values] = self._meter.labels(*values)
        return made


class Readings:
    """Adds meters that are kept elsewhere to a registry. One that cannot be read is left out of a scrape, logged and counted."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        told = "Meters that a scrape could not read; the log says why."
        self._failed = Counter("brewline_unread_total", told, registry=registry)

    def add(self, name: str, told: str, read: Read, labels: Sequence[str] = (), *, counter: bool = False) -> None:
        """Every later scrape calls `read`; `counter`: its numbers only grow. Raises ValueError if there is such a meter."""
        family = partial(CounterMetricFamily if counter else GaugeMetricFamily, name, told, labels=labels)
        self._registry.register(_Reading(family, read, self._failed))


@dataclass(frozen=True)
class _Reading(Collector):
    family: Callable[[], CounterMetricFamily | GaugeMetricFamily]
    read: Read
    failed: Counter

    def describe(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        return [self.family()]

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        family = self.family()
        try:
            for values, value in self.read().items():
                family.add_metric(values, value)
        except Exception as error:  # the library would end the whole scrape with it
            self.failed.inc()
            log.error("meter %s cannot be read", family.name, exc_info=error)
            return []
        return [family]
