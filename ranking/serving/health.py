"""The standard health service, answered by a real tiny encode and search, not by the mere fact that a port is open."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ranking.serving import recommender_pb2
from ranking.serving.service import RecommenderService
from ranking.serving.status import Draining
from ranking.serving.worker import Worker

NAMES = ("", recommender_pb2.DESCRIPTOR.services_by_name["Recommender"].full_name)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

log = logging.getLogger(__name__)


class HealthService(health_pb2_grpc.HealthServicer):
    """SERVING while a probe that runs where requests run succeeds within `patience_s`; a result holds for `fresh_s`."""

    def __init__(self, service: RecommenderService, worker: Worker, *, patience_s: float = 10.0, fresh_s: float = 1.0) -> None:
        self._service, self._worker = service, worker
        self._patience_s, self._fresh_s = patience_s, fresh_s
        self._asking = asyncio.Lock()
        self._known: tuple[float, int] | None = None

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The state now. NOT_FOUND for a service that is not here."""
        if request.service not in NAMES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:80]!r}; ask for {NAMES[1]!r} or ''")
        return health_pb2.HealthCheckResponse(status=await self.state())

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state now and whenever it changes, looked at as often as a result is fresh; ends with a server that goes down."""
        del context
        told = None
        while True:
            state = await self.state() if request.service in NAMES else SERVICE_UNKNOWN
            if state != told:
                yield health_pb2.HealthCheckResponse(status=state)
                told = state
            if self._worker.draining:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._worker.drains.wait(), self._fresh_s)

    async def state(self) -> int:
        """The state, from a probe that is no older than `fresh_s` seconds. It waits for the work at hand, not in the queue."""
        async with self._asking:
            now = time.monotonic()
            if self._worker.draining:
                return int(NOT_SERVING)
            if self._known is None or now - self._known[0] > self._fresh_s:
                self._known = (now, await self._probe())
            return self._known[1]

    async def _probe(self) -> int:
        try:
            await asyncio.wait_for(self._worker.submit(self._service.stack.probe), self._patience_s)
        except Draining:
            return int(NOT_SERVING)
        except Exception as error:
            log.error("unhealthy", exc_info=error)
            return int(NOT_SERVING)
        return int(SERVING)
