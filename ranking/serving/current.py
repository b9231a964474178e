"""The one place that says which night answers: requests read it once, a swap replaces it whole."""

from __future__ import annotations

from dataclasses import dataclass

from ranking.serving.stack import Stack


@dataclass(frozen=True)
class SwapState:
    """What became of new nights under this server. Times are seconds since 1970, 0 for never.

    `reason` says why what the store and the folders hold now is not served; it is empty when it is.
    """

    last_ok: float = 0.0
    last_refused: float = 0.0
    reason: str = ""
    swaps: int = 0
    refused: int = 0


class Current:
    """Holds the stack that new requests get. Reading and exchanging are safe from any thread: a reference is replaced."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.swap = SwapState()

    @property
    def stack(self) -> Stack:
        """The stack of this moment; a request that has read it keeps it to its end."""
        return self._stack

    def exchange(self, stack: Stack) -> Stack:
        """New requests get `stack`; the one before is returned, and requests that began with it may still read it."""
        before, self._stack = self._stack, stack
        return before
