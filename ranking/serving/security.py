"""One gate in front of every call: the caller's token, the method's role, and a line in the audit log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from ranking.serving import audit
from ranking.serving.tokens import Caller, TokenBook, TokenError

SERVICE = "/brewline.v1.Recommender/"
OPEN = ""
"""Of a method that asks for no token: probes have none, and the answer says one word."""
NEEDS: dict[str, str] = {
    f"{SERVICE}Recommend": "read",
    f"{SERVICE}Retrieve": "read",
    f"{SERVICE}RetrieveBatch": "read",
    f"{SERVICE}Rank": "read",
    f"{SERVICE}Info": "read",
    f"{SERVICE}UpsertItems": "write",
    f"{SERVICE}WithdrawItems": "write",
    f"{SERVICE}RecordEngagements": "write",
    f"{SERVICE}Explain": "admin",  # it says what a member did, in words
    "/grpc.health.v1.Health/Check": OPEN,
    "/grpc.health.v1.Health/Watch": OPEN,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": "read",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "read",
}
"""The role that each method asks for; one that is not here asks for admin, so a forgotten row locks and never opens."""

Code = grpc.StatusCode
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]]


class Gate(grpc.aio.ServerInterceptor):
    """Lets a call through if its token may make it; without a book of tokens every call may. Changes are noted in either case."""

    def __init__(self, book: TokenBook | None) -> None:
        self._book = book

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler, or one that turns the call away before its request is read.

        UNAUTHENTICATED without a token that is known, PERMISSION_DENIED for one of a lesser role, UNAVAILABLE while the token
        file cannot be used.
        """
        method = handler_call_details.method
        need = NEEDS.get(method, "admin")
        caller: Caller | None = None
        if self._book is not None and need != OPEN:
            try:
                caller = await self._book.caller(_token(handler_call_details))
            except TokenError as error:
                audit.log.error("token file unusable", extra={"reason": str(error)})
                return _turned_away(method, "", Code.UNAVAILABLE, "the server cannot read its tokens; its log says why")
            if caller is None:
                words = "no token that this server knows; send one as metadata 'authorization: Bearer TOKEN'"
                return _turned_away(method, "", Code.UNAUTHENTICATED, words)
            if not caller.may(need):
                words = f"the token of {caller.name} has the role {caller.role}, {method} needs {need}"
                return _turned_away(method, caller.name, Code.PERMISSION_DENIED, words)
        handler = await continuation(handler_call_details)
        if need in ("write", "admin") and handler is not None and handler.unary_unary is not None:
            return _noted(handler, method, "" if caller is None else caller.name)
        return handler


def _token(details: grpc.HandlerCallDetails) -> str:
    """The bearer token of a call, "" if there is none or more than one."""
    given = [value for key, value in details.invocation_metadata or () if key == "authorization"]
    if len(given) != 1 or not isinstance(given[0], str):
        return ""
    scheme, _, token = given[0].partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _turned_away(method: str, caller: str, code: grpc.StatusCode, words: str) -> grpc.RpcMethodHandler:
    async def refuse(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        del requests  # a stream of raw bytes fits every method, and none of it is looked at
        audit.note("turned away", method, caller, code.name, context)
        await context.abort(code, words)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _event(method: str, code: str) -> str:
    done = "looked" if method.rpartition("/")[2] == "Explain" else "changed"
    return done if code == Code.OK.name else f"not {done}"


def _noted(handler: grpc.RpcMethodHandler, method: str, caller: str) -> grpc.RpcMethodHandler:
    answer = handler.unary_unary

    async def behave(request: Any, context: grpc.aio.ServicerContext) -> Any:
        code, request_id = "CANCELLED", ""
        try:
            reply = await answer(request, context)
            code, request_id = Code.OK.name, reply.request_id
        except Exception:
            said = context.code()
            code = said.name if isinstance(said, grpc.StatusCode) else Code.UNKNOWN.name
            raise
        finally:
            audit.note(_event(method, code), method, caller, code, context, request_id)
        return reply

    return grpc.unary_unary_rpc_method_handler(behave, handler.request_deserializer, handler.response_serializer)
