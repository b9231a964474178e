"""The calls on the event loop: each is let in, named, timed, run by the worker, kept to its deadline, and logged."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import Message
from prometheus_client import Histogram

from ranking.serving import answers, changes, recommender_pb2_grpc
from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import Call
from ranking.serving.batch import retrieve_batch
from ranking.serving.current import Current
from ranking.serving.explain import explain
from ranking.serving.gather import Asked, rehearse, retrieve_together
from ranking.serving.load_shed import first_stage, kind_of
from ranking.serving.load_shed_depth import LEAST_DEPTH, Depth
from ranking.serving.load_shed_door import Metadata, caller_of
from ranking.serving.queue_fair import Job
from ranking.serving.queue_forecast import Kind
from ranking.serving.stack import Stack
from ranking.serving.status import Late, Overloaded, message_of, status_of
from ranking.serving.visit import visit
from ranking.serving.worker import Failed, Worker
from ranking.serving.workers_peers import Change, Peers

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Upper bounds for how many were taken together."""
REPLY_SHARE, REPLY_S = 0.02, (0.005, 0.05)
"""What is left of a call's time, as a share and within these seconds, when an answer without ranking is sent because ranking
still runs: it has a way to go, and on a busy machine to wait for its turn."""

FIRST_STAGES = ("member", "encode", "search")
RETRY_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata that gRPC's own retries understand: wait so long, then ask again."""

log = logging.getLogger(__name__)

Request = TypeVar("Request", contravariant=True)
Response = TypeVar("Response", covariant=True)


class Work(Protocol[Request, Response]):
    """One of the functions of `ranking.serving.answers` and `ranking.serving.changes`."""

    def __call__(self, stack: Stack, request: Request, call: Call, /) -> Response: ...


ITEM_CHANGES: dict[str, tuple[type[Message], type[Message], Work[Any, Any]]] = {
    "UpsertItems": (pb.UpsertItemsRequest, pb.UpsertItemsResponse, changes.upsert_items),
    "WithdrawItems": (pb.WithdrawItemsRequest, pb.WithdrawItemsResponse, changes.withdraw_items),
}
"""Calls that one process of a store carries out for all: request, response, work."""


