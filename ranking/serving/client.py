"""A typed client: one method per call, a deadline on each, arrays back as numpy, errors as one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from ranking.pipeline import Degraded
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.messages import member_message, pack_ids, unpack_ids
from retrieval.data.schema import MemberView

Floats = npt.NDArray[np.float32]
DEADLINE_MS = 30_000


class ServiceError(BrewlineError):
    """The service answered with an error, or did not answer. `code` is the gRPC status ("NOT_FOUND")."""

    def __init__(self, address: str, code: str, details: str) -> None:
        super().__init__(f"{address} says {code}: {details}")
        self.code, self.details = code, details


@dataclass(frozen=True)
class Row:
    """One row of an answer with its words; `score` or `probability` is None where it was not computed."""

    item_id: str
    title: str
    category: str
    creator: str
    score: float | None
    probability: float | None
    place: int


@dataclass(frozen=True)
class Answer:
    """K items, best first. `scores`, `probabilities` float32 [K] (None where not computed), `places` int64 [K].

    `scores` are cosines if `first_stage` is "dense", merged scores if it is "hybrid".
    `rows` are the same with words, if they were asked for. `times` are microseconds by stage.
    """

    ids: list[str]
    scores: Floats | None
    probabilities: Floats | None
    places: npt.NDArray[np.int64]
    rows: list[Row]
    snapshot: str
    encoder: str
    ranker: str
    times: Mapping[str, int]
    request_id: str
    task: str = ""
    candidates: int = 0
    degraded: Degraded = Degraded.NONE
    degraded_detail: str = ""
    first_stage: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ServerInfo:
    """What is being served; `as_of` in seconds UTC."""

    version: str
    snapshot: str
    encoder: str
    ranker: str
    items: int
    dims: int
    index: str
    tasks: list[str] = field(default_factory=list)
    as_of: int = 0
    attention: str = ""
    uptime_seconds: float = 0.0
    requests: int = 0
    codes: str = ""
    first_stage: str = ""


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
            readable=readable,
        )
        reply: pb.RecommendResponse = self._call(self._stub.Recommend, request, deadline_ms)
        return _answer(
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
        readable: bool = False,
        deadline_ms: float | None = None,
    ) -> Answer:
        """The `k` (0 = 2,000) nearest items for a member. Raises ServiceError."""
        request = pb.RetrieveRequest(
            member=member_message(member),
            k=k,
            instruction=_wish(member, instruction),
            exclude=pack_ids(exclude),
            readable=readable,
        )
        reply: pb.RetrieveResponse = self._call(self._stub.Retrieve, request, deadline_ms)
        return _answer(reply, candidates=reply.results.count)

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
        return _answer(reply, task=reply.task, candidates=reply.results.count)

    def info(self, *, deadline_ms: float | None = None) -> ServerInfo:
        """What the server serves. Raises ServiceError."""
        reply: pb.InfoResponse = self._call(self._stub.Info, pb.InfoRequest(), deadline_ms)
        return ServerInfo(
            version=reply.version,
            snapshot=reply.provenance.snapshot,
            encoder=reply.provenance.encoder,
            ranker=reply.provenance.ranker,
            items=reply.items,
            dims=reply.dims,
            index=reply.index,
            tasks=list(reply.tasks),
            as_of=reply.as_of,
            attention=reply.attention,
            uptime_seconds=reply.uptime_seconds,
            requests=reply.requests,
            codes=reply.codes,
            first_stage=reply.provenance.first_stage,
        )

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


def _answer(
    reply: pb.RecommendResponse | pb.RetrieveResponse | pb.RankResponse,
    *,
    candidates: int,
    task: str = "",
    degraded: Degraded = Degraded.NONE,
    detail: str = "",
) -> Answer:
    results = reply.results
    return Answer(
        ids=unpack_ids(results.ids),
        scores=_floats(results.scores),
        probabilities=_floats(results.probabilities),
        places=np.frombuffer(results.places, "<u4").astype(np.int64),
        rows=[_row(item) for item in results.items],
        snapshot=reply.provenance.snapshot,
        encoder=reply.provenance.encoder,
        ranker=reply.provenance.ranker,
        times={stage.name: getattr(reply.times, stage.name) for stage in pb.StageTimes.DESCRIPTOR.fields},
        request_id=reply.request_id,
        task=task,
        candidates=candidates,
        degraded=degraded,
        degraded_detail=detail,
        first_stage=reply.provenance.first_stage,
    )


def _floats(packed: bytes) -> Floats | None:
    return np.frombuffer(packed, "<f4") if packed else None


def _row(item: pb.ResultItem) -> Row:
    return Row(
        item_id=item.item_id,
        title=item.title,
        category=item.category,
        creator=item.creator,
        score=item.score if item.HasField("score") else None,
        probability=item.probability if item.HasField("probability") else None,
        place=item.place,
    )
