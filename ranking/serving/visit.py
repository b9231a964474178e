"""What is known of the call at hand, filled in by those it passes: the service adds the caller and the times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from google.protobuf.message import Message

if TYPE_CHECKING:
    from ranking.serving.answers import Call


@dataclass(eq=False)
class Visit:
    """One call: when it came (`arrived` on the monotonic clock, `at` in nanoseconds since 1970), who made it, how it ended.

    `method` is one of ours or "other", never a stranger's words; `caller` the name of a token, of a program or of a host;
    `refusal` the name of our error; `code` the status, "" while it runs.
    """

    method: str
    metadata: Sequence[tuple[str, str | bytes]] = ()
    arrived: float = field(default_factory=time.monotonic)
    at: int = field(default_factory=time.time_ns)
    caller: str = ""
    call: Call | None = None
    refusal: str = ""
    code: str = ""
    seconds: float = 0.0
    response: Message | None = None

    @property
    def request_id(self) -> str:
        """The name of the request, "" for one that never reached the service."""
        return "" if self.call is None else self.call.request_id

    def micros(self) -> dict[str, int]:
        """Microseconds by stage, in the order in which they ran; the wait in the queue is the first."""
        if self.call is None:
            return {}
        started = self.call.started or time.monotonic()
        stages = dict(self.call.watch.micros)  # the worker may still be writing
        return {"queue": max(round((started - self.call.arrived) * 1e6), 0), **stages}


_VISIT: ContextVar[Visit] = ContextVar("visit")


def begin(visit: Visit) -> None:
    """The rest of this task is about this call."""
    _VISIT.set(visit)


def visit() -> Visit:
    """The call at hand; one that nobody will look at where none was begun."""
    return _VISIT.get(None) or Visit("other")
