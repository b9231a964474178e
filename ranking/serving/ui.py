"""The page that looks at a server: one file of HTML, and JSON on this machine with the rights of the token that is shown.

Questions go to the contract's own calls, over a door of their own: the same gate, queue, limits and audit, and no journal,
because nobody was shown anything when an operator looks. JSON is protobuf's mapping of the contract. The page changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import time
import uuid
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import grpc
from google.protobuf import json_format

from index.errors import BrewlineError
from ranking.serving import audit, recommender_pb2_grpc
from ranking.serving import recommender_pb2 as pb
from ranking.serving.client_retry import ask
from ranking.serving.current import Current
from ranking.serving.messages import MAX_ID, BadRequest, words_of
from ranking.serving.security_client import Bearer
from ranking.serving.status import message_of, status_of
from ranking.serving.tokens import LONGEST, TokenBook, TokenError
from ranking.serving.ui_look import Json, find_items, find_members, member_card
from ranking.serving.web import CLIENT_S, Asked, Reply, Route, Web

MOST_MS, USUAL_MS = int(CLIENT_S * 1e3) - 1_000, 8_000
"""The longest deadline of a question, which must end before the connection does, and the one of a page that names none."""
PATIENCE_S = 2.0
HTTP = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""gRPC's statuses as those of HTTP; all others are 500."""
CALLS: dict[str, tuple[str, Any]] = {
    "/api/info": ("Info", pb.InfoRequest),
    "/api/recommend": ("Recommend", pb.RecommendRequest),
    "/api/retrieve": ("Retrieve", pb.RetrieveRequest),
    "/api/explain": ("Explain", pb.ExplainRequest),
}
"""What the page may ask: none of it changes anything."""

log = logging.getLogger(__name__)


class Refused(BrewlineError):
    """A question of the page that is not answered. `code` is a gRPC status ("UNAUTHENTICATED")."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Page:
    """Answers on `web` from `start` until `stop`; `inside` are the interceptors that the contract's calls pass."""

    def __init__(
        self,
        web: Web,
        current: Current,
        service: recommender_pb2_grpc.RecommenderServicer,
        inside: Sequence[grpc.aio.ServerInterceptor],
        book: TokenBook | None,
    ) -> None:
        self._web, self._current, self._book = web, current, book
        self._server = grpc.aio.server(interceptors=inside)
        recommender_pb2_grpc.add_RecommenderServicer_to_server(service, self._server)
        # Any user of this machine may find this port: the gate stands behind it as behind the other.
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}")
        self._looks: dict[str, tuple[str, Callable[[Json], Json]]] = {
            "/api/members": ("admin", lambda body: find_members(self._current.stack.origin.connection, _text(body, "part"))),
            "/api/member": ("admin", lambda body: member_card(self._current.stack, _text(body, "id"))),
            "/api/items": ("read", lambda body: find_items(self._current.stack, _text(body, "words"))),
        }

    async def start(self) -> None:
        """The page is there."""
        self._loop = asyncio.get_running_loop()
        await self._server.start()
        html = page_bytes()
        shown = Reply(html, "text/html; charset=utf-8", headers={**HEADERS, "Content-Security-Policy": policy_of(html)})

        def page(asked: Asked) -> Reply:
            del asked
            return shown

        calls = {path: self._route(self._call) for path in CALLS}
        self._web.start({"/": page}, {**calls, **{path: self._route(self._look) for path in self._looks}})

    async def stop(self) -> None:
        """Nothing is answered any more."""
        await asyncio.to_thread(self._web.close)
        await self._server.stop(0)
        self._channel.close()

    def _route(self, answer: Callable[[Asked, Json], Json]) -> Route:
        def route(asked: Asked) -> Reply:
            try:
                check_origin(asked)
                return _json(answer(asked, read_body(asked.body)))
            except (Refused, grpc.RpcError, BrewlineError, json_format.ParseError, UnicodeEncodeError) as error:
                return _refusal(asked.path, error)

        return route

    def _call(self, asked: Asked, body: Json) -> Json:
        method, kind = CALLS[asked.path]
        request = json_format.ParseDict(body, kind())
        if isinstance(request, pb.RecommendRequest | pb.RetrieveRequest):
            request.readable = True
        token = token_of(asked)
        channel = grpc.intercept_channel(self._channel, Bearer(token)) if token else self._channel
        stub = recommender_pb2_grpc.RecommenderStub(channel)
        calls = {"Info": stub.Info, "Recommend": stub.Recommend, "Retrieve": stub.Retrieve, "Explain": stub.Explain}
        reply = ask(calls[method], request, _milliseconds(asked) / 1e3, 1, uuid.uuid4().hex)
        if isinstance(reply, pb.RecommendResponse | pb.RetrieveResponse):  # the readable rows say the same
            for column in ("ids", "scores", "probabilities", "places"):
                reply.results.ClearField(column)
        found: Json = json_format.MessageToDict(reply, preserving_proto_field_name=True)
        return found

    def _look(self, asked: Asked, body: Json) -> Json:
        need, look = self._looks[asked.path]
        self._let_in(asked, need)
        began = time.monotonic()
        found = look(body)
        return {**found, "took_us": round((time.monotonic() - began) * 1e6)}

    def _let_in(self, asked: Asked, need: str) -> None:
        """Nothing happens if the caller may look; who looks at members is noted, as whoever is turned away. Raises Refused."""
        if self._book is None:
            return
        try:
            waiting = asyncio.run_coroutine_threadsafe(self._book.caller(token_of(asked)), self._loop)
            caller = waiting.result(PATIENCE_S)
        except (TokenError, TimeoutError) as error:
            audit.log.error("token file unusable", extra={"reason": type(error).__name__})
            raise Refused("UNAVAILABLE", "the server cannot read its tokens; its log says why") from error
        code = "UNAUTHENTICATED" if caller is None else "OK" if caller.may(need) else "PERMISSION_DENIED"
        name = "" if caller is None else caller.name
        if code != "OK" or need == "admin":
            told = {"method": asked.path, "caller": name, "certificate": "", "peer": "page", "code": code, "request_id": ""}
            audit.log.info("looked" if code == "OK" else "turned away", extra=told)
        if caller is None:
            raise Refused(code, "no token that this server knows; type one that `brewline token make` printed")
        if code != "OK":
            raise Refused(code, f"the token of {name} has the role {caller.role}, this needs {need}")


