"""Recall seen while serving: a share of the answers is compared with the exact twin's, off the path of the request."""

from __future__ import annotations

import logging
import queue
import random
import statistics
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from index.errors import BrewlineError

log = logging.getLogger(__name__)


class ShadowError(BrewlineError):
    """A share of answers is no share."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a shadow has seen: the mean `recall` of its last answers (None before the first), and since its start how many were
    `compared`, how many `dropped` because too many waited or it was closed, how many comparisons `failed` (the log says why)."""

    recall: float | None
    compared: int
    dropped: int
    failed: int


class Shadow:
    """Compares a `share` of answers, one after the other on a thread of its own, and keeps the recall of the last `window`.

    A request never waits: with `waiting` comparisons in the queue the next is dropped and counted. Threads may share it. What
    waits keeps the snapshot of its answer open.
    """

    def __init__(self, share: float, *, window: int = 500, waiting: int = 16, seed: int = 0) -> None:
        """Raises ShadowError for a share outside [0, 1]."""
        if not 0 <= share <= 1:
            raise ShadowError(f"a share of {share} of the answers is to be compared, expected 0 to 1")
        self._share, self._draw = share, random.Random(seed)
        self._waiting: queue.Queue[Callable[[], float] | None] = queue.Queue(waiting)
        self._recalls: deque[float] = deque(maxlen=window)
        self._compared = self._dropped = self._failed = 0
        self._lock, self._thread = threading.Lock(), threading.Thread(target=self._work, name="shadow", daemon=True)

    def pick(self, queries: int) -> int | None:
        """Which of so many queries, answered together, is to be compared is returned; None if none is."""
        return self._draw.randrange(queries) if queries and self._draw.random() < self._share else None

    def offer(self, recall: Callable[[], float]) -> None:
        """The recall of one answer is found out some time, or it is dropped; returns at once."""
        with self._lock:
            if not self._thread.ident:
                self._thread.start()
        try:
            self._waiting.put_nowait(recall)
        except queue.Full:
            with self._lock:
                self._dropped += 1

    def seen(self) -> Seen:
        """What was seen until now."""
        with self._lock:
            mean = statistics.fmean(self._recalls) if self._recalls else None
            return Seen(mean, self._compared, self._dropped, self._failed)

    def drain(self) -> None:
        """Everything that was offered before is compared."""
        if self._thread.ident:
            self._waiting.join()

    def close(self) -> None:
        """What waits is dropped and counted, the comparison under way is over, and the thread has ended.

        Nothing may be offered any more. Nobody who stops a server waits for exact searches that nobody will read.
        """
        if self._thread.ident:
            self._drop_waiting()
            self._waiting.put(None)
            self._thread.join()

    def _drop_waiting(self) -> None:
        while True:
            try:
                recall = self._waiting.get_nowait()
            except queue.Empty:
                return
            with self._lock:
                self._dropped += recall is not None
            self._waiting.task_done()

    def _work(self) -> None:
        while (recall := self._waiting.get()) is not None:
            try:
                share = recall()
            except Exception:
                log.exception("an answer could not be compared with the exact twin's")
                with self._lock:
                    self._failed += 1
            else:
                with self._lock:
                    self._recalls.append(share)
                    self._compared += 1
            finally:
                del recall
                self._waiting.task_done()
