"""Spans for OpenTelemetry, if the extra `traces` is installed: one for each call, and one below it for each stage.

A caller's W3C `traceparent` makes the call a part of its trace, and decides whether it is recorded. Spans are made when the call
has ended, from the times that its stopwatch kept: a stage that ran twice is one span of its summed time, and stages follow each
other in the order in which they first ended.
"""

from __future__ import annotations

import importlib
import logging
import threading
from typing import Any

from index.errors import BrewlineError
from ranking.pipeline import Degraded
from ranking.serving import recommender_pb2 as pb
from ranking.serving.visit import Visit

SERVICE = "brewline.v1.Recommender"
CLOSE_S = 3.0
"""Seconds that the collector has for the last spans; the SDK alone would try for 30, longer than a server may take to end."""
DEGRADABLE = (pb.RecommendResponse, pb.RetrieveResponse, pb.RankResponse)

log = logging.getLogger(__name__)


class TracesError(BrewlineError):
    """Traces were asked for and cannot be made."""


class Traces:
    """Makes the spans of each call that `note` is told of, and sends them from a thread of its own."""

    def __init__(self, processor: Any, version: str) -> None:
        """`processor` is a span processor of the SDK. Raises TracesError if the SDK is not installed."""
        sdk, self._api = _module("opentelemetry.sdk.trace"), _module("opentelemetry.trace")
        resource = _module("opentelemetry.sdk.resources").Resource.create(
            {"service.name": "brewline", "service.version": version}
        )
        self._provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("brewline", version)
        propagation = _module("opentelemetry.trace.propagation.tracecontext")
        self._propagator = propagation.TraceContextTextMapPropagator()
        self._root = _module("opentelemetry.context").Context()

    def note(self, visit: Visit) -> None:
        """The spans of a call that has ended are on their way, unless its caller's trace is not recorded."""
        carrier = {name: value for name, value in visit.metadata if isinstance(value, str) and name in self._propagator.fields}
        parent = self._propagator.extract(carrier, context=self._root)
        end = visit.at + round(visit.seconds * 1e9)
        span = self._tracer.start_span(
            f"{SERVICE}/{visit.method}",
            context=parent,
            kind=self._api.SpanKind.SERVER,
            start_time=visit.at,
            attributes=_attributes(visit),
        )
        if span.is_recording():
            if visit.code not in ("OK", "CANCELLED"):
                span.set_status(self._api.Status(self._api.StatusCode.ERROR, visit.refusal or visit.code))
            self._stages(visit, self._api.set_span_in_context(span, self._root), end)
        span.end(end)

    def close(self) -> None:
        """What is still here was sent, or the collector did not take it in time, and the log says so."""
        ending = threading.Thread(target=self._provider.shutdown, name="brewline-traces", daemon=True)
        ending.start()
        ending.join(CLOSE_S)
        if ending.is_alive():
            log.warning("the collector did not take the last spans in %g s; they are lost", CLOSE_S)

    def _stages(self, visit: Visit, inside: Any, end: int) -> None:
        begun = visit.at
        for stage, micros in visit.micros().items():
            done = min(begun + micros * 1_000, end)
            self._tracer.start_span(stage, context=inside, start_time=begun).end(done)
            begun = done


def open_traces(endpoint: str, version: str) -> Traces:
    """Spans go in batches to a collector that speaks OTLP over gRPC at this address ("http://HOST:4317"). Raises TracesError."""
    if not endpoint.startswith(("http://", "https://")):
        raise TracesError(f"--traces {endpoint!r} is no address of a collector; expected http://HOST:4317 or https://HOST:4317")
    exporter = _module("opentelemetry.exporter.otlp.proto.grpc.trace_exporter").OTLPSpanExporter(endpoint=endpoint)
    return Traces(_module("opentelemetry.sdk.trace.export").BatchSpanProcessor(exporter), version)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TracesError(f"--traces needs {error.name}, which is not installed; pip install 'brewline[traces]'") from error


def _attributes(visit: Visit) -> dict[str, str | int]:
    """Names and numbers only: no text of a member, no id of an item, no token."""
    told: dict[str, str | int] = {
        "rpc.system": "grpc",
        "rpc.service": SERVICE,
        "rpc.method": visit.method,
        "brewline.code": visit.code,
        "brewline.request_id": visit.request_id,
        "brewline.caller": visit.caller,
    }
    if isinstance(visit.response, DEGRADABLE):
        made = visit.response.provenance
        told |= {
            "brewline.snapshot": made.snapshot,
            "brewline.encoder": made.encoder,
            "brewline.ranker": made.ranker,
            "brewline.results": visit.response.results.count,
            "brewline.degraded": Degraded(visit.response.degraded).name,
        }
    return told
