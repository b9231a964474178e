"""Nights that change under load: the store's pointer moves to and fro, and is where it was when the block ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from index.errors import BrewlineError
from index.publish import current, list_snapshots, publish, rollback
from ranking.serving.load import Measured, quantile

AROUND_S = 1.0
"""Seconds before and after a swap that count as its own."""


class NoSecondSnapshot(BrewlineError):
    """A store has nothing to swap to."""


class PointerMoved(BrewlineError):
    """Somebody else published while the pointer was ours to move."""


@dataclass(frozen=True)
class Move:
    """The pointer named `snapshot` from `when` on (`time.monotonic()`)."""

    when: float
    snapshot: str


def pair_of(store: Path) -> tuple[str, str]:
    """The served snapshot and the newest other one that the same models can serve. Raises NoSecondSnapshot."""
    whole = [info for info in list_snapshots(store) if not info.problem]
    served = next((info for info in whole if info.current), None)
    if served is None:
        raise NoSecondSnapshot(f"--store {store} serves nothing that is whole; run `brewline nightly` first")
    alike = (served.fingerprint, served.dims)
    others = [info.name for info in whole if not info.current and (info.fingerprint, info.dims) == alike]
    if not others:
        raise NoSecondSnapshot(
            f"--store {store} holds one snapshot of encoder {served.fingerprint}, and a swap needs two: run `brewline nightly` "
            "with the same models and another --as-of, then again with the one that is to be served"
        )
    return served.name, others[-1]


@dataclass
class Mover:
    """Moves the pointer between two snapshots. To and fro is publish and rollback, so HISTORY ends as it began, too."""

    store: Path
    served: str
    other: str
    moves: list[Move] = field(default_factory=list)

    def move(self) -> None:
        """The pointer names the other one of the two. Raises PointerMoved, and what publish raises."""
        away = len(self.moves) % 2 == 0
        self._expect(self.served if away else self.other)
        if away:
            publish(self.store, self.other)
        else:
            rollback(self.store)
        self.moves.append(Move(time.monotonic(), self.other if away else self.served))

    def restore(self) -> None:
        """The pointer names what it named at first. Raises PointerMoved."""
        if len(self.moves) % 2:
            self._expect(self.other)
            rollback(self.store)

    def _expect(self, name: str) -> None:
        folder = current(self.store)
        if folder is None or folder.name != name:
            seen = "nothing" if folder is None else folder.name
            raise PointerMoved(
                f"the store {self.store} serves {seen} and not {name}: somebody published meanwhile; the pointer stays as it is"
            )


@contextmanager
def swapping(store: Path, every: float) -> Iterator[list[Move]]:
    """Inside the block the pointer moves every so many seconds (0: never), first after half of that; after it, it is back.

    Yields the list of moves, which grows. Raises NoSecondSnapshot before anything is moved, and PointerMoved.
    """
    if not every:
        yield []
        return
    mover = Mover(store, *pair_of(store))
    ended = threading.Event()
    troubles: list[Exception] = []

    def work() -> None:
        pause = every / 2
        while not ended.wait(pause):
            try:
                mover.move()
            except Exception as error:  # told to the thread that waits for us
                troubles.append(error)
                return
            pause = max(0.0, mover.moves[0].when + len(mover.moves) * every - time.monotonic())

    thread = threading.Thread(target=work, name="brewline-swaps")
    thread.start()
    try:
        yield mover.moves
    finally:
        ended.set()
        thread.join()
        mover.restore()
    if troubles:
        raise troubles[0]


@dataclass(frozen=True)
class Swap:
    """One move that answers followed: the pointer moved at `moved`, the first answer of the new night was asked for at `seen`."""

    moved: float
    seen: float


def seen_swaps(found: Measured, moves: Sequence[Move]) -> list[Swap]:
    """The moves that show in the names of the answers, in seconds from the start of the run."""
    swaps = []
    for place, move in enumerate(moves):
        if move.snapshot not in found.snapshots:
            continue
        moved = move.when - found.started
        until = moves[place + 1].when - found.started if place + 1 < len(moves) else np.inf
        named = found.answered & (found.snapshot == found.snapshots.index(move.snapshot))
        after = np.flatnonzero(named & (found.at >= moved) & (found.at < until))
        if after.size:
            swaps.append(Swap(moved, float(found.at[after[0]])))
    return swaps


def swap_figures(found: Measured, moves: Sequence[Move]) -> dict[str, object]:
    """What the swaps cost: `p99_ms_during_swap` over the requests scheduled within a second of a swap, `p99_ms_rest` over others.

    A swap lasts from the move of the pointer to the first request that the new night answers (`swap_seconds`: the longest).
    """
    swaps = seen_swaps(found, moves)
    near = np.zeros(found.at.size, bool)
    for swap in swaps:
        near |= (found.at >= swap.moved - AROUND_S) & (found.at <= swap.seen + AROUND_S)
    during = quantile(found.ms[near & found.answered], 0.99)
    rest = quantile(found.ms[~near & found.answered], 0.99)
    return {
        "pointer_moves": len(moves),
        "swaps": len(swaps),
        "swap_seconds": max((swap.seen - swap.moved for swap in swaps), default=None),
        "sent_during_swap": int(near.sum()),
        "p99_ms_during_swap": during,
        "p99_ms_rest": rest,
        "p99_during_over_rest": during / rest,
    }
