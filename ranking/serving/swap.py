"""A new night, encoder or ranker under a running server: seen, loaded beside, verified, warmed, exchanged between two requests.

The pointer of the store and the files of the models are looked at every second, or when somebody says so (SIGHUP). Whatever is
wrong with what is found, the stack that answers stays: the log says why, `Current.swap` keeps it, and the same files are tried
again only after a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from index.errors import BrewlineError
from ranking.serving.current import Current
from ranking.serving.stack import Stack
from ranking.serving.status import Draining
from ranking.serving.swap_load import Loader, free, load_beside, same
from ranking.serving.swap_look import Seen, changed, look
from ranking.serving.worker import Worker

STOP_S = 1.0
"""A task that was cancelled has ended long before; whatever keeps it, the server ends."""
AGAIN_S, AGAIN_AT_MOST_S = 30.0, 600.0
"""Seconds until what was refused is tried again although nothing changed; each time twice as many, up to so many."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Watcher:
    """Keeps the current stack that of the store's pointer and of the models' folders. Lives on the event loop."""

    def __init__(self, current: Current, worker: Worker, poll_s: float, asked: asyncio.Event) -> None:
        """Looks every `poll_s` seconds, and when `asked` is set; 0: only then."""
        self._current, self._worker, self._poll_s, self._asked = current, worker, poll_s, asked
        self._loader, self._stopping = Loader(), False
        self._refused: Seen | None = None
        self._pause, self._again = AGAIN_S, 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Looks and swaps until `stop`."""
        self._loader.start()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Nothing more is begun to be exchanged; what is being loaded is dropped when it is there, and nobody waits for it."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=STOP_S)
        self._loader.close()

    async def _run(self) -> None:
        while not self._stopping:
            # Not wait_for: that of Python 3.11 forgets that it was cancelled when `asked` was set in the same turn of the loop.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s or None):
                    await self._asked.wait()
            forced = self._asked.is_set()
            self._asked.clear()
            try:
                await self._turn(forced)
            except Exception as error:
                log.error("a look for a new night failed; the next one comes", exc_info=error)

    async def _turn(self, forced: bool) -> None:
        # The origin holds the encoder, so it must not be kept over the swap.
        source, before = self._current.stack.origin.source, self._current.stack.origin.seen
        now = await self._beside(partial(look, source))
        if now == before:
            self._settle()
            return
        if now == self._refused and not forced and time.monotonic() < self._again:
            return
        log.info("something new to serve: %s", changed(before, now))
        held: list[Stack] = []
        try:
            held = await self._swap()
        except Draining:
            return
        except Exception as error:
            self._refuse(now, error)
        await self._free(held)

    def _beside(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.wrap_future(self._loader.submit(work))

    async def _swap(self) -> list[Stack]:
        """What there is now answers, and the stack before is returned; none if it is the same. Raises what stands in the way."""
        began, held = time.monotonic(), [self._current.stack]
        fresh = await self._beside(partial(load_beside, held[0]))
        if same(fresh, held[0]):
            fresh.today.close()
            self._current.exchange(replace(held[0], origin=fresh.origin))
            self._settle()
            return []
        loaded = time.monotonic()
        try:
            await self._worker.submit(fresh.probe)
            if fresh.ranker is not None and fresh.ranker is not held[0].ranker:
                await self._worker.submit(fresh.warm)
            exchanged = self._worker.submit(partial(self._exchange, fresh))
        except BaseException:
            fresh.today.close()
            raise
        await exchanged  # whoever is cancelled here must close nothing: the new stack may be the one that writes by now
        self._told(fresh, held[0], loaded - began)
        return held

    async def _free(self, held: list[Stack]) -> None:
        """The stacks are gone, and what a refused one left. Unmapping takes its time, so it is the loader that lets go last."""
        with contextlib.suppress(Draining):
            await self._worker.submit(lambda: None)  # behind it, nothing runs that began with them
        await self._beside(partial(free, held))

    def _exchange(self, fresh: Stack) -> None:
        """Between two requests: all that was acknowledged is in the new stack before it is anybody's."""
        try:
            fresh.today.take_over(self._current.stack.today)
        except BaseException:
            fresh.today.close()
            raise
        self._current.exchange(fresh)

    def _told(self, fresh: Stack, before: Stack, seconds: float) -> None:
        state = self._current.swap
        self._current.swap = replace(state, last_ok=time.time(), swaps=state.swaps + 1)
        self._settle()
        models = {"encoder": fresh.encoder, "ranker": fresh.ranker}
        named = {name: "" if new is None else new.fingerprint for name, new in models.items()}
        words = "serves snapshot %s in place of %s; it was loaded in %.1f s"
        log.info(words, fresh.snapshot.name, before.snapshot.name, seconds, extra=named)

    def _settle(self) -> None:
        """What is there is served."""
        self._refused, self._pause = None, AGAIN_S
        if self._current.swap.reason:
            self._current.swap = replace(self._current.swap, reason="")

    def _refuse(self, now: Seen, error: Exception) -> None:
        self._pause = min(2 * self._pause, AGAIN_AT_MOST_S) if now == self._refused else AGAIN_S
        self._refused, self._again = now, time.monotonic() + self._pause
        ours = isinstance(error, (BrewlineError, OSError))
        reason = str(error) if ours else f"{type(error).__name__}: {error}"
        state = self._current.swap
        self._current.swap = replace(state, last_refused=time.time(), reason=reason, refused=state.refused + 1)
        served = self._current.stack.snapshot.name
        log.error("not served: %s. Snapshot %s is served on", reason, served, exc_info=None if ours else error)
