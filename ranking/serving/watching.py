"""All that looks at one server: the interceptor that sees the calls, the meters, the spans, and the HTTP that tells them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from grpc_health.v1 import health_pb2

from ranking.serving.current import Current
from ranking.serving.observe import Listener, Observe
from ranking.serving.telemetry import Telemetry
from ranking.serving.traces import Traces
from ranking.serving.visit import Visit
from ranking.serving.web import Asked, Reply, Route, Web, plain_reply

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HEALTH_S = 5.0
"""Seconds that /healthz waits for an answer, which is a probe that runs where requests run."""


class Watching:
    """`observe` belongs before all other interceptors; `routes` may be added to until `start`."""

    def __init__(self, current: Current, version: str, web: Web | None = None, traces: Traces | None = None) -> None:
        inside: set[Visit] = set()
        self.telemetry = Telemetry(current, inside, version)
        self._traces = traces
        listeners: list[Listener] = [self.telemetry.note]
        if traces is not None:
            listeners.append(traces.note)
        self.observe = Observe(inside, listeners)
        self.routes: dict[str, Route] = {"/metrics": self._metrics}
        self._web = web

    def start(self, health: Callable[[], Awaitable[int]]) -> None:
        """HTTP is answered, if there is to be any. To be called from the event loop on which `health` can be awaited."""
        if self._web is not None:
            loop = asyncio.get_running_loop()

            async def state() -> int:
                return await asyncio.wait_for(health(), HEALTH_S)

            def healthz(asked: Asked) -> Reply:
                del asked
                try:
                    serving = asyncio.run_coroutine_threadsafe(state(), loop).result(2 * HEALTH_S)
                except TimeoutError:
                    return plain_reply(503, f"no answer within {HEALTH_S:g} s")
                return (
                    plain_reply(200, "ok")
                    if serving == health_pb2.HealthCheckResponse.SERVING
                    else plain_reply(503, "not serving")
                )

            self._web.start({**self.routes, "/healthz": healthz})

    def close(self) -> None:
        """The last spans are sent, the HTTP port is free. Not to be called from the event loop."""
        if self._web is not None:
            self._web.close()
        if self._traces is not None:
            self._traces.close()

    def _metrics(self, asked: Asked) -> Reply:
        del asked
        return Reply(self.telemetry.text(), CONTENT_TYPE)
