"""A typed client: one method per call, a deadline on each, arrays back as numpy, errors as one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from index.errors import BrewlineError
from ranking.pipeline import Degraded
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.change_messages import event_message, item_message, wanted_message
from ranking.serving.messages import member_message, pack_ids
from ranking.serving.replies import Answer, Changed, Recorded, Row, ServerInfo, answer_of, info_of
from retrieval.attributes import EVERYTHING, Wanted
from retrieval.data.schema import Item, MemberView
from retrieval.recent import Told

__all__ = ["Answer", "Changed", "Client", "Recorded", "Row", "ServerInfo", "ServiceError"]

DEADLINE_MS = 30_000


class ServiceError(BrewlineError):
    """The service answered with an error, or did not answer. `code` is the gRPC status ("NOT_FOUND")."""

    def __init__(self, address: str, code: str, details: str) -> None:
        super().__init__(f"{address} says {code}: {details}")
        self.code, self.details = code, details


class Client:
    """A connection to one server. `deadline_ms` holds for every call that does not name its own."""

    def __init__(self, address: str = "127.0.0.1:50051", deadline_ms: float = DEADLINE_MS) -> None:
        self.address, self.deadline_ms = address, deadline_ms
        self._channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
        self._stub = recommender_pb2_grpc.RecommenderStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """The connection is closed."""
        self._channel.close()

    def recommend(
        self,
        member: str | MemberView,
        k: int = 10,
        *,
        fanout: int = 0,
        task: str = "",
        instruction: str = "",
        exclude: Sequence[str] = (),
        wanted: Wanted = EVERYTHING,
        readable: bool = False,
        deadline_ms: float | None = None,
    ) -> Answer:
        """The `k` best items for a member (an id, or a view in full) out of `fanout` (0 = 2,000). Raises ServiceError."""
        request = pb.RecommendRequest(
            member=member_message(member),
            k=k,
            fanout=fanout,
            task=task,
            instruction=_wish(member, instruction),
            exclude=pack_ids(exclude),
            filter=wanted_message(wanted),
            readable=readable,
        )
        reply: pb.RecommendResponse = self._call(self._stub.Recommend, request, deadline_ms)
        return answer_of(
            reply,
            task=reply.task,
            candidates=reply.candidates,
            degraded=Degraded(reply.degraded),
            detail=reply.degraded_detail,
        )

    def retrieve(
        self,
        member: str | MemberView,
        k: int = 0,
        *,
        instruction: str = "",
        exclude: Sequence[str] = (),
        wanted: Wanted = EVERYTHING,
        readable: bool = False,
        deadline_ms: float | None = None,
    ) -> Answer:
        """The `k` (0 = 2,000) nearest items for a member. Raises ServiceError."""
        request = pb.RetrieveRequest(
            member=member_message(member),
            k=k,
            instruction=_wish(member, instruction),
            exclude=pack_ids(exclude),
            filter=wanted_message(wanted),
            readable=readable,
        )
        reply: pb.RetrieveResponse = self._call(self._stub.Retrieve, request, deadline_ms)
        return answer_of(reply, candidates=reply.results.count)

    def rank(
        self,
        member: str | MemberView,
        items: Sequence[str],
        *,
        task: str = "",
        instruction: str = "",
        readable: bool = False,
        deadline_ms: float | None = None,
    ) -> Answer:
        """The items, the most probable first. Raises ServiceError."""
        request = pb.RankRequest(
            member=member_message(member),
            items=pack_ids(items),
            task=task,
            instruction=_wish(member, instruction),
            readable=readable,
        )
        reply: pb.RankResponse = self._call(self._stub.Rank, request, deadline_ms)
        return answer_of(reply, task=reply.task, candidates=reply.results.count)

    def upsert(self, items: Sequence[Item], *, deadline_ms: float | None = None) -> Changed:
        """The items are kept and can be answered; sending them again changes nothing. Raises ServiceError."""
        request = pb.UpsertItemsRequest(items=[item_message(item) for item in items])
        reply: pb.UpsertItemsResponse = self._call(self._stub.UpsertItems, request, deadline_ms)
        return Changed(reply.position, reply.provenance.snapshot, reply.request_id)

    def withdraw(self, items: Sequence[str], *, deadline_ms: float | None = None) -> Changed:
        """The items are in no later answer. Raises ServiceError."""
        request = pb.WithdrawItemsRequest(items=pack_ids(items))
        reply: pb.WithdrawItemsResponse = self._call(self._stub.WithdrawItems, request, deadline_ms)
        return Changed(reply.position, reply.provenance.snapshot, reply.request_id, reply.were_here)

    def record(self, member: str, told: Sequence[Told], *, deadline_ms: float | None = None) -> Recorded:
        """The engagements belong to the member, each event id once; sending them again changes nothing. Raises ServiceError."""
        request = pb.RecordEngagementsRequest(member_id=member, events=[event_message(one) for one in told])
        reply: pb.RecordEngagementsResponse = self._call(self._stub.RecordEngagements, request, deadline_ms)
        return Recorded(reply.recorded, reply.known, reply.request_id)

    def info(self, *, deadline_ms: float | None = None) -> ServerInfo:
        """What the server serves. Raises ServiceError."""
        reply: pb.InfoResponse = self._call(self._stub.Info, pb.InfoRequest(), deadline_ms)
        return info_of(reply)

    def _call(self, method: Callable[..., Any], request: object, deadline_ms: float | None) -> Any:
        seconds = (self.deadline_ms if deadline_ms is None else deadline_ms) / 1e3
        try:
            return method(request, timeout=seconds)
        except grpc.RpcError as error:
            raise ServiceError(self.address, error.code().name, _reason(error)) from error


def _reason(error: grpc.RpcError) -> str:
    details = error.details() or "no details"
    if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in details:
        return f"nobody answers ({details.rpartition(': ')[2]}); is `brewline serve` running there?"
    return details


def _wish(member: str | MemberView, instruction: str) -> str:
    """The call's own instruction, else the one that the view carries."""
    return instruction or ("" if isinstance(member, str) else member.instruction)
