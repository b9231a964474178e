"""What a server tells Prometheus: its meters, and what feeds them when a call has ended."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import Metric

from ranking.pipeline import Degraded
from ranking.serving import recommender_pb2 as pb
from ranking.serving.current import Current
from ranking.serving.readings import Readings, Series, Values
from ranking.serving.score_drift import Drift
from ranking.serving.stack_meters import add_stack
from ranking.serving.visit import Visit
from ranking.serving.weights import own_probabilities

FIRST = struct.Struct("<f")
"""The score of the first row of an answer."""
SCORED = (pb.RecommendResponse, pb.RetrieveResponse, pb.RankResponse)
SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
)
"""Upper bounds for latencies: each at most twice the one before up to 2 s, closest where answers should be, at 5 to 20 ms."""
TURNED_AWAY = ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE")
"""Statuses of a request that was in order and was not answered all the same."""


class Telemetry:
    """All meters of one server, in a registry of their own. `note` feeds them; the rest, `readings`, is looked up by a scrape."""

    def __init__(self, current: Current, inside: set[Visit], version: str) -> None:
        """`inside` holds the calls on their way; another thread may change it at any time."""
        self.registry = registry = CollectorRegistry()
        self._inside = inside
        self._drifts: dict[tuple[str, str], Drift] = {}
        self._requests = _counter("brewline_requests_total", "Calls that ended, by their status.", "code", registry)
        self._seconds = _spread("brewline_request_seconds", "From arrival to answer or refusal, seconds.", "outcome", registry)
        self._stages = _spread("brewline_stage_seconds", "Time of an answered call in one stage, seconds.", "stage", registry)
        self._degraded = _counter("brewline_degraded_total", "Answers that lack something.", "reason", registry)
        told = "Calls that were in order and not answered, by error."
        self._rejected = _counter("brewline_rejected_total", told, "reason", registry)
        self.readings = readings = Readings(registry)
        self._add_queue(readings)
        self._add_scores(readings)
        add_stack(readings, current, version)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

    def collect(self) -> Iterable[Metric]:
        """What every meter says now, without the times at which the library made its series: they would be as many again."""
        for family in self.registry.collect():
            family.samples = [one for one in family.samples if not one.name.endswith("_created")]
            yield family

    def text(self) -> bytes:
        """A scrape, in the Prometheus text format 0.0.4."""
        return generate_latest(self)

    def note(self, visit: Visit) -> None:
        """A call has ended. To be called from one thread."""
        method, answered = visit.method, visit.code == "OK"
        self._requests(method, visit.code).inc()
        self._seconds(method, "answered" if answered else "refused").observe(visit.seconds)
        if not answered:
            if visit.code in TURNED_AWAY:
                self._rejected(method, visit.refusal or visit.code).inc()
            return
        for stage, micros in visit.micros().items():
            self._stages(method, stage).observe(micros / 1e6)
        response = visit.response
        if isinstance(response, SCORED):
            if response.degraded:
                self._degraded(method, Degraded(response.degraded).name).inc()
            made, results = response.provenance, response.results
            models = f"{made.encoder} {made.ranker}"
            self._score(method, "cosine" if made.first_stage == "dense" else "merged", results.scores, models)
            if not isinstance(response, pb.RetrieveResponse):
                self._score(method, "probability", own_probabilities(response), models)

    def _score(self, method: str, score: str, packed: bytes, models: str) -> None:
        if not packed:
            return
        drift = self._drifts.get((method, score))
        if drift is None:
            drift = self._drifts[method, score] = Drift()
        drift.add(FIRST.unpack_from(packed)[0], models)

    def _add_queue(self, readings: Readings) -> None:
        readings.add("brewline_in_flight", "Calls that arrived and have not ended.", lambda: {(): len(self._inside)})
        readings.add("brewline_queue_length", "Calls that wait for the models.", lambda: {(): len(self._waiting())})
        readings.add("brewline_queue_oldest_seconds", "How long the first of them has waited.", self._oldest)

    def _waiting(self) -> list[float]:
        """When each call arrived that has not begun."""
        calls = [visit.call for visit in tuple(self._inside)]
        return [call.arrived for call in calls if call is not None and not call.started]

    def _oldest(self) -> Mapping[Values, float]:
        now = time.monotonic()
        return {(): now - min(self._waiting(), default=now)}

    def _add_scores(self, readings: Readings) -> None:
        told = "Score of an answer's first item: mean and quantiles of the recent ones and of the models' first hour."
        readings.add("brewline_score", told, self._scores, ("method", "score", "window", "stat"))
        told = "Recent mean against that of the first hour, in standard deviations of the first hour."
        readings.add("brewline_score_drift", told, self._shifts, ("method", "score"))

    def _scores(self) -> Mapping[Values, float]:
        drifts = tuple(self._drifts.items())
        return {(*key, *which): value for key, drift in drifts for which, value in drift.stats().items()}

    def _shifts(self) -> Mapping[Values, float]:
        shifts = {key: drift.shift() for key, drift in tuple(self._drifts.items())}
        return {key: shift for key, shift in shifts.items() if shift is not None}


def _counter(name: str, told: str, of: str, registry: CollectorRegistry) -> Series[Counter]:
    return Series(Counter(name, told, ("method", of), registry=registry))


def _spread(name: str, told: str, of: str, registry: CollectorRegistry) -> Series[Histogram]:
    return Series(Histogram(name, told, ("method", of), registry=registry, buckets=SECONDS))
