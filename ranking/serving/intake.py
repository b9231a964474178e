"""Bytes become requests here, so that bytes which are none end in a typed status and not in a traceback."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import grpc
from google.protobuf.message import DecodeError, Message


class Intake(grpc.aio.ServerInterceptor):
    """Parses the requests of unary calls; INVALID_ARGUMENT for bytes that are not the method's message."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler, or one that parses for it."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        parse, answer = handler.request_deserializer, handler.unary_unary

        async def behave(raw: bytes, context: grpc.aio.ServicerContext) -> Message:
            try:
                request = parse(raw)
            except DecodeError:
                words = f"the {len(raw):,} bytes are no request of {handler_call_details.method}; check the client's contract"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, words)
            return await answer(request, context)

        return grpc.unary_unary_rpc_method_handler(behave, None, handler.response_serializer)
