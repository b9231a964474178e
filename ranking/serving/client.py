"""A typed client: one method per call, a deadline on each, arrays back as numpy, errors as one line."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from index.errors import BrewlineError
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.change_messages import event_message, item_message, wanted_message
from ranking.serving.client_retry import Reply, never_reached, reply_to, why_not_reached
from ranking.serving.messages import member_message, pack_ids
from ranking.serving.replies import Answer, Changed, Explanation, Recorded, Row, ServerInfo, answer_of, explanation_of, info_of
from ranking.serving.security_client import Credentials, open_channel
from ranking.tasks_weighted import Weights
from retrieval.attributes import EVERYTHING, Wanted
from retrieval.data.schema import Item, MemberView
from retrieval.recent import Told

__all__ = ["Answer", "Changed", "Client", "Explanation", "Recorded", "Row", "ServerInfo", "ServiceError"]

DEADLINE_MS = 30_000
ATTEMPTS = 5
NO_WEIGHTS: Weights = {}
CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class ServiceError(BrewlineError):
    """The service answered with an error, or did not answer. `code` is the gRPC status ("NOT_FOUND")."""

    def __init__(self, address: str, code: str, details: str) -> None:
        super().__init__(f"{address} says {code}: {details}")
        self.code, self.details = code, details


class Client:
    """A connection to one server. `deadline_ms` holds for every call that does not name its own.

    A call that finds the server busy or away is made again, up to `attempts` times within its deadline: after as long as the
    server asks for, else after waits that double. `upsert` is not, once it may have been carried out. A `request_id` (letters,
    digits and `._:-`, at most 64) names a call in the server's logs, the same for every attempt; without one the client makes
    one, and the answer carries it.

    Without `credentials` those of the environment are shown (BREWLINE_CA, _CERT, _KEY, _TOKEN_FILE or _TOKEN), if there are any.
    Raises CertificateError or TokenError for files that cannot be used.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        deadline_ms: float = DEADLINE_MS,
        credentials: Credentials | None = None,
        *,
        attempts: int = ATTEMPTS,
    ) -> None:
        self.address, self.deadline_ms, self.attempts = address, deadline_ms, attempts
        self._channel = open_channel(address, Credentials.from_environment() if credentials is None else credentials)
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
        weights: Weights = NO_WEIGHTS,
        instruction: str = "",
        exclude: Sequence[str] = (),
        wanted: Wanted = EVERYTHING,
        surface: str = "",
        readable: bool = False,
        deadline_ms: float | None = None,
        request_id: str = "",
    ) -> Answer:
        """The `k` best items for a member (an id, or a view in full) out of `fanout` (0 = 2,000).

        The server notes them as shown if a `surface` is named, and only then: without one they teach no model. `weights` of
        several tasks make one final score, in the place of `task`. Raises ServiceError.
        """
        request = _recommend_request(member, k, fanout, task, weights, instruction, exclude, wanted)
        request.readable, request.surface = readable, surface
        reply: pb.RecommendResponse = self._call(self._stub.Recommend, request, deadline_ms, request_id)
        return answer_of(reply, task=reply.task, candidates=reply.candidates)

    def retrieve(
        self,
        member: str | MemberView,
        k: int = 0,
        *,
        instruction: str = "",
        exclude: Sequence[str] = (),
        wanted: Wanted = EVERYTHING,
        surface: str = "",
        readable: bool = False,
        deadline_ms: float | None = None,
        request_id: str = "",
    ) -> Answer:
        """The `k` (0 = 2,000) nearest items for a member; noted as shown if a surface is named. Raises ServiceError."""
        request = _retrieve_request(member, k, instruction, exclude, wanted, readable)
        request.surface = surface
        reply: pb.RetrieveResponse = self._call(self._stub.Retrieve, request, deadline_ms, request_id)
        return answer_of(reply, candidates=reply.results.count)

    def retrieve_batch(
        self,
        members: Sequence[str | MemberView],
        k: int = 0,
        *,
        instruction: str = "",
        exclude: Sequence[str] = (),
        wanted: Wanted = EVERYTHING,
        readable: bool = False,
        deadline_ms: float | None = None,
    ) -> list[Answer | ServiceError]:
        """What `retrieve` answers for each of at most 64 members, in their order; a member's own fault stands in its place.

        `times` and `request_id` are those of the whole batch. Raises ServiceError for what no single member is to blame for.
        """
        asked = [_retrieve_request(member, k, instruction, exclude, wanted, readable) for member in members]
        request = pb.RetrieveBatchRequest(requests=asked)
        reply: pb.RetrieveBatchResponse = self._call(self._stub.RetrieveBatch, request, deadline_ms)
        return [self._row(row, reply) for row in reply.rows]

    def rank(
        self,
        member: str | MemberView,
        items: Sequence[str],
        *,
        task: str = "",
        weights: Weights = NO_WEIGHTS,
        instruction: str = "",
        readable: bool = False,
        deadline_ms: float | None = None,
        request_id: str = "",
    ) -> Answer:
        """The items, the most probable first. Raises ServiceError."""
        request = pb.RankRequest(
            member=member_message(member),
            items=pack_ids(items),
            task=task,
            instruction=_wish(member, instruction),
            readable=readable,
            weights=_weights(weights),
        )
        reply: pb.RankResponse = self._call(self._stub.Rank, request, deadline_ms, request_id)
        return answer_of(reply, task=reply.task, candidates=reply.results.count)

    def explain(
        self,
        member: str | MemberView,
        item: str,
        k: int = 10,
        *,
        fanout: int = 0,
        task: str = "",
        weights: Weights = NO_WEIGHTS,
        instruction: str = "",
        exclude: Sequence[str] = (),
        wanted: Wanted = EVERYTHING,
        deadline_ms: float | None = None,
    ) -> Explanation:
        """Why an item is or is not in the answer of `recommend` to the same question. Raises ServiceError."""
        question = _recommend_request(member, k, fanout, task, weights, instruction, exclude, wanted)
        request = pb.ExplainRequest(question=question, item_id=item)
        reply: pb.ExplainResponse = self._call(self._stub.Explain, request, deadline_ms)
        return explanation_of(reply)

    def upsert(self, items: Sequence[Item], *, deadline_ms: float | None = None) -> Changed:
        """The items are kept and can be answered. Raises ServiceError.

        After UNAVAILABLE they may be kept or not. Sending them again puts them in again, also those withdrawn in between: that is
        for the caller to decide, so this call does not, unless the server surely did nothing.
        """
        request = pb.UpsertItemsRequest(items=[item_message(item) for item in items])
        reply: pb.UpsertItemsResponse = self._ask(self._stub.UpsertItems, request, deadline_ms, twice=False).message
        return Changed(reply.position, reply.provenance.snapshot, reply.request_id)

    def withdraw(self, items: Sequence[str], *, deadline_ms: float | None = None) -> Changed:
        """The items are in no later answer. Raises ServiceError.

        `were_here` is -1 if it is not known: an attempt whose answer was lost may have taken some of them away.
        """
        request = pb.WithdrawItemsRequest(items=pack_ids(items))
        asked = self._ask(self._stub.WithdrawItems, request, deadline_ms)
        reply: pb.WithdrawItemsResponse = asked.message
        were_here = -1 if asked.doubtful and reply.were_here < len(items) else reply.were_here
        return Changed(reply.position, reply.provenance.snapshot, reply.request_id, were_here)

    def record(self, member: str, told: Sequence[Told], *, deadline_ms: float | None = None) -> Recorded:
        """The engagements belong to the member, each event id once; sending them again changes nothing. Raises ServiceError."""
        request = pb.RecordEngagementsRequest(member_id=member, events=[event_message(one) for one in told])
        reply: pb.RecordEngagementsResponse = self._call(self._stub.RecordEngagements, request, deadline_ms)
        return Recorded(reply.recorded, reply.known, reply.request_id)

    def info(self, *, deadline_ms: float | None = None) -> ServerInfo:
        """What the server serves. Raises ServiceError."""
        reply: pb.InfoResponse = self._call(self._stub.Info, pb.InfoRequest(), deadline_ms)
        return info_of(reply)

    def _row(self, row: pb.BatchRow, reply: pb.RetrieveBatchResponse) -> Answer | ServiceError:
        if row.status:
            return ServiceError(self.address, CODES.get(row.status, str(row.status)), row.message)
        alone = pb.RetrieveResponse(
            results=row.results, provenance=reply.provenance, times=reply.times, request_id=reply.request_id
        )
        return answer_of(alone, candidates=row.results.count)

    def _call(self, method: Callable[..., Any], request: object, deadline_ms: float | None, request_id: str = "") -> Any:
        return self._ask(method, request, deadline_ms, request_id).message

    def _ask(
        self, method: Callable[..., Any], request: object, deadline_ms: float | None, request_id: str = "", *, twice: bool = True
    ) -> Reply:
        seconds = (self.deadline_ms if deadline_ms is None else deadline_ms) / 1e3
        try:
            return reply_to(method, request, seconds, self.attempts, request_id or uuid.uuid4().hex, twice=twice)
        except grpc.RpcError as error:
            raise ServiceError(self.address, error.code().name, _reason(error)) from error


