"""Asking again: which failures deserve it, and how long to wait.

Every call of the contract may be sent twice. Questions change nothing; UpsertItems puts the same items in the place of
themselves; an id that is withdrawn again stays withdrawn; of RecordEngagements an event id counts once. What is never sent again
is a call that failed for what it says, for its deadline, or for a bug: the answer would be the same.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import grpc

RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
PUSHBACK = "grpc-retry-pushback-ms"
FIRST_S, MOST_S = 0.05, 2.0
LEAST_S = 0.001


def ask(method: Callable[..., Any], request: object, seconds: float, attempts: int, request_id: str) -> Any:
    """The reply to a call, within `seconds` in all and asked at most `attempts` times, each time under the same request id.

    Raises the last grpc.RpcError; at once if the wait before the next attempt would outlast the time.
    """
    until = time.monotonic() + seconds
    attempt = 1
    while True:
        try:
            return method(request, timeout=max(until - time.monotonic(), LEAST_S), metadata=(("x-request-id", request_id),))
        except grpc.RpcError as error:
            wait = wait_before(error, attempt)
            if wait is None or attempt >= attempts or time.monotonic() + wait >= until:
                raise
        time.sleep(wait)
        attempt += 1


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
