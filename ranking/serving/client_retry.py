"""Asking again: which failures deserve it, and how long to wait.

Questions change nothing; an id that is withdrawn again stays withdrawn; of RecordEngagements an event id counts once: these may
be sent twice. UpsertItems puts in again what somebody may have withdrawn in between, and is sent again only if the attempt before
was surely not carried out. What is never sent again is a call that failed for what it says, for its deadline, or for a bug: the
answer would be the same.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
PUSHBACK = "grpc-retry-pushback-ms"
FIRST_S, MOST_S = 0.05, 2.0
LEAST_S = 0.001
HINTS = {
    "Hostname Verification Check failed": "its certificate names other hosts; ask by a name that it holds",
    "Socket closed": "it hung up; is it going down, or does it want TLS (BREWLINE_CA), or a certificate of ours (BREWLINE_CERT, "
    "BREWLINE_KEY)?",
    "OK": "it is not believed; is BREWLINE_CA the authority of its certificate?",
}
"""What the last words of gRPC about a connection that failed stand for."""


@dataclass(frozen=True)
class Reply:
    """The reply to a call. `doubtful`: an attempt before it, whose answer was lost, may have been carried out."""

    message: Any
    doubtful: bool


def ask(method: Callable[..., Any], request: object, seconds: float, attempts: int, request_id: str) -> Any:
    """The message that answers a call which may be sent twice; the rest as `reply_to`."""
    return reply_to(method, request, seconds, attempts, request_id).message


def reply_to(
    method: Callable[..., Any], request: object, seconds: float, attempts: int, request_id: str, *, twice: bool = True
) -> Reply:
    """The reply to a call, within `seconds` in all and asked at most `attempts` times, each time under the same request id.

    Without `twice` an attempt that may have been carried out is the last. Raises the last grpc.RpcError; at once if the wait
    before the next attempt would outlast the time.
    """
    until = time.monotonic() + seconds
    attempt, doubtful = 1, False
    while True:
        try:
            left = max(until - time.monotonic(), LEAST_S)
            return Reply(method(request, timeout=left, metadata=(("x-request-id", request_id),)), doubtful)
        except grpc.RpcError as error:
            wait = wait_before(error, attempt)
            doubtful |= maybe_done(error)
            if wait is None or attempt >= attempts or time.monotonic() + wait >= until or (doubtful and not twice):
                raise
        time.sleep(wait)
        attempt += 1


def never_reached(error: grpc.RpcError) -> bool:
    """Whether there was no connection over which the call could have been sent."""
    return error.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect" in (error.details() or "")


def why_not_reached(last: str) -> str:
    """What gRPC's last word about a connection means to whoever wanted it, and what to do."""
    word = last.strip(". ")
    if word in HINTS:
        return f"no connection ({word}): {HINTS[word]}"
    return f"nobody answers ({last}); is `brewline serve` running there?"


def maybe_done(error: grpc.RpcError) -> bool:
    """Whether the call may have been carried out although it failed so: the answer may be what was lost.

    A server that refuses says when to come back, or that there is no room; everything else leaves it open.
    """
    refused = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED or PUSHBACK in dict(error.trailing_metadata() or ())
    return not (refused or never_reached(error))


def wait_before(error: grpc.RpcError, attempt: int) -> float | None:
    """Seconds to wait after the attempt (1 is the first) that failed so; None if it is not to be made again.

    The server's own word is kept: so many milliseconds (a little more, lest all whom it turned away come back together), or,
    where it is negative or no number, not at all, as gRPC's own retries read it.
    """
    if error.code() not in RETRIED:
        return None
    said = dict(error.trailing_metadata() or ()).get(PUSHBACK)
    if said is not None:
        text = str(said)
        return int(text) / 1e3 * random.uniform(1.0, 1.1) if text.isascii() and text.isdigit() else None
    if "larger than max" in (error.details() or ""):
        return None  # gRPC's own RESOURCE_EXHAUSTED for a message over the limit
    return min(FIRST_S * 2 ** (attempt - 1), MOST_S) * random.uniform(0.5, 1.0)
