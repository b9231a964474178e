"""The small parent of several servers at one port: it starts them, starts again what dies, passes signals on, and loads no model.

Each worker is a whole `brewline serve` that shares the port (SO_REUSEPORT: the kernel gives each connection to one of them) and
the snapshot's mapped pages. It tells in one line on its standard output that it answers, then in an empty one every `BEAT_S`
seconds that its event loop turns, and ends when its standard input does, so none outlives a parent that was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from index.errors import BrewlineError

PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Between the death of a worker and its next start; twice as long each time, unless it has lived for `STEADY_S` seconds."""
STEADY_S = 60.0
GRACE_S = 15.0
"""Seconds that a worker may take to end beyond the time for draining; then it is killed."""
BEAT_S, SILENT_S = 2.0, 30.0
"""So often a worker says that it lives; one that has said nothing for so long hangs, and is killed: the kernel would go on
sending connections to it, and nobody would ever answer them."""
MOST_LINE = 1 << 20
THREADS = "OMP_NUM_THREADS"

Facts = Mapping[str, Any]

log = logging.getLogger(__name__)


class WorkerFailed(BrewlineError):
    """A worker ended before it served for the first time."""


@dataclass(eq=False)
class One:
    """One worker: its command, and while it answers the `facts` that it told (`first`: in its first life); `restarts` counts its
    further lives. `looks`: it was to look for a new night when it could not hear it."""

    name: str
    command: Sequence[str]
    facts: Facts | None = None
    first: Facts = field(default_factory=dict)
    restarts: int = 0
    looks: bool = False
    told: asyncio.Event = field(default_factory=asyncio.Event)
    process: asyncio.subprocess.Process | None = None

    def tell(self, number: int) -> None:
        """The worker gets the signal, if it lives."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def look(self) -> None:
        """It looks for a new night, now or once it answers: the signal would end one that is still loading."""
        self.looks = self.facts is None
        if not self.looks:
            self.tell(signal.SIGHUP)

    def answers(self, line: bytes) -> None:
        """It answers, and this is what it said of itself. Raises ValueError for another line than that."""
        facts = json.loads(line)
        if not isinstance(facts, dict):
            raise ValueError(f"{line[:80]!r} is no JSON object")
        self.facts, self.first = facts, self.first or facts
        self.told.set()
        if self.looks:
            self.look()


class Workers:
    """The workers of one server, from `run` until `stop` is set. `all` may be read from any thread."""

    def __init__(self, commands: Sequence[Sequence[str]], environment: Mapping[str, str], drain_s: float) -> None:
        self.all = [One(str(place), command) for place, command in enumerate(commands)]
        self._environment, self._drain_s = dict(environment), drain_s
        self._stopping = asyncio.Event()

    async def run(self, ready: Callable[[Facts], None], stop: asyncio.Event) -> None:
        """Returns when `stop` is set and all have ended. `ready` is told what the first said once all of them answer.

        Raises WorkerFailed if one of them cannot even begin, and what `ready` raises; then none is left.
        """
        kept = [asyncio.create_task(self._keep(one)) for one in self.all]
        stopped, announced = asyncio.create_task(stop.wait()), asyncio.create_task(self._announce(ready))
        try:
            await asyncio.wait({*kept, stopped, announced}, return_when=asyncio.FIRST_COMPLETED)
            if announced.done():
                announced.result()
                await asyncio.wait({*kept, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            announced.cancel()
            await self._end(kept)
        for task in kept:
            task.result()

    def look(self) -> None:
        """Every worker looks for a new night at once."""
        for one in self.all:
            one.look()

    async def _announce(self, ready: Callable[[Facts], None]) -> None:
        for one in self.all:
            await one.told.wait()
        ready(self.all[0].first)

    async def _keep(self, one: One) -> None:
        pause = PAUSE_S
        while not self._stopping.is_set():
            began = time.monotonic()
            status = await self._live(one)
            if self._stopping.is_set():
                return
            if not one.told.is_set():
                raise WorkerFailed(f"worker {one.name} ended ({status}) before it answered anything; its own words are above")
            pause = PAUSE_S if time.monotonic() - began > STEADY_S else min(2 * pause, LONGEST_PAUSE_S)
            one.restarts += 1
            log.error("worker %s ended (%s), and is started again in %.1f s", one.name, status, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _live(self, one: One) -> str:
        """One life of a worker; how it ended, in words."""
        pipe = asyncio.subprocess.PIPE
        try:
            one.process = process = await asyncio.create_subprocess_exec(
                *one.command, stdin=pipe, stdout=pipe, env=self._environment, limit=MOST_LINE
            )
        except OSError as error:
            return f"it could not be started: {error}"
        if self._stopping.is_set():
            one.tell(signal.SIGTERM)
        assert process.stdout is not None
        try:
            if line := await process.stdout.readline():
                one.answers(line)
                log.info("worker %s answers", one.name, extra={"pid": process.pid})
                if not await _heard_to_the_end(process.stdout):
                    one.tell(signal.SIGKILL)
                    await process.wait()
                    return f"killed, for it hangs: nothing was heard of it for {SILENT_S:.0f} s"
            code = await process.wait()
        except ValueError as error:
            one.tell(signal.SIGKILL)
            await process.wait()
            return f"killed, for it said something else than that it answers: {error}"
        finally:
            one.facts = None
        return f"status {code}" if code >= 0 else signal.Signals(-code).name

    async def _end(self, kept: Sequence[asyncio.Task[None]]) -> None:
        self._stopping.set()
        for one in self.all:
            one.tell(signal.SIGTERM)
        _, late = await asyncio.wait(kept, timeout=self._drain_s + GRACE_S)
        if late:
            log.error("%d workers did not end within %.0f s and are killed", len(late), self._drain_s + GRACE_S)
            for one in self.all:
                one.tell(signal.SIGKILL)
            await asyncio.wait(kept)


async def _heard_to_the_end(outlet: asyncio.StreamReader) -> bool:
    """Whether a worker went on saying that it lives until it ended. Raises ValueError for a line without end.

    Silence is counted in waits of a beat each: one that this process slept through itself (stopped, frozen) is one wait.
    """
    silent = 0
    while silent < SILENT_S / BEAT_S:
        try:
            if not await asyncio.wait_for(outlet.readline(), BEAT_S):
                return True
            silent = 0
        except TimeoutError:
            silent += 1
    return False


def share_of_cores(workers: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of each worker: the cores that this process may use are divided, at least one for each.

    torch, OpenMP, FAISS, MKL, OpenBLAS and Arrow all read OMP_NUM_THREADS; where somebody has set it, it stays.
    """
    if environment.get(THREADS, "").strip():
        return dict(environment)
    return {**environment, THREADS: str(max(len(os.sched_getaffinity(0)) // workers, 1))}


def run_until_signal(workers: Workers, ready: Callable[[Facts], None]) -> None:
    """Runs the workers until SIGTERM or SIGINT; SIGHUP makes them look for a new night. Raises WorkerFailed."""

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number, heard in ((signal.SIGTERM, stop.set), (signal.SIGINT, stop.set), (signal.SIGHUP, workers.look)):
            loop.add_signal_handler(number, heard)
        await workers.run(ready, stop)

    asyncio.run(main())
