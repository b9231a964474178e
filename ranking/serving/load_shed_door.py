"""The door: what would be refused anyway is refused before its bytes are parsed, and callers are told apart."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import grpc

from ranking.serving.recommender_pb2 import DESCRIPTOR

SERVICE = DESCRIPTOR.services_by_name["Recommender"].full_name
UNQUEUED = ("Info",)
"""Calls that need no model, and so no place in the queue."""
NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}")

Metadata = Sequence[tuple[str, str | bytes]]


class Doorman(Protocol):
    """Who decides."""

    def expect(self) -> None:
        """A request that needs the models is on its way: its bytes are still to come."""

    async def let_in(self, method: str, context: grpc.aio.ServicerContext) -> None:
        """Returns if a request of the method may be read now, ends the call with its status if not."""


class Door(grpc.aio.ServerInterceptor):
    """Asks the doorman before a request is parsed. Stands behind the gate, so strangers learn nothing of the queue."""

    def __init__(self, doorman: Doorman) -> None:
        self._doorman = doorman

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler, with the question in front if its requests wait in the queue."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method[1:].rpartition("/")
        if handler is None or handler.unary_unary is None or service != SERVICE or method in UNQUEUED:
            return handler
        answer = handler.unary_unary
        self._doorman.expect()

        async def behave(raw: bytes, context: grpc.aio.ServicerContext) -> Any:
            await self._doorman.let_in(method, context)
            return await answer(raw, context)

        return grpc.unary_unary_rpc_method_handler(behave, handler.request_deserializer, handler.response_serializer)


def caller_of(metadata: Metadata, peer: str, *, tokens: bool) -> str:
    """Whose turn a request takes: the name in the token (which the gate has verified) where there are tokens; else what the
    caller calls himself (`x-caller`), else his host. Without tokens a caller may take several names, and turns with each."""
    key = "authorization" if tokens else "x-caller"
    given = next((value for name, value in metadata if name == key), "")
    if isinstance(given, str) and given:
        name = given.partition(" ")[2].strip().partition(".")[0] if tokens else given
        if NAME.fullmatch(name):
            return name
    return peer.rpartition(":")[0]
