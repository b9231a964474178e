"""Nights that change under load: the store's pointer moves to and fro, and is where it was when the block ends."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from index.errors import BrewlineError
from index.publish import current, publish, rollback
from ranking.serving.load import Measured, quantile
from ranking.serving.load_nights import Night, Point

AROUND_S = 1.0
"""Seconds before and after a swap that count as its own."""


class PointerMoved(BrewlineError):
    """Somebody else published while the pointer was ours to move."""


@dataclass(frozen=True)
class Move:
    """The pointer named the snapshot of `night` from `when` on (`time.monotonic()`), and the links led to its models."""

    when: float
    night: Night


@dataclass
class Mover:
    """Moves pointer and models between two nights. To and fro is publish and rollback, so HISTORY ends as it began, too."""

    store: Path
    served: Night
    other: Night
    point: Point
    moves: list[Move] = field(default_factory=list)

    def move(self) -> None:
        """The other one of the two nights is to be served. Raises PointerMoved, and what publish raises."""
        away = len(self.moves) % 2 == 0
        self._expect(self.served if away else self.other)
        self.point(away)
        if away:
            publish(self.store, self.other.snapshot)
        else:
            rollback(self.store)
        self.moves.append(Move(time.monotonic(), self.other if away else self.served))

    def restore(self) -> None:
        """The pointer names what it named at first. Raises PointerMoved."""
        if len(self.moves) % 2:
            self._expect(self.other)
            rollback(self.store)

    def _expect(self, night: Night) -> None:
        folder, name = current(self.store), night.snapshot
        if folder is None or folder.name != name:
            seen = "nothing" if folder is None else folder.name
            raise PointerMoved(
                f"the store {self.store} serves {seen} and not {name}: somebody published meanwhile; the pointer stays as it is"
            )


@contextmanager
def swapping(mover: Mover | None, every: float) -> Iterator[list[Move]]:
    """Inside the block the pointer moves every so many seconds, first after half of that; after it, it is back.

    Yields the list of moves, which grows; without a mover it stays empty. Raises PointerMoved.
    """
    if mover is None:
        yield []
        return
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
        if move.night.snapshot not in found.snapshots:
            continue
        moved = move.when - found.started
        until = moves[place + 1].when - found.started if place + 1 < len(moves) else np.inf
        named = found.answered & (found.snapshot == found.snapshots.index(move.night.snapshot))
        after = np.flatnonzero(named & (found.at >= moved) & (found.at < until))
        if after.size:
            swaps.append(Swap(moved, float(found.at[after[0]])))
    return swaps


def mixed(found: Measured, nights: Sequence[Night]) -> int:
    """Answers whose snapshot and models are not those of one night; without a ranker's name one that no ranker took part in."""
    whole = {(night.snapshot, night.encoder, ranker) for night in nights for ranker in (night.ranker, "")}
    pairs = zip(found.snapshot[found.answered].tolist(), found.model[found.answered].tolist(), strict=True)
    counts = Counter((found.snapshots[one], *found.models[two].split("|")) for one, two in pairs)
    return sum(number for night, number in counts.items() if night not in whole)


def swap_figures(found: Measured, moves: Sequence[Move], nights: tuple[Night, Night]) -> dict[str, object]:
    """What the swaps cost: `p99_ms_during_swap` over the requests scheduled within a second of a swap, `p99_ms_rest` over others.

    A swap lasts from the move of the pointer to the first request that the new night answers (`swap_seconds`: the longest).
    `swaps_by_kind`: how many of them exchanged the snapshot, the encoder, the ranker if one took part; `mixed` is what makes that
    true of answers.
    """
    swaps = seen_swaps(found, moves)
    kinds = nights[0].differs(nights[1])
    kinds["ranker"] &= any(name.partition("|")[2] for name in found.models)
    near = np.zeros(found.at.size, bool)
    for swap in swaps:
        near |= (found.at >= swap.moved - AROUND_S) & (found.at <= swap.seen + AROUND_S)
    during = quantile(found.ms[near & found.answered], 0.99)
    rest = quantile(found.ms[~near & found.answered], 0.99)
    return {
        "pointer_moves": len(moves),
        "swaps": len(swaps),
        "swaps_by_kind": {part: len(swaps) if differs else 0 for part, differs in kinds.items()},
        "mixed": mixed(found, nights),
        "swap_seconds": max((swap.seen - swap.moved for swap in swaps), default=None),
        "sent_during_swap": int(near.sum()),
        "p99_ms_during_swap": during,
        "p99_ms_rest": rest,
        "p99_during_over_rest": during / rest,
    }
