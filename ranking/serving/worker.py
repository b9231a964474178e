"""One thread for the models: torch and FAISS use every core by themselves, and two requests at once would only slow both.

The thread takes turns between callers (`queue_fair`), drops what can no longer be answered in time before any work is spent on
it, and runs waiting requests of one kind together where they know how (`gather`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from ranking.serving.load_shed import MOST_WAIT_S, WRITES, Patience
from ranking.serving.queue_fair import FairQueue, Job
from ranking.serving.queue_forecast import Forecast, Kind
from ranking.serving.rehearsal import Rehearsal
from ranking.serving.status import Draining, Late

T = TypeVar("T")
MOST_TOGETHER, MOST_TOKENS, MOST_SECONDS = 32, 16_384, 0.05
"""Bounds of a batch: requests, tokens to be encoded, and the forecast seconds for which everybody else waits."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failed:
    """What came of a job that raised."""

    error: Exception


class Worker:
    """Runs jobs in its own thread. All but `close` is called from the event loop."""

    def __init__(
        self,
        most_waiting: int = 64,
        most_wait_s: float = MOST_WAIT_S,
        most_together: int = MOST_TOGETHER,
        rehearse_s: float = 0.0,
    ) -> None:
        self.draining = False
        self.drains = asyncio.Event()
        self._queue, self._first = FairQueue(most_waiting), deque[Job]()
        self._forecast = Forecast()
        self._patience, self._most_together = Patience(most_wait_s), most_together
        self._rehearsal = Rehearsal(rehearse_s)
        self._changed = threading.Condition()
        self._at_hand = self._until = 0.0
        self._inside = 0
        self._empty = asyncio.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="brewline-model", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """The server's own work (a probe, a swap) is next, before every request; its result comes by the future.

        Raises Draining if the server is going down.
        """
        self._refuse_if_draining()
        job = Job(work)
        with self._changed:
            self._first.append(job)
            self._changed.notify()
        return self._entered(job)

    def expect(self) -> None:
        """A request is on its way: the thread wakes up while its bytes are read, which takes a sleeping core a tenth of a ms."""
        if not self._until:
            with self._changed:
                self._changed.notify()

    def let_in(self, caller: str, name: str) -> None:
        """Nothing happens if a request of this name may be worth reading. Raises Overloaded, Draining."""
        self._refuse_if_draining()
        now = time.monotonic()
        with self._changed:
            self._refuse_if_full(caller, now)
            turn = max(self._forecast.most(name), self._at_hand)
            wait = self._wait(caller, now)
            if name not in WRITES and wait > self._patience.bound(turn, now, caller, gathered=True):
                raise self._patience.refuse(caller, wait, f"the wait would be {wait * 1e3:,.0f} ms", now)

    def put(self, job: Job) -> asyncio.Future[Any]:
        """The job waits for its turn; its result comes by the future, and cancelling that takes it out of the queue.

        Raises Overloaded or Late if there is no point in waiting, Draining if the server is going down.
        """
        self._refuse_if_draining()
        now = time.monotonic()
        with self._changed:
            job.cost = self._forecast.seconds(job.kind)
            job.queued = bool(self._until or len(self._queue))
            needed, trial, wait = job.first or job.kind, False, 0.0
            if job.queued:
                job.least = self._forecast.usual(needed)
                trial = job.least > job.deadline - now and self._forecast.is_old(needed, now, job.cost)
                if trial:
                    job.least = 0.0
                wait = self._wait(job.caller, now)
            self._patience.check(job, wait, now, self._at_hand)
            self._refuse_if_full(job.caller, now)
            if trial:
                self._forecast.tried(needed, now)
            gone = self._queue.put(job)
            self._changed.notify()
            if gone is not None and not gone.future.done():
                words = "your requests are the most of all that wait, and another caller's needed room"
                gone.future.set_exception(self._patience.refuse(gone.caller, self._queue.wait(gone.caller), words, now))
        return self._entered(job)

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._queue)

    def pressure(self, kind: Kind) -> float:
        """Seconds that wait in the queue over those that may, as a request of a kind sees it: 1 is as much as is let in."""
        with self._changed:
            bound = self._patience.bound(self._forecast.seconds(kind), time.monotonic())
            return self._queue.cost / bound if bound else 0.0

    async def drain(self, most_s: float) -> None:
        """New work is refused from now on, and what was accepted is answered, or `most_s` seconds have passed."""
        self.draining = True
        self.drains.set()
        if not self._inside:
            return
        try:
            await asyncio.wait_for(self._empty.wait(), most_s)
        except TimeoutError:
            log.warning("%d accepted requests were not answered within %.1f s", self._inside, most_s)

    def close(self) -> None:
        """The thread ends after the work at hand; what still waits is cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _entered(self, job: Job) -> asyncio.Future[Any]:
        self._inside += 1
        self._empty.clear()
        job.future.add_done_callback(lambda _: self._left(job))
        return job.future

    def _left(self, job: Job) -> None:
        self._inside -= 1
        if not self._inside:
            self._empty.set()
        if not job.future.cancelled():
            job.future.exception()  # an abandoned request's error was logged where it was raised
            return
        with self._changed:
            self._queue.remove(job)

    def _refuse_if_draining(self) -> None:
        if self.draining:
            raise Draining("the server is going down; ask another one, or again in a moment")

    def _refuse_if_full(self, caller: str, now: float) -> None:
        if not self._queue.has_room(caller):
            words = f"{len(self._queue)} requests are waiting already, no other caller's more than yours"
            raise self._patience.refuse(caller, self._queue.cost, words, now)

    def _wait(self, caller: str, now: float) -> float:
        return max(self._until - now, 0.0) + self._queue.wait(caller)

    # What follows runs in the thread.

    def _serve(self) -> None:
        while (jobs := self._next()) is not None:
            if not jobs:
                self._rehearsal.run()
                continue
            jobs = self._in_time(jobs)
            if not jobs:
                continue
            began = time.monotonic()
            results = _run(jobs)
            seconds = time.monotonic() - began
            with self._changed:
                self._learn(jobs, results, seconds)
            _deliver(jobs, results)
            if jobs[0].counted is not None:
                jobs[0].counted(len(jobs))
            if len(jobs) == 1 and not isinstance(results[0], Failed):
                self._rehearsal.learn(jobs[0].again, seconds)

    def _next(self) -> list[Job] | None:
        """What is run next, together if it is more than one; nothing if it is time for a rehearsal, None once it is closed."""
        with self._changed:
            while not self._closed:
                if self._first:
                    return [self._first.popleft()]
                job = self._queue.take()
                if job is not None:
                    jobs = [job] if job.together is None else self._gather(job)
                    self._at_hand = sum(one.cost for one in jobs)
                    self._until = time.monotonic() + self._at_hand
                    return jobs
                self._at_hand = self._until = 0.0
                if not self._changed.wait(self._rehearsal.due_s):
                    return []
            left = [*self._first, *iter(self._queue.take, None)]
        for job in left:
            _call(job, job.future.cancel)
        return None

    def _gather(self, first: Job) -> list[Job]:
        """The job and what waits of its kind, as much as the bounds and the tightest deadline of them allow."""
        jobs, tokens, seconds, tightest = [first], first.tokens, first.cost, first.deadline
        if not len(self._queue):
            return jobs
        now = time.monotonic()

        def fits(job: Job) -> bool:
            ends = now + seconds + job.cost
            alike = job.together == first.together
            return alike and tokens + job.tokens <= MOST_TOKENS and ends <= min(tightest, job.deadline, now + MOST_SECONDS)

        while len(jobs) < self._most_together and (job := self._queue.take(fits)) is not None:
            jobs.append(job)
            tokens, seconds, tightest = tokens + job.tokens, seconds + job.cost, min(tightest, job.deadline)
        return jobs

    def _in_time(self, jobs: Sequence[Job]) -> list[Job]:
        """Those that somebody still waits for and that can be answered in time; the others are told that they cannot."""
        now, kept = time.monotonic(), []
        for job in jobs:
            left = job.deadline - now
            late = left <= 0 or (job.queued and left < job.least)
            if late:
                words = "the deadline passed, or would have passed during the work, while the request waited"
                _deliver([job], [Failed(Late(f"{words}; give more time, or ask again when it is quieter"))])
            if late or job.future.done():
                with self._changed:
                    self._queue.settle(job.caller, -job.cost)
            else:
                kept.append(job)
        return kept

    def _learn(self, jobs: Sequence[Job], results: Sequence[object], seconds: float) -> None:
        forecast, now = sum(job.cost for job in jobs), time.monotonic()
        for job, result in zip(jobs, results, strict=True):
            share = seconds * (job.cost / forecast if forecast else 1 / len(jobs))
            self._queue.settle(job.caller, share - job.cost)
            if job.kind.name and not isinstance(result, Failed):
                for kind, seconds_of_it in [(job.kind, share), *job.parts]:
                    self._forecast.record(kind, seconds_of_it, now)


def _run(jobs: Sequence[Job]) -> Sequence[object]:
    """What came of each job: its answer, or Failed."""
    try:
        if len(jobs) > 1 and jobs[0].together is not None:
            return jobs[0].together(jobs)
        return [jobs[0].work()]
    except Exception as error:
        return [Failed(error)] * len(jobs)


def _deliver(jobs: Sequence[Job], results: Sequence[object]) -> None:
    """The event loop hears of the results, all of them by one call."""

    def tell() -> None:
        for job, result in zip(jobs, results, strict=True):
            if job.future.done():
                continue
            if isinstance(result, Failed):
                job.future.set_exception(result.error)
            else:
                job.future.set_result(result)

    _call(jobs[0], tell)


def _call(job: Job, told: Callable[[], object]) -> None:
    try:
        job.future.get_loop().call_soon_threadsafe(cast(Callable[[], None], told))
    except RuntimeError:
        log.warning("an answer came after its event loop was closed")
