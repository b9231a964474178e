"""The client asks again what may be asked again, as long as the server says, and not beyond its deadline."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from typer.testing import CliRunner

from ranking.cli.ask import app
from ranking.pipeline import Degraded
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.client import Client, ServiceError
from ranking.serving.client_retry import FIRST_S, MOST_S, wait_before
from retrieval.data.schema import Item
from retrieval.recent import Told
from retrieval.records import Entry

Code = grpc.StatusCode
Fault = tuple[grpc.StatusCode, str | None]


class Moody(recommender_pb2_grpc.RecommenderServicer):
    """A server that fails as it is told to, one fault a call, and then answers."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.ids: list[str] = []
        self.asked: list[object] = []

    def _moody(self, request: object, context: grpc.ServicerContext) -> str:
        self.asked.append(request)
        self.ids.append(dict(context.invocation_metadata())["x-request-id"])
        if self.faults:
            code, pushback = self.faults.pop(0)
            if pushback is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", pushback),))
            context.abort(code, "in a mood")
        return self.ids[-1]

    def Recommend(self, request: pb.RecommendRequest, context: grpc.ServicerContext) -> pb.RecommendResponse:
        name = self._moody(request, context)
        columns = [pb.TaskColumn(task=one.task, probabilities=b"\x00\x00\x80\x3e") for one in request.weights]
        results = pb.Results(tasks=columns)
        return pb.RecommendResponse(
            request_id=name, degraded=pb.STALE_MEMBER, degraded_detail="so", weights=request.weights, results=results
        )

    def Retrieve(self, request: pb.RetrieveRequest, context: grpc.ServicerContext) -> pb.RetrieveResponse:
        return pb.RetrieveResponse(request_id=self._moody(request, context), degraded=pb.STALE_MEMBER)

    def RecordEngagements(
        self, request: pb.RecordEngagementsRequest, context: grpc.ServicerContext
    ) -> pb.RecordEngagementsResponse:
        return pb.RecordEngagementsResponse(request_id=self._moody(request, context), recorded=len(request.events))

    def UpsertItems(self, request: pb.UpsertItemsRequest, context: grpc.ServicerContext) -> pb.UpsertItemsResponse:
        return pb.UpsertItemsResponse(request_id=self._moody(request, context), position=7)

    def WithdrawItems(self, request: pb.WithdrawItemsRequest, context: grpc.ServicerContext) -> pb.WithdrawItemsResponse:
        return pb.WithdrawItemsResponse(request_id=self._moody(request, context), were_here=1)


@pytest.fixture
def moody() -> Iterator[tuple[Moody, str]]:
    servicer = Moody()
    server = grpc.server(ThreadPoolExecutor(2))
    recommender_pb2_grpc.add_RecommenderServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED])
@pytest.mark.parametrize("pushback", [None, "0", "30"])
def test_busy_and_away_are_asked_again_under_one_name(
    moody: tuple[Moody, str], code: grpc.StatusCode, pushback: str | None
) -> None:
    servicer, address = moody
    servicer.faults = [(code, pushback)] * 3
    with Client(address) as client:
        answer = client.recommend("m1", surface="feed")
    assert len(servicer.ids) == 4 and set(servicer.ids) == {answer.request_id}
    assert answer.degraded is Degraded.STALE_MEMBER and answer.degraded_detail == "so"
    assert all(isinstance(one, pb.RecommendRequest) and one.surface == "feed" for one in servicer.asked)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ((Code.INVALID_ARGUMENT, None), "INVALID_ARGUMENT"),
        ((Code.INTERNAL, None), "INTERNAL"),
        ((Code.DEADLINE_EXCEEDED, None), "DEADLINE_EXCEEDED"),
        ((Code.DATA_LOSS, "1"), "DATA_LOSS"),
        ((Code.UNAVAILABLE, "-1"), "UNAVAILABLE"),  # the server's way of saying: do not come back
        ((Code.UNAVAILABLE, "soon"), "UNAVAILABLE"),
        ((Code.UNAVAILABLE, "60000"), "UNAVAILABLE"),  # longer than there is time
    ],
)
def test_other_failures_are_told_at_once(moody: tuple[Moody, str], fault: Fault, code: str) -> None:
    servicer, address = moody
    servicer.faults = [fault]
    with Client(address, deadline_ms=20_000) as client:
        with pytest.raises(ServiceError) as caught:
            client.retrieve("m1", request_id="mine")
        assert caught.value.code == code and servicer.ids == ["mine"]
        assert client.retrieve("m1").degraded is Degraded.STALE_MEMBER


def test_attempts_and_the_deadline_are_the_end(moody: tuple[Moody, str]) -> None:
    servicer, address = moody
    servicer.faults = [(Code.UNAVAILABLE, "1")] * 100
    with Client(address) as client, pytest.raises(ServiceError, match="UNAVAILABLE"):
        client.retrieve("m1")
    assert len(servicer.ids) == 5
    with Client(address, attempts=1_000, deadline_ms=400) as client, pytest.raises(ServiceError):
        servicer.faults = [(Code.UNAVAILABLE, None)] * 1_000
        client.retrieve("m1")
    assert 5 < len(servicer.ids) < 20, "the waits grow"


