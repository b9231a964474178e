"""The one place that sees every call from its arrival to its end: from here it is counted, timed, traced and logged."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from ranking.serving.security import NEEDS
from ranking.serving.visit import Visit, begin

Listener = Callable[[Visit], None]

log = logging.getLogger(__name__)


class Observe(grpc.aio.ServerInterceptor):
    """The outermost interceptor: listeners hear of every unary call when it has ended, streams (`Watch`, reflection) pass by.

    An answer never waits for, or fails by, what a listener does; its errors are logged.
    """

    def __init__(self, inside: set[Visit], listeners: Sequence[Listener]) -> None:
        """`inside` holds the unary calls that are on their way."""
        self._inside, self._listeners = inside, (*listeners, note)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler, watched."""
        method = handler_call_details.method
        visit = Visit(method.rpartition("/")[2] if method in NEEDS else "other", handler_call_details.invocation_metadata or ())
        handler = await continuation(handler_call_details)
        if handler is None:
            self._ended(visit, grpc.StatusCode.UNIMPLEMENTED.name)
        elif handler.unary_unary is not None:
            behave = self._watched(handler.unary_unary, visit)
            return grpc.unary_unary_rpc_method_handler(behave, handler.request_deserializer, handler.response_serializer)
        elif inspect.iscoroutinefunction(handler.stream_stream):  # how the gate turns any method away
            return grpc.stream_stream_rpc_method_handler(self._watched(handler.stream_stream, visit))
        return handler

    def _watched(self, answer: Callable[[Any, Any], Awaitable[Any]], visit: Visit) -> Callable[[Any, Any], Awaitable[Any]]:
        async def behave(request: Any, context: grpc.aio.ServicerContext) -> Any:
            begin(visit)
            code = grpc.StatusCode.CANCELLED.name
            self._inside.add(visit)
            try:
                visit.response = await answer(request, context)
                code = grpc.StatusCode.OK.name
            except Exception:
                said = context.code()
                code = said.name if isinstance(said, grpc.StatusCode) else grpc.StatusCode.UNKNOWN.name
                raise
            finally:
                self._inside.discard(visit)
                self._ended(visit, code)
            return visit.response

        return behave

    def _ended(self, visit: Visit, code: str) -> None:
        visit.code, visit.seconds = code, time.monotonic() - visit.arrived
        for listener in self._listeners:
            try:
                listener(visit)
            except Exception as error:
                log.error("a listener failed", exc_info=error)


def note(visit: Visit) -> None:
    """One structured line: which request, of whom, how it ended and where its time went; no word that a caller wrote."""
    if not log.isEnabledFor(logging.INFO):
        return
    told = {"method": visit.method, "request_id": visit.request_id, "code": visit.code, "caller": visit.caller}
    if visit.refusal:
        told["error"] = visit.refusal
    times = {f"{stage}_us": micros for stage, micros in visit.micros().items()}
    event = "answered" if visit.code == grpc.StatusCode.OK.name else "refused"
    log.info(event, extra={**told, **times, "total_us": round(visit.seconds * 1e6)})