class RecommenderService(recommender_pb2_grpc.RecommenderServicer):
    """Answers from the current stack, in the order that the worker's queue gives. `tokens`: callers are told apart by theirs.
    `peers`: other processes answer at the same address, and one of them may be who writes changes of items."""

    def __init__(
        self,
        current: Current,
        worker: Worker,
        *,
        tokens: bool = False,
        least_depth: int = LEAST_DEPTH,
        peers: Peers | None = None,
    ) -> None:
        self._current = current
        self._worker = worker
        self._tokens, self._peers = tokens, peers
        self._depth = Depth(worker.pressure, least_depth)
        self._since = time.monotonic()
        self._requests = 0
        told = "Calls that were answered together."
        self.gathered = Histogram("brewline_batch_size", told, ("method",), registry=None, buckets=SIZES)
        self._together_sizes = self.gathered.labels("Retrieve")

    @property
    def stack(self) -> Stack:
        """The stack that the next request gets."""
        return self._current.stack

    async def Recommend(self, request: pb.RecommendRequest, context: grpc.aio.ServicerContext) -> pb.RecommendResponse:
        """See the contract."""
        return await self._answer("Recommend", self._depth.recommend, request, context)

    async def Retrieve(self, request: pb.RetrieveRequest, context: grpc.aio.ServicerContext) -> pb.RetrieveResponse:
        """See the contract."""
        return await self._answer("Retrieve", answers.retrieve, request, context)

    async def RetrieveBatch(
        self, request: pb.RetrieveBatchRequest, context: grpc.aio.ServicerContext
    ) -> pb.RetrieveBatchResponse:
        """See the contract."""
        return await self._answer("RetrieveBatch", retrieve_batch, request, context)

    async def Rank(self, request: pb.RankRequest, context: grpc.aio.ServicerContext) -> pb.RankResponse:
        """See the contract."""
        return await self._answer("Rank", answers.rank, request, context)

    async def Explain(self, request: pb.ExplainRequest, context: grpc.aio.ServicerContext) -> pb.ExplainResponse:
        """See the contract."""
        return await self._answer("Explain", explain, request, context)

    async def UpsertItems(self, request: pb.UpsertItemsRequest, context: grpc.aio.ServicerContext) -> pb.UpsertItemsResponse:
        """See the contract."""
        return await self._answer("UpsertItems", changes.upsert_items, request, context)

    async def WithdrawItems(
        self, request: pb.WithdrawItemsRequest, context: grpc.aio.ServicerContext
    ) -> pb.WithdrawItemsResponse:
        """See the contract."""
        return await self._answer("WithdrawItems", changes.withdraw_items, request, context)

    async def RecordEngagements(
        self, request: pb.RecordEngagementsRequest, context: grpc.aio.ServicerContext
    ) -> pb.RecordEngagementsResponse:
        """See the contract."""
        return await self._answer("RecordEngagements", changes.record_engagements, request, context)

    async def Info(self, request: pb.InfoRequest, context: grpc.aio.ServicerContext) -> pb.InfoResponse:
        """See the contract."""
        del request, context
        stack = self.stack
        moment, _ = stack.today.shown
        return pb.InfoResponse(
            version=code_version(),
            provenance=answers.provenance(stack, ranked=True),
            items=moment.items,
            dims=stack.encoder.dims,
            index=stack.snapshot.manifest.recipe,
            codes=stack.snapshot.manifest.dtype,
            tasks=[] if stack.ranker is None else list(stack.ranker.tasks),
            as_of=stack.catalog.as_of,
            attention="" if stack.ranker is None else stack.ranker.engine.backend,
            uptime_seconds=time.monotonic() - self._since,
            requests=self._requests,
            live_position=moment.position,
            live_items=moment.alive.size,
        )

    def expect(self) -> None:
        """See Doorman."""
        self._worker.expect()

    async def let_in(self, method: str, context: grpc.aio.ServicerContext) -> None:
        """See Doorman."""
        caller = self._caller(context)
        try:
            self._worker.let_in(caller, method)
        except Exception as error:
            self._requests += 1
            await self._refuse(method, error, _call(context), caller, context)

    async def _answer(
        self, method: str, work: Work[Request, Response], request: Request, context: grpc.aio.ServicerContext
    ) -> Response:
        self._requests += 1
        call, caller = _call(context), self._caller(context)
        try:
            response = cast(Response, await self._run(method, work, request, call, caller))
        except Exception as error:
            await self._refuse(method, error, call, caller, context)
        _told(method, grpc.StatusCode.OK, call, caller)
        return response

    async def _run(self, method: str, work: Work[Request, Response], request: Request, call: Call, caller: str) -> object:
        """What comes of a request in this process; of a change of items, in whichever worker writes them."""

        def here() -> Awaitable[Any]:
            return self._in_time(self._job(method, work, request, call, caller), call)

        if self._peers is None or method not in ITEM_CHANGES:
            return await here()
        change = Change(method, cast(Message, request).SerializeToString(), caller, call.request_id, call.deadline)
        try:
            return await self._peers.change(change, ITEM_CHANGES[method][1], here)
        finally:
            call.started = call.started or call.arrived  # a neighbour's queue is not this one's

    async def take(self, change: Change) -> Message:
        """What comes in this process of a change that another worker was sent. Raises what the change raises."""
        asked, _, work = ITEM_CHANGES[change.method]
        call = Call(change.request_id, time.monotonic(), change.deadline)
        return cast(
            Message, await self._in_time(self._job(change.method, work, asked.FromString(change.raw), call, change.caller), call)
        )

    async def _in_time(self, job: Job, call: Call) -> object:
        """The answer, or one without ranking if that is all there is at the deadline. Raises Late, and what the work raises."""
        future = self._worker.put(job)
        way = min(max(REPLY_SHARE * (call.deadline - call.arrived), REPLY_S[0]), REPLY_S[1])
        timeout = None if math.isinf(call.deadline) else max(call.deadline - time.monotonic() - way, 0)
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            if call.early is None:
                raise Late("the deadline passed before the answer was ready; give more time or a smaller fanout") from None
            call.early.times.CopyFrom(call.times())
            return call.early

    def _job(self, method: str, work: Work[Request, Response], request: Request, call: Call, caller: str) -> Job:
        """The request as the queue knows it. The stack is read at its turn: what waited out a swap gets the new night."""
        kind = kind_of(method, request)

        def run() -> Response:
            call.started = time.monotonic()
            response = work(self.stack.now(), request, call)
            if isinstance(response, pb.RecommendResponse):
                measure(job, response, call, self._depth.share)
            return response

        job = Job(run, caller, kind, call.deadline, first_stage(kind) if method == "Recommend" else None)
        if isinstance(request, pb.RetrieveRequest):
            job.again, job.counted = lambda: rehearse(self.stack.now(), request), self._together_sizes.observe
            job.together, job.asked, job.tokens = self._together, (request, call), self.stack.encoder.writer.budgets.member
        return job

    def _together(self, jobs: Sequence[Job]) -> list[object]:
        """What came of several Retrieves that are run at once."""
        asked: list[Asked] = [job.asked for job in jobs]
        now = time.monotonic()
        for _, call in asked:
            call.started = now
        answered = retrieve_together(self.stack.now(), asked)
        return [Failed(one) if isinstance(one, Exception) else one for one in answered]

    def _caller(self, context: grpc.aio.ServicerContext) -> str:
        return caller_of(_metadata(context), context.peer(), tokens=self._tokens)

    async def _refuse(
        self, method: str, error: Exception, call: Call, caller: str, context: grpc.aio.ServicerContext
    ) -> NoReturn:
        """The call ends with the error's status; one that may be asked again says when."""
        code = status_of(error)
        _told(method, code, call, caller, error)
        trailing = ((RETRY_KEY, str(math.ceil(error.retry_s * 1e3))),) if isinstance(error, Overloaded) else ()
        await context.abort(code, message_of(error, call.request_id), trailing)
        raise AssertionError("abort does not return")


