"""What a server tells Prometheus: its meters, and what feeds them when a call has ended."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from ranking.pipeline import Degraded
from ranking.serving import recommender_pb2 as pb
from ranking.serving.current import Current
from ranking.serving.meters import Counter, Histogram, Reading, Readings, Registry
from ranking.serving.process import add_process
from ranking.serving.score_drift import Drift
from ranking.serving.stack_meters import add_stack
from ranking.serving.visit import Visit

FIRST = struct.Struct("<f")
"""The score of the first row of an answer."""
SCORED = (pb.RecommendResponse, pb.RetrieveResponse, pb.RankResponse)
TURNED_AWAY = ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE")
"""Statuses of a request that was in order and was not answered all the same."""


class Telemetry:
    """All meters of one server. `note` feeds them; the rest is looked up by a scrape.

    `recall` may be set to what measures the recall of answers now; None, or a reading of None, tells nothing.
    """

    def __init__(self, current: Current, inside: set[Visit], version: str) -> None:
        """`inside` holds the calls on their way; another thread may change it at any time."""
        self.registry = Registry()
        self.recall: Callable[[], float | None] | None = None
        self._inside = inside
        self._drifts: dict[tuple[str, str], Drift] = {}
        add = self.registry.add
        self._requests = add(Counter("brewline_requests_total", "Calls that ended, by their status.", ("method", "code")))
        told = "From arrival to answer or refusal, seconds."
        self._seconds = add(Histogram("brewline_request_seconds", told, ("method", "outcome")))
        told = "Time of an answered call in one stage, seconds."
        self._stages = add(Histogram("brewline_stage_seconds", told, ("method", "stage")))
        self._degraded = add(Counter("brewline_degraded_total", "Answers that lack something.", ("method", "reason")))
        told = "Calls that were in order and not answered, by error."
        self._rejected = add(Counter("brewline_rejected_total", told, ("method", "reason")))
        self._add_queue()
        self._add_scores()
        add_stack(self.registry, current, version)
        add_process(self.registry)

    def note(self, visit: Visit) -> None:
        """A call has ended. To be called from one thread."""
        method, answered = visit.method, visit.code == "OK"
        self._requests.add(method, visit.code)
        self._seconds.observe(visit.seconds, method, "answered" if answered else "refused")
        if not answered:
            if visit.code in TURNED_AWAY:
                self._rejected.add(method, visit.refusal or visit.code)
            return
        for stage, micros in visit.micros().items():
            self._stages.observe(micros / 1e6, method, stage)
        response = visit.response
        if isinstance(response, SCORED):
            if response.degraded:
                self._degraded.add(method, Degraded(response.degraded).name)
            made, results = response.provenance, response.results
            models = f"{made.encoder} {made.ranker}"
            self._score(method, "cosine" if made.first_stage == "dense" else "merged", results.scores, models)
            self._score(method, "probability", results.probabilities, models)

    def _score(self, method: str, score: str, packed: bytes, models: str) -> None:
        if not packed:
            return
        drift = self._drifts.get((method, score))
        if drift is None:
            drift = self._drifts[method, score] = Drift()
        drift.add(FIRST.unpack_from(packed)[0], models)

    def _add_queue(self) -> None:
        add = self.registry.add
        add(Reading("brewline_in_flight", "Calls that arrived and have not ended.", lambda: {(): len(self._inside)}))
        add(Reading("brewline_queue_length", "Calls that wait for the models.", lambda: {(): len(self._waiting())}))
        add(Reading("brewline_queue_oldest_seconds", "How long the first of them has waited.", self._oldest))

    def _waiting(self) -> list[float]:
        """When each call arrived that has not begun."""
        calls = [visit.call for visit in tuple(self._inside)]
        return [call.arrived for call in calls if call is not None and not call.started]

    def _oldest(self) -> Readings:
        now = time.monotonic()
        return {(): now - min(self._waiting(), default=now)}

    def _add_scores(self) -> None:
        add = self.registry.add
        told = "Score of an answer's first item: mean and quantiles of the recent ones and of the models' first hour."
        add(Reading("brewline_score", told, self._scores, ("method", "score", "window", "stat")))
        told = "Recent mean against that of the first hour, in standard deviations of the first hour."
        add(Reading("brewline_score_drift", told, self._shifts, ("method", "score")))
        add(Reading("brewline_recall", "Recall of recent answers against the exact search.", self._recall))

    def _scores(self) -> Readings:
        drifts = tuple(self._drifts.items())
        return {(*key, *which): value for key, drift in drifts for which, value in drift.stats().items()}

    def _shifts(self) -> Readings:
        shifts = {key: drift.shift() for key, drift in tuple(self._drifts.items())}
        return {key: shift for key, shift in shifts.items() if shift is not None}

    def _recall(self) -> Readings:
        recall = None if self.recall is None else self.recall()
        return {} if recall is None else {(): recall}
