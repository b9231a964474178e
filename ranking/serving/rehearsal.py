"""Between requests the last one is answered once more, for nobody, so that the next one does not find everything cold.

On a shared machine processor caches forget a server within tens of milliseconds: a warm Retrieve that takes a third of a
millisecond when asked again at once takes three times as long at 26 a second, every stage of it alike. It costs the
answer's processor time each time, and one more reading of the member, so a server does it only when told to. No gRPC here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

MOST = 125
"""Rehearsals after a request: a server that nobody asks sleeps."""
LONGEST_S = 0.005
"""What takes longer is not rehearsed: its caller would not notice what is saved, and the next one might have to wait for it."""

log = logging.getLogger(__name__)


class Rehearsal:
    """What is to be run again, and when. For one thread at a time; with `every_s` 0 nothing is."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s if every_s > 0 else 0.0  # not a number is no time either
        self._again: Callable[[], object] | None = None
        self._left = 0

    @property
    def due_s(self) -> float | None:
        """Seconds of idleness after which to `run`, None for never."""
        return None if self._again is None else self._every_s

    def learn(self, again: Callable[[], object] | None, seconds: float) -> None:
        """Work was done that took so long; `again` does the same and changes nothing, None: there is nothing like that."""
        if again is not None and self._every_s:
            self._again, self._left = (again, MOST) if seconds <= LONGEST_S else (None, 0)

    def run(self) -> None:
        """Once more. What fails or takes too long is not tried again before a request shows that it goes well."""
        again, self._left, began = self._again, self._left - 1, time.monotonic()
        assert again is not None
        try:
            again()
        except Exception as error:  # a question to nobody; whoever asks it next is told
            log.warning("a rehearsal failed", exc_info=error)
            self._left = 0
        if not self._left or time.monotonic() - began > LONGEST_S:
            self._again = None  # nor is the request held any longer
