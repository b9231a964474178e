"""The calls on the event loop: each is named, timed, run by the worker, kept to its deadline, and logged."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import uuid
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol, TypeVar, cast

import grpc

from ranking.serving import answers, changes, recommender_pb2_grpc
from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import Call
from ranking.serving.batch import retrieve_batch
from ranking.serving.current import Current
from ranking.serving.explain import explain
from ranking.serving.stack import Stack
from ranking.serving.status import Late, message_of, status_of
from ranking.serving.worker import Worker

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
REPLY_S = 0.005
"""Seconds before the deadline at which an answer without ranking is sent if ranking still runs."""

log = logging.getLogger(__name__)

Request = TypeVar("Request", contravariant=True)
Response = TypeVar("Response", covariant=True)


class Work(Protocol[Request, Response]):
    """One of the functions of `ranking.serving.answers` and `ranking.serving.changes`."""

    def __call__(self, stack: Stack, request: Request, call: Call, /) -> Response: ...


class RecommenderService(recommender_pb2_grpc.RecommenderServicer):
    """Answers from the current stack, one request at a time."""

    def __init__(self, current: Current, worker: Worker) -> None:
        self._current = current
        self._worker = worker
        self._since = time.monotonic()
        self._requests = 0

    @property
    def stack(self) -> Stack:
        """The stack that the next request gets."""
        return self._current.stack

    async def Recommend(self, request: pb.RecommendRequest, context: grpc.aio.ServicerContext) -> pb.RecommendResponse:
        """See the contract."""
        return await self._answer("Recommend", answers.recommend, request, context)

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

    async def _answer(
        self, method: str, work: Work[Request, Response], request: Request, context: grpc.aio.ServicerContext
    ) -> Response:
        self._requests += 1
        left = context.time_remaining()
        now = time.monotonic()
        call = Call(_request_id(context), now, math.inf if left is None else now + left)
        try:
            response = await self._in_time(work, request, call)
        except Exception as error:
            await context.abort(self._refused(method, call, error), message_of(error, call.request_id))
        times = {f"{stage}_us": micros for stage, micros in call.watch.micros.items()}
        log.info("answered", extra={"method": method, "request_id": call.request_id, **times})
        return response

    async def _in_time(self, work: Work[Request, Response], request: Request, call: Call) -> Response:
        stack = self.stack

        def run() -> Response:
            call.started = time.monotonic()
            if call.abandoned or call.started >= call.deadline:
                raise Late("the deadline passed while the request waited; give more time, or ask again when it is quieter")
            return work(stack.now(), request, call)

        future = self._worker.submit(run)
        timeout = None if math.isinf(call.deadline) else max(call.deadline - time.monotonic() - REPLY_S, 0)
        try:
            return await asyncio.wait_for(asyncio.shield(future), timeout)
        except TimeoutError:
            if call.early is None:
                raise Late("the deadline passed before the answer was ready; give more time or a smaller fanout") from None
            call.early.times.CopyFrom(call.times())
            return cast(Response, call.early)
        finally:
            call.abandoned = True

    @staticmethod
    def _refused(method: str, call: Call, error: Exception) -> grpc.StatusCode:
        code = status_of(error)
        told = {"method": method, "request_id": call.request_id, "code": code.name, "error": type(error).__name__}
        if code is grpc.StatusCode.INTERNAL:
            log.error("request %s failed", call.request_id, extra=told, exc_info=error)
        else:
            log.info("refused", extra=told)
        return code


def _request_id(context: grpc.aio.ServicerContext) -> str:
    """The caller's `x-request-id` if it is one that a log can carry, else a new one."""
    given = dict(context.invocation_metadata() or ()).get("x-request-id", "")
    return given if isinstance(given, str) and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def code_version() -> str:
    """The version of the installed distribution, "unknown" when run from a bare checkout."""
    try:
        return version("brewline")
    except PackageNotFoundError:
        return "unknown"