def _told(method: str, code: grpc.StatusCode, call: Call, caller: str, error: Exception | None = None) -> None:
    """The one end of every call: for whom it was and what stood in its way; `observe` counts it and logs it."""
    seen = visit()
    seen.caller, seen.refusal = caller, "" if error is None else type(error).__name__
    if code is grpc.StatusCode.INTERNAL:
        told = {"method": method, "request_id": call.request_id, "caller": caller, "code": code.name, "error": seen.refusal}
        log.error("request %s failed", call.request_id, extra=told, exc_info=error)


def measure(job: Job, response: pb.RecommendResponse, call: Call, share: float) -> None:
    """What was run is what the forecast learns: the depth that was ranked, and how long the part took that comes before it."""
    if job.first is not None:
        micros = call.watch.micros
        job.parts.append((job.first, sum(micros.get(stage, 0) for stage in FIRST_STAGES) / 1e6))
    name = job.kind.name if response.provenance.ranker else f"{job.kind.name} unranked"
    job.kind = Kind(name, round(job.kind.size * share))


def _call(context: grpc.aio.ServicerContext) -> Call:
    left, now = context.time_remaining(), time.monotonic()
    visit().call = call = Call(_request_id(context), now, math.inf if left is None else now + left)
    return call


def _metadata(context: grpc.aio.ServicerContext) -> Metadata:
    """What the caller sent beside the request, read once when it arrived: the context makes it anew whenever it is asked."""
    return visit().metadata or context.invocation_metadata() or ()


def _request_id(context: grpc.aio.ServicerContext) -> str:
    """The caller's `x-request-id` if it is one that a log can carry, else a new one."""
    given = dict(_metadata(context)).get("x-request-id", "")
    return given if isinstance(given, str) and REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def code_version() -> str:
    """The version of the installed distribution, "unknown" when run from a bare checkout."""
    try:
        return version("brewline")
    except PackageNotFoundError:
        return "unknown"
