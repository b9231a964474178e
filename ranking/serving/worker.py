"""One thread for the models: torch and FAISS use every core by themselves, and two requests at once would only slow both."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ranking.serving.status import Draining, Overloaded

T = TypeVar("T")


class Worker:
    """Runs functions one after another in its own thread; at most `most_waiting` may wait, the next is refused."""

    def __init__(self, most_waiting: int = 64) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="brewline-model")
        self._most = most_waiting
        self._inside = 0
        self.draining = False

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """The work is in the queue; its result comes by the future. To be called from the event loop.

        Raises Overloaded if too many wait, Draining if the server is going down.
        """
        if self.draining:
            raise Draining("the server is going down; ask another one, or again in a moment")
        if self._inside > self._most:
            raise Overloaded(f"{self._most} requests are waiting already; try again in a moment")
        self._inside += 1
        future = asyncio.wrap_future(self._pool.submit(work))
        future.add_done_callback(self._left)
        return future

    def _left(self, future: asyncio.Future[T]) -> None:
        self._inside -= 1
        if not future.cancelled():
            future.exception()  # an abandoned request's error was logged where it was raised

    def close(self) -> None:
        """The thread ends after the work at hand; what still waits is cancelled."""
        self._pool.shutdown(wait=True, cancel_futures=True)