def _reason(error: grpc.RpcError) -> str:
    details = error.details() or "no details"
    if never_reached(error):
        return why_not_reached(details.rpartition(": ")[2])
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return f"{details} (a token is read from BREWLINE_TOKEN_FILE or BREWLINE_TOKEN)"
    return details


def _recommend_request(
    member: str | MemberView,
    k: int,
    fanout: int,
    task: str,
    weights: Weights,
    instruction: str,
    exclude: Sequence[str],
    wanted: Wanted,
) -> pb.RecommendRequest:
    return pb.RecommendRequest(
        member=member_message(member),
        k=k,
        fanout=fanout,
        task=task,
        instruction=_wish(member, instruction),
        exclude=pack_ids(exclude),
        filter=wanted_message(wanted),
        weights=_weights(weights),
    )


def _retrieve_request(
    member: str | MemberView, k: int, instruction: str, exclude: Sequence[str], wanted: Wanted, readable: bool
) -> pb.RetrieveRequest:
    return pb.RetrieveRequest(
        member=member_message(member),
        k=k,
        instruction=_wish(member, instruction),
        exclude=pack_ids(exclude),
        filter=wanted_message(wanted),
        readable=readable,
    )


def _weights(weights: Weights) -> list[pb.Weight]:
    return [pb.Weight(task=task, weight=weight) for task, weight in weights.items()]


def _wish(member: str | MemberView, instruction: str) -> str:
    """The call's own instruction, else the one that the view carries."""
    return instruction or ("" if isinstance(member, str) else member.instruction)
