"""Each plain way at its best size of a pass, and how much of it fits into the seconds that it may take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ranking.prefill.contenders import Begin, Ids, Items, Plain, Reader

SURE, MOST = 64, 256
"""Items of a pass: every power of two up to the first is tried, larger ones while the largest was the best."""
PACKED_ROWS = 4096
"""Tokens of one packed group: its mask grows with their square."""
SWEEP = {"one_by_one": 8, "prefix_cache": 64, "prefix_packed": 64}
"""Items that show which size is best: a full prompt costs the same whatever their number, a group shares a mask or a cache."""
TIMED_PROMPTS = 64
OURS, CONTENDERS = 0.25, 0.7
"""Parts of a budget for the engine's own rounds, and for those and the contenders together."""


@dataclass(frozen=True)
class Course:
    """`repeats` rounds; ours before every contender, else once in a round; `each`: seconds that a contender may take in all."""

    repeats: int
    every_turn: bool
    each: float


@dataclass(frozen=True)
class Entrant:
    """One plain way, timed `rounds` times on the first `items` of the N, which stand for all; none where `reason` says why."""

    name: str
    dtype: torch.dtype
    begin: Begin
    batch: int
    tried: int
    items: int
    rounds: int
    reason: str = ""

    @property
    def key(self) -> tuple[str, torch.dtype]:
        """What tells it from the others."""
        return self.name, self.dtype

    def seconds(self, prefix: Ids, items: Items) -> float:
        """Seconds of the whole request: those of the prefix, and those of the timed items scaled by their tokens."""
        began = time.perf_counter()
        read = self.begin(prefix)
        begun = time.perf_counter()
        read(items[: self.items], self.batch)
        spent = time.perf_counter() - begun
        before = len(prefix) if self.name == "one_by_one" else 0
        some, all_of_them = (sum(before + len(one) for one in part) for part in (items[: self.items], items))
        return begun - began + spent * all_of_them / some


def course(left: float, own: float, repeats: int, contenders: int) -> Course:
    """How to spend `left` seconds if our own part of a turn takes `own`."""
    every_turn = own * repeats * contenders <= OURS * left
    if not every_turn:
        repeats = min(repeats, max(1, int(OURS * left / own)))
    turns = repeats * (contenders if every_turn else 1)
    return Course(repeats, every_turn, max(0.0, CONTENDERS * left - own * turns) / contenders)


def best_batch(read: Reader, items: Items, least: int, most: int, seconds: float = math.inf) -> tuple[int, float, int]:
    """Returns the size of a pass with the least time per item, that time, and the largest size tried.

    Each is tried twice on at least `least` items; nothing is begun that would not be done within `seconds`, but for the smallest.
    """
    read(items[:1], 1)
    began = time.perf_counter()
    pace = timed(read, items[:1], 1)
    least = max(1, min(least, int(min(seconds / (14 * pace), least))))
    paces: dict[int, float] = {}
    size = 1
    while size <= min(len(items), most) and (size <= SURE or min(paces, key=paces.__getitem__) == size // 2):
        some = items[: max(size, least)]
        if paces and time.perf_counter() - began + 2 * pace * len(some) > seconds:
            break
        pace = paces[size] = min(timed(read, some, size) for _ in range(2)) / len(some)
        size *= 2
    best = min(paces, key=paces.__getitem__)
    return best, paces[best], max(paces)


def entrants_of(plain: Plain, prefix: Ids, items: Items, way: Course) -> Iterator[Entrant]:
    """Yields the ways of one model, each at the size that was best on this request."""
    for name, begin in plain.ways().items():
        yield _prepared(name, plain.dtype, begin, prefix, items, way)


def timed(call: Callable[..., object], *given: object) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call(*given)
    return time.perf_counter() - began


def _prepared(name: str, dtype: torch.dtype, begin: Begin, prefix: Ids, items: Items, way: Course) -> Entrant:
    if not way.each:
        return Entrant(name, dtype, begin, 0, 0, 0, 0, "not tried: the engine's own rounds fill the budget of seconds")
    began = time.perf_counter()
    read = begin(prefix)
    start = time.perf_counter() - began
    most = {"one_by_one": SURE, "prefix_cache": MOST}.get(name, min(MOST, max(1, PACKED_ROWS // max(map(len, items)))))
    best, pace, tried = best_batch(read, items, SWEEP[name], most, way.each / 3)
    wanted = min(len(items), max(TIMED_PROMPTS, 2 * best)) if name == "one_by_one" else len(items)
    left = way.each - (time.perf_counter() - began)
    for rounds in range(way.repeats, 0, -1):
        fits = (left / rounds - start) / pace
        if fits >= min(wanted, 2 * best):
            count = wanted if fits >= wanted else int(fits) // best * best
            return Entrant(name, dtype, begin, best, tried, count, rounds)
    needed = start + pace * min(wanted, 2 * best)
    reason = f"foretold {needed:.1f} s for {min(wanted, 2 * best)} items, {max(0.0, left):.1f} s of the budget are left for it"
    return Entrant(name, dtype, begin, best, tried, 0, 0, reason)