HEADERS = {
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def page_bytes() -> bytes:
    """The page's one file."""
    return (files("ranking.serving") / "page" / "index.html").read_bytes()


def policy_of(html: bytes) -> str:
    """The policy that lets this page's own script and style run, lets it ask this server, and forbids all else."""
    kinds = {}
    for kind in ("script", "style"):
        (inside,) = re.findall(rf"<{kind}>(.*?)</{kind}>".encode(), html, re.DOTALL)
        kinds[kind] = f"'sha256-{b64encode(hashlib.sha256(inside).digest()).decode()}'"
    return (
        f"default-src 'none'; script-src {kinds['script']}; style-src {kinds['style']}; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def check_origin(asked: Asked) -> None:
    """Nothing happens if the page itself asks, or no browser. Raises Refused for another page that reaches for this server."""
    headers = asked.headers
    if headers.get("origin", origin := f"http://{headers.get('host', '')}") != origin:
        raise Refused("PERMISSION_DENIED", "only the page of this very address may ask")
    if headers.get("sec-fetch-site", "same-origin") != "same-origin":
        raise Refused("PERMISSION_DENIED", "only the page of this very address may ask")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("INVALID_ARGUMENT", "send application/json")  # which no form of a strange page can


def read_body(body: bytes) -> Json:
    """The object that was posted. Raises Refused."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused("INVALID_ARGUMENT", f"the {len(body):,} bytes are no JSON ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise Refused("INVALID_ARGUMENT", f"expected a JSON object, not {type(found).__name__}")
    return found


def token_of(asked: Asked) -> str:
    """The bearer token of a request, "" if there is none that could be one."""
    scheme, _, token = asked.headers.get("authorization", "").partition(" ")
    token = token.strip()
    sound = scheme.lower() == "bearer" and len(token) <= LONGEST and token.isascii() and token.isprintable()
    return token if sound else ""


def _text(body: Mapping[str, object], name: str) -> str:
    """The one field of a question. Raises BadRequest."""
    value = body.get(name)
    if set(body) != {name} or not isinstance(value, str):
        raise BadRequest(f"expected a JSON object with {name!r}, a text, and nothing else")
    return words_of(name, value, MAX_ID)


def _milliseconds(asked: Asked) -> int:
    given = asked.query.get("deadline_ms", str(USUAL_MS))
    if not (given.isascii() and given.isdigit() and 1 <= len(given) <= 9 and 1 <= int(given) <= MOST_MS):
        raise BadRequest(f"deadline_ms: {given[:20]!r} is no number of milliseconds from 1 to {MOST_MS:,}")
    return int(given)


def _refusal(path: str, error: Exception) -> Reply:
    """What went wrong, as the contract would say it."""
    if isinstance(error, Refused):
        return _json({"code": error.code, "message": str(error)}, HTTP.get(error.code, 500))
    if isinstance(error, grpc.RpcError):
        code, message = error.code().name, error.details() or "no details"
    elif isinstance(error, BrewlineError):
        name = uuid.uuid4().hex
        code, message = status_of(error).name, message_of(error, name)
        if code == grpc.StatusCode.INTERNAL.name:
            log.error("%s failed", path, exc_info=error, extra={"request_id": name})
    else:
        code, message = "INVALID_ARGUMENT", str(error)[:500]
    return _json({"code": code, "message": message}, HTTP.get(code, 500))


def _json(told: Mapping[str, object], status: int = 200) -> Reply:
    body = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
    return Reply(body, "application/json", HTTPStatus(status), {"Cross-Origin-Resource-Policy": "same-origin"})
