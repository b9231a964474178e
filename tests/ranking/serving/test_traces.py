"""What a call leaves behind beside its answer: one line in the log, and spans if they are wanted; secrets in neither."""

from __future__ import annotations

import importlib.util
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from ranking.cli.logs import set_up
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc, traces
from ranking.serving.client import Client
from ranking.serving.stack import Stack
from ranking.serving.tokens import make_token
from ranking.serving.traces import Traces, TracesError, open_traces

Start = Callable[..., tuple[int, Callable[[], None]]]
INSTALLED = importlib.util.find_spec("opentelemetry") is not None and importlib.util.find_spec("opentelemetry.sdk") is not None
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
WISH = "a secret wish of mine"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The records of finished calls, as what they carry."""
    return [vars(record) for record in caplog.records if record.name == "ranking.serving.observe"]


def test_each_call_is_one_line_and_no_line_holds_a_secret(
    stack: Stack, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = make_token(tmp_path / "tokens", "feed", "read")
    caplog.set_level(logging.DEBUG)
    port, stop = start(stack, tokens=tmp_path / "tokens")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = recommender_pb2_grpc.RecommenderStub(channel)
        shown = (("authorization", f"Bearer {token}"), ("x-request-id", "r-1"))
        stub.Recommend(pb.RecommendRequest(member=pb.Member(id="m5"), instruction=WISH), metadata=shown)
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            stub.Rank(pb.RankRequest(member=pb.Member(id="m5"), items=pb.Ids(plain=["hidden-item"])), metadata=shown)
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            stub.Retrieve(pb.RetrieveRequest(), metadata=(("authorization", "Bearer of-somebody-else"),))
    stop()
    answered, refused, turned_away = lines(caplog)
    assert answered["msg"] == "answered" and answered["request_id"] == "r-1" and answered["caller"] == "feed"
    assert (answered["method"], answered["code"]) == ("Recommend", "OK")
    assert answered["total_us"] >= answered["rank_us"] > 0 and answered["queue_us"] >= 0
    assert refused["msg"] == "refused" and refused["request_id"] == "r-1" and refused["caller"] == "feed"
    assert (refused["code"], refused["error"]) == ("NOT_FOUND", "UnknownItem") and refused["total_us"] > 0
    assert (turned_away["method"], turned_away["code"], turned_away["caller"]) == ("Retrieve", "UNAUTHENTICATED", "")
    written = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    for secret in (token, token.partition(".")[2], "of-somebody-else", WISH, "hidden-item"):
        assert secret and secret not in written


@pytest.mark.parametrize("form", ["json", "text"])
def test_the_last_wall_of_the_log_masks_what_got_so_far(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BREWLINE_LOG", form)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        set_up(verbose=True)
        try:
            member_wrote = WISH
            raise ValueError("Authorization: Bearer abc.def-1")
        except ValueError as error:
            logging.getLogger("x").error(
                "call %s", "bearer abc.def-2", exc_info=error, extra={"store": "redis://me:abc.def-3@host/0"}
            )
            assert member_wrote
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    told = capsys.readouterr().err
    assert "abc.def" not in told and WISH not in told
    assert "ValueError" in told and "host/0" in told and told.count("***") >= 3
    if form == "json":
        assert json.loads(told)["store"] == "redis://me:***@host/0"


@pytest.mark.skipif(INSTALLED, reason="OpenTelemetry is installed here")
def test_spans_that_cannot_be_made_are_refused_in_words() -> None:
    with pytest.raises(TracesError, match=r"brewline\[traces\]"):
        open_traces("http://127.0.0.1:4317", "1")


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(TracesError, match="http://HOST:4317"):
        open_traces("collector", "1")


@pytest.mark.skipif(not INSTALLED, reason="the extra `traces` (OpenTelemetry) is not installed here")
def test_a_call_is_a_span_of_its_callers_trace_with_a_span_for_each_stage(stack: Stack, start: Start) -> None:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    port, stop = start(stack, traces=Traces(SimpleSpanProcessor(kept), "1"))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = recommender_pb2_grpc.RecommenderStub(channel)
        asked = pb.RecommendRequest(member=pb.Member(id="m5"), instruction=WISH, k=3)
        stub.Recommend(asked, metadata=(("traceparent", f"00-{TRACE}-{PARENT}-01"), ("x-request-id", "r-7")))
        stub.Recommend(asked, metadata=(("traceparent", f"00-{TRACE}-{PARENT}-00"),))
        with pytest.raises(grpc.RpcError):
            stub.Retrieve(pb.RetrieveRequest(member=pb.Member(id="nobody")), metadata=(("traceparent", "nonsense"),))
    stop()
    spans = kept.get_finished_spans()
    (call,) = [span for span in spans if span.name.endswith("/Recommend")]  # the second was not to be recorded
    assert f"{call.context.trace_id:032x}" == TRACE and call.parent is not None and f"{call.parent.span_id:016x}" == PARENT
    told = dict(call.attributes or {})
    assert told["brewline.request_id"] == "r-7" and told["brewline.snapshot"] == stack.snapshot.name
    assert told["brewline.results"] == 3 and told["brewline.degraded"] == "NONE" and WISH not in str(told)
    stages = [span for span in spans if span.parent is not None and span.parent.span_id == call.context.span_id]
    assert {"queue", "member", "encode", "search", "rank", "order"} <= {span.name for span in stages}
    edges = [call.start_time, *(edge for span in stages for edge in (span.start_time, span.end_time)), call.end_time]
    assert edges == sorted(edges) and all(edge is not None for edge in edges)
    (refused,) = [span for span in spans if span.name.endswith("/Retrieve")]
    assert refused.parent is None and not refused.status.is_ok and refused.status.description == "UnknownMember"


@pytest.mark.skipif(not INSTALLED, reason="the extra `traces` (OpenTelemetry) is not installed here")
def test_spans_reach_a_collector(stack: Stack, start: Start) -> None:
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
        def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
            del context
            took.extend(span.name for one in request.resource_spans for part in one.scope_spans for span in part.spans)
            return trace_service_pb2.ExportTraceServiceResponse()

    took: list[str] = []
    collector = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), collector)
    address = f"http://127.0.0.1:{collector.add_insecure_port('127.0.0.1:0')}"
    collector.start()
    port, stop = start(stack, traces=open_traces(address, "1"))
    with Client(f"127.0.0.1:{port}") as client:
        client.recommend("m5", k=3)
    stop()
    collector.stop(0)
    assert {"brewline.v1.Recommender/Recommend", "queue", "rank", "order"} <= set(took)


@pytest.mark.skipif(not INSTALLED, reason="the extra `traces` (OpenTelemetry) is not installed here")
def test_a_collector_that_takes_nothing_does_not_hold_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from opentelemetry.sdk.trace import SpanProcessor

    class Stuck(SpanProcessor):  # type: ignore[misc]
        def shutdown(self) -> None:
            go.wait(20)

    go = threading.Event()
    monkeypatch.setattr(traces, "CLOSE_S", 0.05)
    Traces(Stuck(), "1").close()
    assert not go.is_set() and "they are lost" in caplog.text
    go.set()


def test_the_client_still_reads_what_is_watched(port: int) -> None:
    with Client(f"127.0.0.1:{port}") as client:
        assert client.info().items == 60
