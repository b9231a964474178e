"""How often a search had to look again: what makes a fast search slow on some queries, counted where it happens."""

from __future__ import annotations

import threading
from typing import Literal, get_args

How = Literal["once", "again", "everything"]
"""One look was enough; a wider one was needed; every permitted vector was scored, by choice or because nothing less would do."""


class Looks:
    """Counts queries by how they were answered. Threads may share it."""

    def __init__(self) -> None:
        self._counts: dict[How, int] = dict.fromkeys(get_args(How), 0)
        self._lock = threading.Lock()

    def note(self, once: int = 0, again: int = 0, everything: int = 0) -> None:
        """So many more queries were answered in each way."""
        with self._lock:
            self._counts["once"] += once
            self._counts["again"] += again
            self._counts["everything"] += everything

    def seen(self) -> dict[How, int]:
        """The counts since the start are returned."""
        with self._lock:
            return dict(self._counts)
