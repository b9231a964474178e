"""A small HTTP/1.1 server: one thread, exact paths, GET, HEAD and POST, a few kilobytes and seconds for a caller.

It looks at no credentials, so it listens on this machine unless told otherwise. A route that says anything about members has to
ask for them itself.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl, urlsplit

from index.errors import BrewlineError
from ranking.serving.security_tls import is_loopback

MOST_HEAD, MOST_BODY, MOST_CLIENTS, CLIENT_S = 8 << 10, 1 << 20, 32, 10.0
"""Bytes of a request's head and of its body, connections at a time (the next is hung up on), seconds from a connection to the end
of its answer."""
TEXT = "text/plain; charset=utf-8"

log = logging.getLogger(__name__)


class WebError(BrewlineError):
    """The address for HTTP is taken, or not one of this machine's."""


@dataclass(frozen=True)
class Asked:
    """A request: its path, its query by name (the last value of each), its headers by lower-case name, and what was posted.

    A header that came more than once has all its values, joined by ", ".
    """

    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Reply:
    """An answer; `headers` come on top of those that every answer has."""

    body: bytes
    kind: str = TEXT
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


Route = Callable[[Asked], Reply]
"""Called in a thread of the server's own pool of two; may wait, but no longer than the caller may."""


class Web:
    """Bound to its port when it is made; answers from `start` until `close`. Port 0 takes a free one; `port` says which."""

    def __init__(self, host: str, port: int) -> None:
        """Raises WebError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=MOST_CLIENTS)
        except OSError as error:
            raise WebError(
                f"cannot listen for HTTP on {host}:{port} ({error.strerror or error}); choose another port (0 takes a free one)"
            ) from error
        self.host, self.port = host, int(self._socket.getsockname()[1])
        self._thread: threading.Thread | None = None
        self._routes: Mapping[str, Route] = {}
        self._posts: Mapping[str, Route] = {}
        self._clients = 0

    @property
    def address(self) -> str:
        """The address to ask, as a URL without a path."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def start(self, routes: Mapping[str, Route], posts: Mapping[str, Route] | None = None) -> None:
        """The paths are answered by their routes, those of `posts` to POST only, from a daemon thread."""
        if not is_loopback(self.host):
            log.warning("HTTP on %s can be read from other machines and asks for no credentials", self.address)
        self._routes, self._posts = dict(routes), dict(posts or {})
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), name="brewline-web", daemon=True)
        self._thread.start()
        ready.wait()

    def close(self) -> None:
        """Nothing is answered any more and the port is free. To be called from another thread; a second call changes nothing."""
        if self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
        self._socket.close()

    async def _main(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="brewline-web")
        server = await asyncio.start_server(self._client, sock=self._socket, limit=MOST_HEAD)
        ready.set()
        await self._stop.wait()
        self._loop.remove_reader(self._socket.fileno())
        for _ in range(8):  # whoever was accepted just now is let in first: a connection half made would never be closed
            await asyncio.sleep(0)
        server.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            if self._clients > MOST_CLIENTS:
                return
            async with asyncio.timeout(CLIENT_S):
                reply, bare = await self._reply(reader)
                writer.write(_bytes(reply, bare=bare))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            log.debug("a connection ended before its answer")  # the caller's loss, or the end of the server: nobody's error
        finally:
            self._clients -= 1
            writer.transport.abort()

    async def _reply(self, reader: asyncio.StreamReader) -> tuple[Reply, bool]:
        """The answer, and whether its body is not wanted."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.LimitOverrunError:
            return plain_reply(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {MOST_HEAD:,} bytes"), False
        first, *lines = head.split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or not words[1].startswith("/") or words[2] not in ("HTTP/1.1", "HTTP/1.0"):
            return plain_reply(HTTPStatus.BAD_REQUEST, "this is no request of HTTP/1.1"), False
        headers = _headers(lines)
        if is_loopback(self.host) and "host" in headers and not _is_here(headers["host"]):
            return plain_reply(HTTPStatus.MISDIRECTED_REQUEST, "this server answers to localhost only"), False
        return await self._routed(words[0], words[1], headers, reader), words[0] == "HEAD"

    async def _routed(self, method: str, target: str, headers: Mapping[str, str], reader: asyncio.StreamReader) -> Reply:
        try:
            parts = urlsplit(target)
            query = dict(parse_qsl(parts.query, keep_blank_values=True, max_num_fields=64))
        except ValueError:
            return plain_reply(HTTPStatus.BAD_REQUEST, "the path cannot be read")
        if parts.path not in self._routes and parts.path not in self._posts:
            return plain_reply(HTTPStatus.NOT_FOUND, f"here are {', '.join(sorted({*self._routes, *self._posts}))}")
        allowed = [*(("GET", "HEAD") if parts.path in self._routes else ()), *(("POST",) if parts.path in self._posts else ())]
        if method not in allowed:
            words = f"only {' and '.join(allowed)} {'is' if len(allowed) == 1 else 'are'} answered"
            return plain_reply(HTTPStatus.METHOD_NOT_ALLOWED, words, {"Allow": ", ".join(allowed)})
        body = await _body(headers, reader) if method == "POST" else b""
        if isinstance(body, Reply):
            return body
        route = (self._posts if method == "POST" else self._routes)[parts.path]
        try:
            return await self._loop.run_in_executor(self._pool, route, Asked(parts.path, query, headers, body))
        except Exception as error:
            log.error("%s failed", parts.path, exc_info=error)
            return plain_reply(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; the server's log has it")


def _headers(lines: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines if line):
        key = name.lower()
        found[key] = f"{found[key]}, {value.strip()}" if key in found else value.strip()
    return found


async def _body(headers: Mapping[str, str], reader: asyncio.StreamReader) -> bytes | Reply:
    """What was posted, or why it is not read."""
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
        return plain_reply(HTTPStatus.LENGTH_REQUIRED, "say with Content-Length how many bytes follow")
    if len(length) > 9 or int(length) > MOST_BODY:
        return plain_reply(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MOST_BODY:,} bytes")
    return await reader.readexactly(int(length))


def _is_here(host: str) -> bool:
    """Whether a Host header names this machine; under another name a web page reaches for what is not its own."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    return is_loopback(name.strip("[]"))


def plain_reply(status: int, words: str, headers: Mapping[str, str] | None = None) -> Reply:
    """A line of text with a status of HTTP."""
    return Reply(f"{words}\n".encode(), status=HTTPStatus(status), headers=headers or {})


def _bytes(reply: Reply, *, bare: bool) -> bytes:
    headers = {
        "Content-Type": reply.kind,
        "Content-Length": str(len(reply.body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
        **reply.headers,
    }
    lines = [f"HTTP/1.1 {reply.status.value} {reply.status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if bare else reply.body)
