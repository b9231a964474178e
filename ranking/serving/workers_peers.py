"""Changes of items among the workers of one server: one writes the log, and whoever is sent a change hands it to that one.

    FOLDER/0  FOLDER/1  ...    one Unix socket for each worker, in a folder that only this user may enter
    question   {"method", "caller", "request_id", "until", "bytes"} in a line of JSON, then the request as it came
    reply      {"code", "words", "retry_s", "elsewhere", "bytes"} in a line of JSON, then the response

Whoever holds the log's lock is the writer, and nobody else knows: a worker tries to become it, and where another one is, asks its
neighbours and remembers who said yes, until that one is gone or says no. So the next change finds a new writer as soon as the old
one has died, and a neighbour that hangs and does not write keeps nobody waiting: all are asked at once. `until` is by the clock
that all processes of a machine share (`time.monotonic()`): one that hung takes nothing up that nobody waits for any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import Message

from index.durable import StoreBusy
from index.live import FOLLOW_S
from ranking.serving.status import Draining, Handed, Late, Overloaded, message_of, status_of

SPARE_S = 0.01
"""Seconds before the caller's deadline at which an acknowledgement waits no longer for the other workers to look."""
LONGEST_S = 60.0
"""A caller who named no deadline is not kept longer by a neighbour that says nothing."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """A change on its way: the method's name, its request, whose it is, and when (`time.monotonic()`) it is too late."""

    method: str
    raw: bytes
    caller: str
    request_id: str
    deadline: float

    @property
    def until(self) -> float:
        """The deadline, as a neighbour is told it."""
        return min(self.deadline, time.monotonic() + LONGEST_S)


class Lost(Handed):
    """A neighbour ended while it was asked to take a change."""


Take = Callable[[Change], Awaitable[Message]]
Here = Callable[[], Awaitable[Message]]
"""They carry a change out in this process, or raise StoreBusy where another one writes."""


class Peers:
    """The workers beside this one, whose own socket is `own`. Lives on the event loop."""

    def __init__(self, own: Path) -> None:
        self._own, self._writer, self._parent = own, "", os.getppid()
        self._server: asyncio.Server | None = None

    async def start(self, take: Take) -> None:
        """Changes that neighbours hand on are carried out by `take`, until `stop`."""
        self._take = take
        self._server = await asyncio.start_unix_server(self._serve, self._own)

    async def stop(self) -> None:
        """Nobody can hand anything on to this one. If the parent was killed, the last worker takes the folder along."""
        if self._server is None:
            return
        self._server.close()
        self._own.unlink(missing_ok=True)
        if os.getppid() != self._parent:
            with contextlib.suppress(OSError):  # others' sockets are in it
                self._own.parent.rmdir()

    async def change(self, change: Change, kind: type[Message], here: Here) -> Message:
        """The response of whichever worker writes: the change is on the disk, and in every answer of every worker from now on.

        Others look for changes every `FOLLOW_S` seconds; the response waits for that, or for as much of it as the caller's
        deadline leaves. Raises Handed, Late, Overloaded and what the change raises here; StoreBusy where no worker writes.
        """
        response = await self._carried_out(change, kind, here)
        await asyncio.sleep(max(min(FOLLOW_S, change.deadline - time.monotonic() - SPARE_S), 0))
        return response

    async def _carried_out(self, change: Change, kind: type[Message], here: Here) -> Message:
        known = self._writer
        if known and (found := await self._ask(known, change, kind)) is not None:
            return found
        try:
            return await here()
        except StoreBusy:
            others = {path.name for path in self._own.parent.iterdir()} - {known, self._own.name}
            if (found := await self._ask_all(others, change, kind)) is not None:
                return found
            raise

    async def _ask_all(self, names: Iterable[str], change: Change, kind: type[Message]) -> Message | None:
        """What the one among these answers that writes; None if none does. Raises Handed, Late, Overloaded."""
        asked, unsure = [asyncio.create_task(self._ask(name, change, kind)) for name in names], None
        try:
            for one in asyncio.as_completed(asked):
                try:
                    if (found := await one) is not None:
                        return found
                except (Lost, Overloaded) as error:  # which may be said by one that does not write
                    unsure = error
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        if unsure is not None:
            raise unsure
        return None

    async def _ask(self, name: str, change: Change, kind: type[Message]) -> Message | None:
        """What a neighbour answers; None if it did nothing: it is not there, or it is not the one that writes. Raises Handed,
        Late, Overloaded."""
        try:
            async with asyncio.timeout(max(change.until - time.monotonic(), 0)):
                try:
                    reader, writer = await asyncio.open_unix_connection(self._own.with_name(name))
                except OSError:
                    self._forget(name)
                    return None
                try:
                    return self._understood(name, *await _exchange(reader, writer, change), kind)
                finally:
                    writer.close()
        except TimeoutError:
            raise Late("the deadline passed before the change was acknowledged; it may be kept all the same") from None
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            log.warning("worker %s ended while it took a change: %r", name, error)
            self._forget(name)
            words = "the worker that takes the changes ended meanwhile; the change may be kept or not, send it again"
            raise Lost("UNAVAILABLE", words) from None

    def _forget(self, name: str) -> None:
        """This one does not write any more, whoever does."""
        if self._writer == name:
            self._writer = ""

    def _understood(self, name: str, told: dict[str, str], body: bytes, kind: type[Message]) -> Message | None:
        if told["code"] == "OK":
            self._writer = name
            return kind.FromString(body)
        if told["elsewhere"]:
            self._forget(name)
            return None
        if told["code"] == "RESOURCE_EXHAUSTED":
            raise Overloaded(told["words"], float(told["retry_s"]))
        raise Handed(told["code"], told["words"])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            told, body = json.loads(await reader.readline()), b""
            body = await reader.readexactly(told["bytes"])
            change = Change(told["method"], body, told["caller"], told["request_id"], told["until"])
            _write(writer, *await self._answered(change))
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:  # a neighbour that died, and nobody waits
            log.warning("a change that a neighbour handed on was lost: %r", error)
        finally:
            writer.close()

    async def _answered(self, change: Change) -> tuple[dict[str, object], bytes]:
        try:
            response = await self._take(change)
        except Exception as error:
            code = status_of(error).name
            if code == "INTERNAL":
                log.error("request %s failed", change.request_id, exc_info=error)
            retry_s = error.retry_s if isinstance(error, Overloaded) else 0.0
            elsewhere = isinstance(error, (StoreBusy, Draining))
            words = message_of(error, change.request_id)
            return {"code": code, "words": words, "retry_s": retry_s, "elsewhere": elsewhere}, b""
        return {"code": "OK"}, response.SerializeToString()


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Change) -> tuple[dict[str, str], bytes]:
    head = {"method": change.method, "caller": change.caller, "request_id": change.request_id}
    _write(writer, {**head, "until": change.until}, change.raw)
    await writer.drain()
    told = json.loads(await reader.readline())
    return told, await reader.readexactly(int(told["bytes"]))


def _write(writer: asyncio.StreamWriter, head: dict[str, object], body: bytes) -> None:
    writer.write(json.dumps({**head, "bytes": len(body)}).encode() + b"\n" + body)