def test_engagements_are_sent_again_with_the_ids_that_make_it_harmless(moody: tuple[Moody, str]) -> None:
    servicer, address = moody
    servicer.faults = [(Code.UNAVAILABLE, None)]
    with Client(address) as client:
        assert client.record("m1", [Told("e1", Entry("i1", 5, "like"), "the request", "feed")]).recorded == 1
    first, second = servicer.asked
    assert isinstance(first, pb.RecordEngagementsRequest) and first == second
    (event,) = first.events
    assert (event.event_id, event.request_id, event.surface) == ("e1", "the request", "feed")


def test_items_are_not_put_in_again_if_they_may_be_in_already(moody: tuple[Moody, str]) -> None:
    """Somebody may have withdrawn them in between: only who sent them can decide that they are to come back."""
    servicer, address = moody
    with Client(address) as client:
        servicer.faults = [(Code.UNAVAILABLE, None)]
        with pytest.raises(ServiceError, match="UNAVAILABLE"):
            client.upsert([Item("i1", "roses")])
        assert len(servicer.asked) == 1
        servicer.faults = [(Code.UNAVAILABLE, "1"), (Code.RESOURCE_EXHAUSTED, None)]  # refused: surely not done
        assert client.upsert([Item("i1", "roses")]).position == 7 and len(servicer.asked) == 4


def test_items_are_put_in_by_a_server_that_comes_later(moody: tuple[Moody, str]) -> None:
    """Where nobody listened nothing can have been done."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    server = grpc.server(ThreadPoolExecutor(2))
    recommender_pb2_grpc.add_RecommenderServicer_to_server(moody[0], server)
    with Client(f"127.0.0.1:{port}", attempts=50) as client, ThreadPoolExecutor(1) as pool:
        with pytest.raises(ServiceError, match="nobody answers"):
            client.upsert([Item("i1", "roses")], deadline_ms=300)
        done = pool.submit(client.upsert, [Item("i1", "roses")])
        assert server.add_insecure_port(f"127.0.0.1:{port}") == port
        server.start()
        assert done.result(30).position == 7
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("fault", "items", "were_here"),
    [
        (None, ["a", "b"], 1),
        ((Code.UNAVAILABLE, "1"), ["a", "b"], 1),  # refused: surely not done
        ((Code.UNAVAILABLE, None), ["a", "b"], -1),  # the other may have been taken away by the attempt before
        ((Code.UNAVAILABLE, None), ["a"], 1),  # all of them were there
    ],
)
def test_how_many_withdrawn_items_were_there_is_said_only_if_it_is_known(
    moody: tuple[Moody, str], fault: Fault | None, items: list[str], were_here: int
) -> None:
    servicer, address = moody
    servicer.faults = [] if fault is None else [fault]
    with Client(address) as client:
        assert client.withdraw(items).were_here == were_here
    shown = CliRunner().invoke(app, ["withdraw", *items, "--address", address])
    assert shown.exit_code == 0 and f"1 of {len(items)} items were there" in shown.output
    servicer.faults = [(Code.UNAVAILABLE, None)]
    shown = CliRunner().invoke(app, ["withdraw", "a", "b", "--address", address])
    assert "2 items are gone; how many were there is not known" in " ".join(shown.output.split())


def test_weights_go_out_and_come_back(moody: tuple[Moody, str]) -> None:
    with Client(moody[1]) as client:
        answer = client.recommend("m1", weights={"like": 1.0, "hide": -0.5})
    assert answer.weights == {"like": 1.0, "hide": -0.5} and {name: column.tolist() for name, column in answer.tasks.items()} == {
        "like": [0.25],
        "hide": [0.25],
    }


class Failure(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str = "", metadata: tuple[tuple[str, str], ...] | None = None) -> None:
        super().__init__()
        self.code, self.details, self.trailing_metadata = lambda: code, lambda: details, lambda: metadata


def test_waits_double_up_to_a_bound_and_differ() -> None:
    def waits(attempt: int) -> list[float]:
        return [wait_before(Failure(Code.UNAVAILABLE), attempt) or 0.0 for _ in range(200)]

    for attempt in range(1, 12):
        most = min(FIRST_S * 2 ** (attempt - 1), MOST_S)
        assert most / 2 <= min(waits(attempt)) < max(waits(attempt)) <= most
    said = [wait_before(Failure(Code.RESOURCE_EXHAUSTED, "", (("grpc-retry-pushback-ms", "200"),)), 1) or 0.0 for _ in range(99)]
    assert 0.2 <= min(said) < max(said) <= 0.22
    assert wait_before(Failure(Code.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9 vs. 4)"), 1) is None


def test_a_real_message_that_is_too_large_is_not_sent_again(port: int) -> None:
    with Client(f"127.0.0.1:{port}", attempts=50, deadline_ms=60_000) as client, pytest.raises(ServiceError) as caught:
        client.recommend("m1", exclude=["x" * 500] * 20_000)
    assert caught.value.code == "RESOURCE_EXHAUSTED" and "larger than max" in caught.value.details
