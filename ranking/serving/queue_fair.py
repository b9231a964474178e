"""Who is next: callers take turns by the seconds they cost, so one who asks a thousand times waits behind himself. No gRPC here.

Fair queueing over the forecast cost of each request: a caller's next request starts at the virtual time where his last one ends,
and the earliest start is served first (Goyal, Vin and Cheng, SIGCOMM 1996). The clock goes on by the work that is done, shared
among the callers (Bennett and Zhang, INFOCOM 1996): one that only followed whoever is served would stand still while strangers
ask once each, and never reach a caller who asks again.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ranking.serving.queue_forecast import Kind

LEAST_COST = 1e-4
"""Seconds that work costs at least, so that turns are taken before anything was measured."""
REMEMBERED = 256
"""Callers without a waiting request whose last turn is remembered; beyond that whose is longest ago is forgotten."""


NOTHING = Kind("")


@dataclass(eq=False)
class Job:
    """One request in the queue: what to run, for whom, of which kind, and when (`time.monotonic()`) it is too late.

    `first` is the part of the work after which there is an answer, if that is not its end. Jobs of one `together` may be run by
    it at once: it reads what they have `asked`, and each adds `tokens` to the batch. `again` does the same work for nobody
    (`rehearsal`), and `counted` hears how many were run at once when their answers are on their way. The rest is filled in then:
    `cost` and `least` are forecast seconds (of all, of the first part), `queued` says that something was before it, `parts` what
    else was measured.
    """

    work: Callable[[], Any]
    caller: str = ""
    kind: Kind = NOTHING
    deadline: float = math.inf
    first: Kind | None = None
    together: Callable[[Sequence[Job]], Sequence[Any]] | None = None
    asked: Any = None
    again: Callable[[], Any] | None = None
    counted: Callable[[int], None] | None = None
    tokens: int = 0
    cost: float = 0.0
    least: float = 0.0
    queued: bool = False
    parts: list[tuple[Kind, float]] = field(default_factory=list)
    future: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(eq=False)
class Line:
    """The waiting requests of one caller, the virtual time at which the next starts, and what all of them cost."""

    start: float = 0.0
    jobs: deque[Job] = field(default_factory=deque)
    cost: float = 0.0


class FairQueue:
    """At most `most` waiting jobs, taken in turns by caller. When full, the longest line gives its end to a shorter one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[str, Line] = {}
        self._idle: OrderedDict[str, Line] = OrderedDict()
        self._now = self._turn = 0.0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def cost(self) -> float:
        """Forecast seconds of all that waits."""
        return sum(line.cost for line in self._waiting.values())

    def wait(self, caller: str) -> float:
        """Seconds until a new job of a caller would begin: what of each line comes before it, his own included.

        Whoever comes later and has had less may still go first, until the clock has reached where the caller's last turn ended.
        """
        own = self._line(caller)
        start = own.start + sum(max(job.cost, LEAST_COST) for job in own.jobs)
        before = own.cost
        for line in self._waiting.values():
            place = line.start
            for job in line.jobs if line is not own else ():
                if place > start or (place == start and len(line.jobs) > len(own.jobs) + 1):
                    break
                before += job.cost
                place += max(job.cost, LEAST_COST)
        return before

    def has_room(self, caller: str) -> bool:
        """Whether a job of this caller would be taken in: there is room, or another's line is longer than his would be."""
        if self._count < self._most:
            return True
        own = len(self._waiting[caller].jobs) if caller in self._waiting else 0
        return max((len(line.jobs) for line in self._waiting.values()), default=0) > own + 1

    def put(self, job: Job) -> Job | None:
        """The job waits, for which there must be room; returns the one that had to give way, if any."""
        gone = None
        if self._count >= self._most:
            longest = max(self._waiting.values(), key=lambda line: len(line.jobs))
            gone = longest.jobs[-1]
            self.remove(gone)
        line = self._waiting[job.caller] = self._line(job.caller)
        self._idle.pop(job.caller, None)
        line.jobs.append(job)
        line.cost += job.cost
        self._count += 1
        return gone

    def take(self, fits: Callable[[Job], bool] | None = None) -> Job | None:
        """The next job that fits, which waits no longer; None if there is none.

        Who asks for any job and finds none is idle: what callers owed is forgotten, as nobody waited for it.
        """
        lines = list(self._waiting.values())
        if len(lines) > 1:
            lines.sort(key=lambda line: (line.start, len(line.jobs)))
        for line in lines:
            job = line.jobs[0] if fits is None else next((job for job in line.jobs if fits(job)), None)
            if job is not None:
                self._turn = max(job.cost, LEAST_COST)
                self._charge(line, self._turn)
                self.remove(job)
                self._now = max(self._now, min((other.start for other in self._waiting.values()), default=0.0))
                return job
        if fits is None:
            self._idle.clear()
        return None

    def settle(self, caller: str, seconds: float) -> None:
        """A caller's work took so many seconds more than forecast (less if negative): his next turn comes later (earlier)."""
        line = self._waiting.get(caller) or self._idle.get(caller)
        if line is not None:
            self._charge(line, seconds)

    def remove(self, job: Job) -> None:
        """The job does not wait, whether or not it did."""
        line = self._waiting.get(job.caller)
        if line is None or job not in line.jobs:
            return
        line.jobs.remove(job)
        self._count -= 1
        line.cost = sum(other.cost for other in line.jobs)
        if not line.jobs:
            self._idle[job.caller] = self._waiting.pop(job.caller)
            if len(self._idle) > REMEMBERED:
                self._idle.popitem(last=False)

    def _line(self, caller: str) -> Line:
        """A caller's line as his next job would find it: who did not wait has saved up one turn, so that he is soon served."""
        if caller in self._waiting:
            return self._waiting[caller]
        ended = self._idle[caller].start if caller in self._idle else 0.0
        return Line(max(ended, self._now - self._turn))

    def _charge(self, line: Line, seconds: float) -> None:
        """The caller has had so much more, and the clock goes on by the share of each who waits or is ahead of it."""
        ahead = sum(idle.start > self._now for idle in self._idle.values())
        self._now += seconds / max(len(self._waiting) + ahead, 1)
        line.start += seconds
